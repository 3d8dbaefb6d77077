"""`average_params` against loops over the weights in NumPy's float64."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals, gradients, own_jit, pointers

import momentum_optax as mo
from momentum_optax.wrappers.average_params import AverageState

STEPS = 40
STORAGES = {
    "float32": mo.storage.float32,
    "bfloat16": mo.storage.bfloat16,
    "int8": lambda: mo.storage.int8(min_size=1),
}
every_storage = pytest.mark.parametrize(
    "storage", [pytest.param(name, marks=() if name == "int8" else pytest.mark.slow) for name in STORAGES]
)


def loop(weights, decay, every=1, debias=False, start=0):
    """The average after each step, from the weights before the first step and after each: one line for one line."""
    a, total, product, out = np.float64(weights[0]), 0.0, 1.0, []
    for t, theta in enumerate(np.float64(weights[1:])):
        product *= decay(t) if callable(decay) else decay
        if t < start:
            a, total, product = theta, 0.0, 1.0
        elif (t + 1) % every == 0:
            if debias:
                a = (product * total * a + (1 - product) * theta) / (product * total + 1 - product)
                total = product * total + 1 - product
            else:
                a = product * a + (1 - product) * theta
            product = 1.0
        out.append(a)
    return np.array(out)


def follow(tx, params, signal, after=lambda p: p):
    """The weights and their averages before the first update and after each; `after` is what follows an update."""

    @own_jit
    def step(p, state, g):
        u, state = tx.update(g, state, p)
        p = after(optax.apply_updates(p, u))
        return p, state, mo.averaged_params(state, p)

    state, path, averages = tx.init(params), [params], []
    for g in signal:
        params, state, averaged = step(params, state, g)
        path.append(params)
        averages.append(averaged)
    assert step._cache_size() == 1
    return path, averages, state


CASES = {
    "constant": {"decay": 0.9},
    "every third step": {"decay": 0.9, "every": 3},
    "debiased": {"decay": 0.9, "debias": True},
    "debiased, every fourth, late": {"decay": 0.95, "debias": True, "every": 4, "start": 8},
    "late": {"decay": 0.9, "start": 7},
    "from within a period": {"decay": 0.9, "every": 4, "start": 6},
    "scheduled": {"decay": lambda t: 1 - 1 / (2.0 + t % 5), "every": 4},
    "of the later half": {"decay": lambda t: abs(t - 20) / (abs(t - 20) + 1.0), "start": 20},
}
QUICK = {"every third step", "debiased, every fourth, late", "scheduled"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_the_average_is_that_of_the_weights_after_each_step_whatever_is_done_to_them(name, x64):
    rng = np.random.default_rng(0)
    signal = jnp.asarray(rng.normal(size=(STEPS, 3)))
    # Weights that are clipped after the update: updates do not tell what they are.
    path, averages, _ = follow(
        optax.chain(optax.scale(-0.3), mo.average_params(**CASES[name])),
        jnp.asarray(rng.normal(size=3)),
        signal,
        lambda p: jnp.clip(p, -0.5, 0.5),
    )
    np.testing.assert_allclose(averages, loop(path, **CASES[name]), rtol=0, atol=1e-14)
    assert np.abs(np.array(averages[-1]) - np.array(path[-1])).max() > 0.01


def test_the_average_of_the_later_half_is_a_mean(x64):
    signal = jnp.asarray(np.random.default_rng(1).normal(size=(STEPS, 3)))
    path, averages, _ = follow(mo.average_params(**CASES["of the later half"]), jnp.zeros(3), signal)
    np.testing.assert_allclose(averages[-1], np.mean(path[21:], 0), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(averages[19], path[20])


@every_storage
def test_every_argument_acts(storage):
    base = {"decay": 0.5, "every": 2, "debias": False, "start": 0}
    others = ({}, {"decay": 0.6}, {"every": 4}, {"debias": True}, {"start": 4})
    txs = [mo.average_params(**{**base, **more}, storage=STORAGES[storage]()) for more in others]

    @jax.jit
    def run():
        p = jnp.ones((2, 600))
        states = [tx.init(p) for tx in txs]
        for seed in range(8):
            u = gradients(p, seed)
            states = [tx.update(u, state, p)[1] for tx, state in zip(txs, states, strict=True)]
            p = p + u
        return [mo.averaged_params(state, p) for state in states]

    assert len({np.asarray(x).tobytes() for x in run()}) == len(others)


def standing_still(storage):
    """Weights 1 in bfloat16 with updates far below their rounding: nearest they stand still, stochastically not."""

    def run(rounding):
        tx = mo.average_params(0.9, storage=storage)

        def step(carry, t):
            p, state, a = carry
            u, state = tx.update(jnp.full_like(p, 0.001), state, p)
            p = mo.apply_updates(p, u, rounding=rounding, step=t if rounding == "stochastic" else None)
            return (p, state, 0.9 * a + 0.1 * p.astype(jnp.float32)), None

        p = jnp.ones((4, 1024), jnp.bfloat16)
        (p, state, a), _ = jax.lax.scan(step, (p, tx.init(p), p.astype(jnp.float32)), jnp.arange(100))
        return p, mo.averaged_params(state, p.astype(jnp.float32)), a

    return jax.jit(lambda: (run("nearest"), run("stochastic")))()


@pytest.mark.parametrize(("storage", "bound"), [("float32", 2e-6), (STORAGES["int8"](), 0.005)])
def test_the_average_follows_weights_as_they_are_stored(storage, bound):
    (p, averaged, _), (q, moving, exact) = standing_still(storage)
    np.testing.assert_array_equal(p, 1)
    np.testing.assert_array_equal(averaged, 1)
    # Sums of updates: 1.1 in the mean.
    assert abs(float(q.astype(jnp.float32).mean()) - 1.1) < 0.001
    assert float(jnp.sqrt(jnp.mean((moving - exact) ** 2))) < bound


def errors_of_storages(decay, every, steps, storages):
    """The error of each storage over the norm of the exact average: 64 x 512 weights, decaying rate and noise."""
    rng = np.random.default_rng(0)
    target, p = (jnp.asarray(rng.normal(size=(64, 512)), jnp.float32) for _ in range(2))
    txs = [mo.average_params(decay, every=every, storage=s) for s in storages]

    def step(carry, t):
        p, states, a = carry
        rate = 0.05 * (1 + jnp.cos(jnp.pi * t / steps))
        u = -rate * (0.1 * (p - target) + jax.random.normal(jax.random.fold_in(jax.random.key(1), t), p.shape))
        states = [tx.update(u, s, p)[1] for tx, s in zip(txs, states, strict=True)]
        p = p + u
        return (p, states, a + (1 - decay) * (p - a)), None

    @jax.jit
    def run():
        carry, _ = jax.lax.scan(step, (p, [tx.init(p) for tx in txs], p), jnp.arange(steps))
        return [jnp.linalg.norm(mo.averaged_params(s, carry[0]) - carry[2]) for s in carry[1]], jnp.linalg.norm(
            carry[2]
        )

    errors, size = run()
    return [float(e / size) for e in errors]


@pytest.mark.slow
def test_stated_errors_of_a_short_average():
    two, one = errors_of_storages(0.99, 1, 300, ["bfloat16", "int8"])
    assert 0 < two < 0.002
    assert 0 < one < 0.04


@pytest.mark.slow
def test_stated_errors():
    full, two, one = errors_of_storages(0.999, 1, 4000, ["float32", "bfloat16", "int8"])
    assert full < 1e-4
    assert two < 0.002
    assert one < 0.02
    full, two, one = errors_of_storages(0.9999, 100, 20_000, ["float32", "bfloat16", "int8"])
    # The exact average is written at every step.
    assert full < 0.01
    assert two < 0.01
    assert one < 0.06


@pytest.mark.slow
@every_storage
def test_types_stay_and_replays_are_equal_in_any_dtype(storage):
    params = {
        "bf": jnp.ones((2, 600), jnp.bfloat16),
        "half": jnp.full((600,), 2.0, jnp.float16),
        "one": jnp.ones(()),
        "empty": jnp.zeros((0, 3)),
        "complex": jnp.ones((300,), jnp.complex64),
        "none": None,
    }
    tx = optax.chain(optax.scale(-0.1), mo.average_params(0.9, storage=STORAGES[storage](), every=2, debias=True))
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update, donate_argnums=1, keep_unused=True)
    begin, seen = avals(state), []
    signal = [gradients(params, seed) for seed in range(5)]
    signal[3]["half"] = None
    for _ in range(2):
        state, p = jax.jit(tx.init)(params), params
        for t, g in enumerate(signal):
            u, state = step(g, jax.tree.map(jnp.copy, state), p)
            p = mo.apply_updates(p, u)
            assert avals(state) == begin
            assert len(set(pointers(state))) == len(pointers(state))
            if t == 2:
                state = jax.tree.map(jnp.asarray, jax.device_get(state))
        seen.append((state, mo.averaged_params(state, p)))
    assert_bit_equal(*seen)
    averaged = seen[0][1]
    assert avals(averaged) == avals(params)
    assert step._cache_size() == 2
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), averaged))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("storage", "bytes_"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_bytes_of_the_state_and_of_the_compiled_step(storage, bytes_):
    params = {"w": jax.ShapeDtypeStruct((512, 2048), jnp.float32)}
    tx = mo.average_params(0.999, storage=storage, every=10)
    state = jax.eval_shape(tx.init, params)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # A unit for each row of 2048, and scalars.
    assert bytes_ * 512 * 2048 < held <= (bytes_ + 4 / 2048) * 512 * 2048 + 16
    assert mo.state_bytes(tx, params).total == held

    def step(p, s, u):
        u, s = tx.update(u, s, p)
        return optax.apply_updates(p, u), s

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert not re.search(r" (conditional|while)\(", program.as_text())
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= held + 4 * 512 * 2048
    # On CPU a copy of the weights that are overwritten, and of an average in codes.
    assert memory.temp_size_in_bytes < (4.1 if bytes_ == 4 else 8.1) * 512 * 2048


def test_skipped_steps_do_not_count_inside_guarded_and_multi_steps():
    tx = optax.chain(optax.scale(-1.0), mo.average_params(0.5))
    bad = jnp.array([jnp.nan, 1.0])
    signal = [jnp.array([1.0, 2.0]), bad, jnp.array([0.5, 0.5]), bad]
    for guard in (mo.guarded, lambda t: optax.apply_if_finite(t, 5)):
        path, averages, _ = follow(guard(tx), jnp.zeros(2), signal)
        taken = [path[0], path[1], path[3]]
        np.testing.assert_array_equal(averages[-1], loop(taken, 0.5)[-1])
        np.testing.assert_array_equal(averages[1], averages[0])
    signal = [jnp.full(2, float(t)) for t in range(1, 7)]
    path, averages, _ = follow(optax.MultiSteps(tx, 2), jnp.zeros(2), signal)
    np.testing.assert_allclose(averages[1::2], loop(path[::2], 0.5), rtol=1e-6)
    # Outside, every call counts.
    path, averages, _ = follow(
        optax.chain(optax.MultiSteps(optax.sgd(1.0), 2), mo.average_params(0.5)), jnp.zeros(2), signal
    )
    np.testing.assert_allclose(averages, loop(path, 0.5), rtol=1e-6)


def test_masks_and_partitions_have_an_average_for_each_parameter_or_none():
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2)), "d": jnp.ones(1)}}
    signal = [gradients(params, seed) for seed in range(4)]
    masked = optax.masked(mo.average_params(0.5), {"a": True, "b": False})
    path, averages, _ = follow(masked, params, signal)
    np.testing.assert_allclose(averages[-1]["a"], loop([p["a"] for p in path], 0.5)[-1], rtol=1e-6)
    assert_bit_equal(averages[-1]["b"], path[-1]["b"])
    parts = {"x": mo.average_params(0.5), "y": mo.average_params(0.9)}
    path, averages, state = follow(optax.partition(parts, {"a": "x", "b": "y"}), params, signal)
    for decay, get in ((0.5, lambda p: p["a"]), (0.9, lambda p: p["b"]["c"])):
        np.testing.assert_allclose(get(averages[-1]), loop([get(p) for p in path], decay)[-1], rtol=1e-6)

    tx = optax.chain(mo.average_params(0.5), mo.average_params(0.9, storage="int8"))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"one average of params\['a'\], got two: give the part"):
        mo.averaged_params(state, params)
    assert_bit_equal(mo.averaged_params(state[1], params), params)


def test_wrong_uses_are_refused_and_useless_ones_warned_of():
    params, other = {"w": jnp.ones(3)}, {"v": jnp.ones(3)}
    average, tx = mo.average_params, mo.average_params(0.9)
    state = tx.init(params)
    refused = [
        (ValueError, r"decay must be in \[0, 1\], got 1.5", lambda: average(1.5)),
        (ValueError, r"every must be at least 1", lambda: average(0.9, every=0)),
        (ValueError, r"start must be at least 0", lambda: average(0.9, start=-1)),
        (TypeError, r"debias must be True or False", lambda: average(0.9, debias=1)),
        (ValueError, r"'int8' for averages of weights, got Int4", lambda: average(0.9, storage="int4")),
        (ValueError, r"the same for all leaves.*mo.by_path", lambda: average(0.9, storage={".*": "int8"})),
        (ValueError, r"to nearest stalls", lambda: average(0.9, storage=mo.storage.bfloat16("nearest"))),
        (TypeError, r"params\['n'\] must have a dtype", lambda: tx.init({"n": jnp.arange(3)})),
        (ValueError, r"params must be given", lambda: tx.update(params, state)),
        (ValueError, r"got params\['v'\] of shape \(3,\) for None", lambda: tx.update(other, state, other)),
        (ValueError, r"got other containers", lambda: tx.update(params, state, collections.OrderedDict(params))),
        (ValueError, r"lack params\['w'\]", lambda: tx.update(other, state, params)),
        (
            ValueError,
            r"params\['w'\] of shape \(3,\), .* got no such leaf",
            lambda: mo.averaged_params(state, {"x": params}),
        ),
        (
            ValueError,
            r"params\['w'\] of shape \(3,\), .* got shape \(2, 3\)",
            lambda: mo.averaged_params(state, {"w": jnp.ones((2, 3))}),
        ),
        (ValueError, r"state must be an AverageState", lambda: tx.update(params, optax.EmptyState(), params)),
        (ValueError, r"hold a state of average_params", lambda: mo.averaged_params(optax.EmptyState(), params)),
        (TypeError, r"opt_state must be an optimizer's state", lambda: mo.averaged_params(tx, params)),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=message):
            call()
    with pytest.warns(UserWarning, match=r"write it less often, every=100"):
        average(1 - 1e-7)
    average(1 - 1e-7, every=100)


def test_injected_scheduled_and_batched_decays_run_in_one_program():
    params, signal = jnp.ones(3), jnp.stack([gradients(jnp.zeros(3), seed) for seed in range(4)])

    def run(decay):
        tx = mo.average_params(decay)

        def step(carry, g):
            u, state = tx.update(g, carry[1], carry[0])
            return (carry[0] + u, state), None

        (p, state), _ = jax.lax.scan(step, (params, tx.init(params)), signal)
        return mo.averaged_params(state, p)

    path = np.vstack([params, params + np.cumsum(signal, 0)])
    batched = jax.jit(jax.vmap(run))(jnp.array([0.5, 0.9]))
    np.testing.assert_allclose(batched, [loop(path, d)[-1] for d in (0.5, 0.9)], rtol=1e-5)
    tx = optax.inject_hyperparams(mo.average_params)(0.9)
    _, averages, state = follow(tx, params, signal)
    np.testing.assert_allclose(averages[-1], loop(path, 0.9)[-1], rtol=1e-5)
    assert optax.tree.get(state, "step") == 4


def test_slopes_pass_through_the_average_and_are_refused_through_codes():
    def after_two(p, storage):
        tx = mo.average_params(0.5, storage=storage)
        state = tx.init(p)
        for _ in range(2):
            _, state = tx.update(p, state, p)
            p = 3 * p
        return mo.averaged_params(state, p).sum()

    slope = jax.grad(after_two)(jnp.ones(600), "float32")
    # (1/4) 1 + (1/4) 3 + (1/2) 9 of the weights before the first step.
    np.testing.assert_allclose(slope, np.full(600, 5.5), rtol=1e-6)
    with pytest.raises(TypeError, match="no slope through a state in int8"):
        jax.grad(after_two)(jnp.ones(600), STORAGES["int8"]())


def test_the_state_is_an_optax_state_like_any_other():
    params = {"w": jnp.ones((2, 600))}
    tx = mo.average_params(0.9, storage="bfloat16")
    state = tx.init(params)
    assert isinstance(state, AverageState)
    assert optax.tree.get(state, "codes")["w"].dtype == jnp.int16
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state, transform_non_params=lambda x: x)
    assert mapped.codes["w"][0, 0] == 1
    assert mapped.unit["w"].shape == (2, 1)
    mo.checkpoint.check(mo.checkpoint.describe(state), state)


def test_an_average_is_not_converted_to_another_storage():
    params = {"w": jnp.ones((2, 600))}

    def build(storage, average):
        return optax.chain(mo.sgd(0.1, 0.9, storage=storage), mo.average_params(0.9, storage=average))

    state = build("float32", "bfloat16").init(params)
    converted = mo.convert(state, "bfloat16", like=build("bfloat16", "bfloat16").init(params))
    assert_bit_equal(converted[1], state[1])
    with pytest.raises(ValueError, match=r"averages of weights in the same storage"):
        mo.convert(state, "bfloat16", like=build("bfloat16", STORAGES["int8"]()).init(params))
