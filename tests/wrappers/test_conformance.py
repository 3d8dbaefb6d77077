"""The contracts of wrappers: every wrapper around every rule with every storage.

A public wrapper without a row in `WRAPPERS` fails. Many rules are compiled into one program: a dictionary of rules in
place of one.
"""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import RULES, STORAGES, assert_bit_equal, avals, gradients, pointers, slot
from wrapped import WRAPPERS

import momentum_optax as mo

# These look like wrappers, and have their contracts elsewhere.
ELSEWHERE = {mo.scale_by_momentum, mo.compress}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)

# One leaf for the storage, and one that every storage keeps in full, which costs little to compile.
LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((), jnp.bfloat16)}
SIGNAL = [gradients(LIKE, seed) for seed in range(5)]
LOSSES = [jnp.float32(x) for x in (3.0, 2.0, 2.5, 1.0, 0.5)]  # rises once, which restarts

# Every wrapper once, every storage, and rules of every order: 1, 2 and 4, with ages, with schedules, and with neither.
THIN = [
    ("accumulated", "float32", "heavy_ball"),
    ("guarded", "int8", "nesterov"),
    ("guarded by leaf", "float32", "nadam_mix"),
    ("restart by gradient", "bfloat16", "triple_momentum"),
    ("restart by leaf", "float32", "schedule_free"),
    ("restart by loss", "float32", "chebyshev"),
    ("scheduled restart", "int4", "heavy_ball"),
    ("cautious by count", "float32", "ademamix_mix"),
    ("cautious by mean", "float32", "grokfast_average"),
    ("cautious by sign bit", "float32", "lion_mix"),
    ("with momentum", "float32", "quasi_hyperbolic"),
    ("monitor", "float32", "nesterov"),
]
# And of a wrapper or storage that is in its table alone.
THIN += [(name, "float32", "heavy_ball") for name in WRAPPERS if name not in {row[0] for row in THIN}]
THIN += [("monitor", name, "heavy_ball") for name in STORAGES if name not in {row[1] for row in THIN}]
thin = pytest.mark.parametrize(("wrapper", "storage", "rule"), THIN, ids=[w for w, _, _ in THIN])

whole = pytest.mark.parametrize(
    ("wrapper", "storage", "rules"),
    [(w, s, row.rules) for s in STORAGES for w, row in WRAPPERS.items()],
    ids=[f"{w}-{s}" for s in STORAGES for w in WRAPPERS],
)


def is_wrapper(thing):
    """Whether it makes a transformation from another one, or from a rule."""
    if not inspect.isfunction(thing):
        return False
    signature = inspect.signature(thing)
    makes = "GradientTransformation" in str(signature.return_annotation)
    return makes and next(iter(signature.parameters), None) in ("tx", "rule")


def test_every_public_wrapper_has_a_row():
    public = {thing for name, thing in vars(mo).items() if is_wrapper(thing)}
    assert public == {row.function for row in WRAPPERS.values()} | ELSEWHERE
    assert {w for w, _, _ in THIN} == set(WRAPPERS)
    assert {s for _, s, _ in THIN} == set(STORAGES)
    orders = {name: build().pruned().order for name, build in RULES.items()}
    assert {orders[name] for _, _, name in THIN} == set(orders.values())


@pytest.mark.parametrize("name", sorted(name for name, thing in vars(mo).items() if is_wrapper(thing)))
def test_a_wrapper_has_a_file_of_tests_and_a_page_that_says_when_to_take_it(name):
    root = pathlib.Path(__file__).parents[2]
    module = getattr(mo, name).__module__.split(".")[1:]
    path = root.joinpath("tests", *module[:-1], f"test_{module[-1]}.py")
    if name != "scale_by_momentum":  # whose tests are a folder
        assert f"mo.{name}(" in path.read_text(), f"test {name} in {path.relative_to(root)}"
    pages = [page.read_text() for page in (root / "docs").rglob("*.md") if page.parent.name != "api"]
    assert any(f"mo.{name}" in page for page in pages), f"say in docs/guide.md when to take {name}"


def bundle(wrapper, storage, rules):
    """One transformation for several rules: it maps gradients to a dictionary of updates."""
    txs = {name: WRAPPERS[wrapper].build(RULES[name](), STORAGES[storage]()) for name in rules}

    def init(params):
        return {name: tx.init(params) for name, tx in txs.items()}

    def update(g, states, value):
        runs = {name: optax.with_extra_args_support(tx).update for name, tx in txs.items()}
        pairs = {name: run(g, states[name], value=value) for name, run in runs.items()}
        return {name: u for name, (u, _) in pairs.items()}, {name: state for name, (_, state) in pairs.items()}

    return init, update


def check_types(wrapper, storage, rules):
    """An abstract update keeps the types of state and gradient: half precision, and a leaf without a gradient."""
    init, update = bundle(wrapper, storage, rules)

    def leaves(**dtypes):
        return {k: None if d is None else jax.ShapeDtypeStruct((2, 3), d) for k, d in dtypes.items()} | {"none": {}}

    start = jax.eval_shape(init, leaves(x=jnp.bfloat16, y=jnp.float16, z=jnp.float32))
    gradient = leaves(x=jnp.float32, y=jnp.bfloat16, z=None)
    updates, after = jax.eval_shape(update, gradient, start, jnp.float32(0))
    assert avals(after) == avals(start)
    assert all(avals(u) == avals(gradient) for u in updates.values())
    assert not any(x.weak_type for x in jax.tree.leaves(start))


def check_runs(wrapper, storage, rules):
    """Three programs: the step with its state donated, the step for a leaf without a gradient, a scan under vmap."""
    init, update = bundle(wrapper, storage, rules)
    # Also what no step reads, such as the flag of the step before, is there to be given away.
    step, traces = jax.jit(update, donate_argnums=1, keep_unused=True), []
    start = jax.jit(init)(LIKE)
    assert len(set(pointers(start))) == len(pointers(start))

    def follow(state, steps):
        for i in steps:
            old, begin = [x for x in jax.tree.leaves(state) if x.size], avals(state)
            u, state = step(SIGNAL[i], state, LOSSES[i])
            assert all(x.is_deleted() for x in old)
            assert avals(state) == begin
            assert len(set(pointers((u, state)))) == len(pointers((u, state)))
            traces.append(u)
        return state

    # Stopped, saved and resumed, it is the run.
    saved = jax.device_get(follow(jax.tree.map(jnp.copy, start), range(2)))
    last = jax.device_get(follow(jax.tree.map(jnp.asarray, saved), range(2, 5)))
    again = follow(jax.tree.map(jnp.copy, start), range(5))
    assert_bit_equal(again, last)
    assert_bit_equal(traces[:5], traces[5:])
    assert any(np.any(np.float32(u[name]["a"]) != 0) for u in traces for name in rules)

    check_a_bad_gradient(wrapper, step, saved)
    assert step._cache_size() == 1
    check_a_missing_gradient(update, saved)

    # In a program for two runs the second one's gradients come in another order.
    reversed_run = jax.tree.map(jnp.copy, start)
    for i in range(5):
        _, reversed_run = step(SIGNAL[4 - i], reversed_run, LOSSES[i])
    check_two_runs_at_once(init, update, traces[:5], (last, reversed_run))


def check_a_bad_gradient(wrapper, step, saved):
    """A NaN stays out of the leaf that it came for, where the wrapper skips steps."""
    bad = {**SIGNAL[2], "a": SIGNAL[2]["a"].at[0, 1].set(jnp.nan)}
    u, after = step(bad, jax.tree.map(jnp.asarray, saved), LOSSES[1])
    assert avals(after) == avals(saved)
    if WRAPPERS[wrapper].skips:
        for name in saved:
            assert_bit_equal(slot(after[name].inner, "a"), slot(saved[name].inner, "a"))
            np.testing.assert_array_equal(u[name]["a"], np.zeros((2, 3)))
            if wrapper == "guarded":
                assert_bit_equal(after[name].inner, saved[name].inner)


def check_a_missing_gradient(update, saved):
    """A leaf without a gradient keeps what belongs to it, also where the others restart, as here."""
    u, after = jax.jit(update)({**SIGNAL[2], "a": None}, saved, LOSSES[2])
    assert avals(after) == avals(saved)
    for name in saved:
        assert u[name]["a"] is None
        assert len(slot(saved[name], "a")) > 0
        assert_bit_equal(slot(after[name], "a"), slot(saved[name], "a"))


def check_two_runs_at_once(init, update, traced, ends):
    """Two runs in one program end as they do alone; the second one's gradients come in reversed order."""

    def scan(order):
        signal = jax.tree.map(lambda *x: jnp.stack(x)[order], *SIGNAL)
        return jax.lax.scan(lambda s, x: update(x[0], s, x[1])[::-1], init(LIKE), (signal, jnp.stack(LOSSES)))

    states, updates = jax.jit(jax.vmap(scan))(jnp.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]))
    for i, end in enumerate(ends):
        check_close(jax.tree.map(lambda x, i=i: x[i], states), end)
    check_close([jax.tree.map(lambda x, i=i: x[0, i], updates) for i in range(5)], traced)


def check_close(got, expected):
    """Equal, to the bit where a storage decides: other programs may round the last bit of a float otherwise."""
    assert avals(got) == avals(expected)

    def check(a, b):
        if jnp.issubdtype(a.dtype, jnp.integer) or a.dtype == bool:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        else:
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=4e-6, atol=2e-6)

    jax.tree.map(check, got, expected)


# With options that read more, and what is no wrapper.
UNUSUAL = {name: row.build(RULES["heavy_ball"](), "float32") for name, row in WRAPPERS.items()} | {
    "spikes": mo.guarded(optax.identity(), max_ratio=3.0),
    "spikes by leaf": mo.guarded(optax.identity(), "leaf", max_ratio=3.0),
    "restart of Nesterov's rule": mo.adaptive_restart(mo.nesterov(0.9)),
    "cautious identity": mo.cautious(optax.identity(), "mean"),
    "cautious weight decay": mo.add_cautious_weight_decay(0.1, "product"),
    "average": mo.average_params(0.9),
    "average in bytes": mo.average_params(0.9, storage="int8"),
    "unit norm": mo.scale_to_unit_norm(),
    "debiased schedule": mo.scale_by_momentum(mo.ema(lambda step: 1 - 1 / (step + 2.0)), debias=True),
}
unusual = pytest.mark.parametrize(("name", "tx"), UNUSUAL.items(), ids=UNUSUAL)


def types_after_a_step(tx, params, value=1.0):
    """Shapes and dtypes of updates and state after a step; those of the state are not weak."""

    def step():
        return optax.with_extra_args_support(tx).update(params, tx.init(params), params, value=value)

    updates, state = jax.eval_shape(step)
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    return jax.tree.map(lambda x: (x.shape, x.dtype), (updates, state))


@unusual
def test_python_numbers_are_parameters_and_gradients(name, tx):
    got, expected = (types_after_a_step(tx, {"a": one(1.0), "b": one(2.0)}) for one in (float, jnp.float32))
    assert got == expected


@unusual
def test_leaves_of_several_dtypes_step_under_strict_promotion(name, tx, x64):
    dtypes = ["float32", "float64", "bfloat16"] + ["complex64"] * ("cautious" not in name)
    params = {dtype: jnp.ones(3, dtype) for dtype in dtypes}
    expected = types_after_a_step(tx, params)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert types_after_a_step(tx, params) == expected


@pytest.mark.rare_storages
@thin
def test_types_stay_for_some_rules(wrapper, storage, rule):
    check_types(wrapper, storage, [rule])


@pytest.mark.one_in(24)
@pytest.mark.rare_storages
@thin
def test_runs_are_replayed_donated_batched_and_skipped_for_some_rules(wrapper, storage, rule):
    check_runs(wrapper, storage, [rule])


@pytest.mark.slow
@whole
def test_types_stay_for_every_rule_and_storage(wrapper, storage, rules):
    check_types(wrapper, storage, rules)


@pytest.mark.slow
@whole
def test_runs_are_replayed_donated_batched_and_skipped_for_every_rule_and_storage(wrapper, storage, rules):
    check_runs(wrapper, storage, rules)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_a_monitor_changes_no_bit_for_every_rule_and_storage(storage):
    pairs = [(mo.scale_by_momentum(build(), storage=STORAGES[storage]()), build()) for build in RULES.values()]
    for every in (1, 2):
        watched = {i: mo.monitor(tx, rule, every=every) for i, (tx, rule) in enumerate(pairs)}
        alone = {i: tx for i, (tx, _) in enumerate(pairs)}
        results = []
        for txs in (watched, alone):
            step = jax.jit(lambda g, states, txs=txs: {i: tx.update(g, states[i]) for i, tx in txs.items()})
            states, out = {i: tx.init(LIKE) for i, tx in txs.items()}, []
            for g in SIGNAL:
                new = step(g, states)
                states = {i: state for i, (_, state) in new.items()}
                out.append({i: u for i, (u, _) in new.items()})
            results.append((out, states))
        assert_bit_equal(results[0][0], results[1][0])
        assert_bit_equal({i: state.inner for i, state in results[0][1].items()}, results[1][1])
