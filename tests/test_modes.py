"""JAX's modes: every finished optimizer, rule, wrapper and storage in each of them, with the numbers of none."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import NOT_DEBIASABLE, RULES, STORAGES, assert_bit_equal, gradients
from finished import OPTIMIZERS, without_a_row
from precision import enable_x64
from schedule_cases import CASES
from wrapped import WRAPPERS

import momentum_optax as mo

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What fails in one dtype mostly fails in bfloat16, whose arithmetic is float32's.
every_dtype = pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])

STORED = {
    **{f"sgd in {s}": lambda s=s: mo.sgd(0.1, 0.9, storage=STORAGES[s]()) for s in STORAGES},
    **{f"aggregated in {s}": lambda s=s: mo.sgd(0.1, mo.aggregated(), storage=STORAGES[s]()) for s in STORAGES},
    "sgd in nearest bfloat16": lambda: mo.sgd(0.1, 0.9, storage=mo.storage.bfloat16("nearest")),
    **{
        f"compress in {s}": lambda s=s: mo.compress(optax.sgd(0.1, momentum=0.9), {"trace"}, STORAGES[s]())
        for s in STORAGES
    },
    **{
        f"average of weights in {s}": lambda s=s: optax.chain(
            mo.sgd(0.1, 0.9), mo.average_params(0.9, storage=STORAGES[s](), every=2, debias=True)
        )
        for s in ("float32", "int8")
    },
    "compress in uint8": lambda: mo.compress(optax.rmsprop(0.1), {"nu"}, mo.storage.uint8(min_size=1)),
}
DECAYED = {
    agreement: lambda a=agreement: mo.add_cautious_weight_decay(optax.linear_schedule(0.1, 0.01, 9), a)
    for agreement in ("product", "sign_bit")
}


def wrapped(name):
    row = WRAPPERS[name]
    rule = RULES["heavy_ball" if "heavy_ball" in row.rules else row.rules[0]]()
    looking_ahead = RULES["triple_momentum"]() if "triple_momentum" in row.rules else rule
    return {
        f"{name}, {s}": lambda r=r, s=s: row.build(r, STORAGES[s]())
        for s, r in (("float32", looking_ahead), ("int8", rule))
    }


EVERYTHING = {
    **{name: build for name, build in OPTIMIZERS.items()},
    **STORED,
    **{f"cautious decay, {name}": build for name, build in DECAYED.items()},
    **{
        f"rule {name}": lambda n=name: mo.scale_by_momentum(RULES[n](), debias=n not in NOT_DEBIASABLE)
        for name in RULES
    },
    **{
        f"schedule {name}": lambda n=name: mo.sgd(0.1, mo.nesterov(getattr(mo.schedules, n)(*CASES[n][0])))
        for name in CASES
    },
    **{k: v for name in WRAPPERS for k, v in wrapped(name).items()},
}


@contextlib.contextmanager
def option(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def strictest():
    """Every mode that only refuses programs: what passes here passes in each of them."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.checking_leaks(),
        option("jax_enable_checks", True),
    ):
        yield


def params_of(dtype):
    return gradients({"w": jax.ShapeDtypeStruct((4, 8), DTYPES.get(dtype, dtype))})


def steps(tx, params):
    """The updates and the state after two steps from `init`, the second gradient being None for nothing."""
    tx = optax.with_extra_args_support(tx)
    state, updates = tx.init(params), []
    for value in (2.0, 3.0):
        extra = {"value": jnp.full([], value), "previous_gradient": params}
        u, state = tx.update(params, state, params, **extra)
        updates.append(u)
    return updates, state


def program(tx, params):
    """The text of the steps' program. Compiled functions within it, whose names differ, are put in their place."""
    with jax.disable_jit():
        return str(jax.make_jaxpr(lambda p: steps(tx, p))(params))


def test_every_finished_optimizer_has_a_row():
    assert not without_a_row()


@pytest.mark.one_in(16)
@every_dtype
@pytest.mark.parametrize("name", EVERYTHING)
def test_the_modes_that_refuse_programs_take_this_one_and_change_nothing(name, dtype):
    params, build = params_of(dtype), EVERYTHING[name]
    with strictest():
        strict = program(build(), params)
    assert strict == program(build(), params)


# Programs that compile in a moment, and everything.
FEW = ("sgd, every option", "yellowfin", "storm", "muon", "sgd in int8", "sgd in bfloat16", "compress in uint8")


def check_compiled(names, dtype):
    txs, params = {name: EVERYTHING[name]() for name in names}, params_of(dtype)
    run = jax.jit(lambda p: {name: steps(tx, p) for name, tx in txs.items()})
    expected = run(params)
    with jax.transfer_guard("disallow"):
        guarded = run(params)
    assert_bit_equal(guarded, expected)
    with jax.debug_nans(True):
        assert_bit_equal(run(params), expected)


def test_no_nan_arises_and_nothing_is_transferred_in_a_compiled_step():
    check_compiled(FEW, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_nan_arises_and_nothing_is_transferred_in_any_compiled_step(dtype):
    check_compiled({**OPTIMIZERS, **STORED}, dtype)


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("name", EVERYTHING)
def test_no_nan_arises_within_a_step_that_is_not_compiled(name, dtype):
    params, build = params_of(dtype), EVERYTHING[name]
    with jax.disable_jit(), jax.debug_nans(True):
        plain = steps(build(), params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jax.jit(lambda p: steps(build(), p))(params)), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # Codes may fall to either side of a rounding. From code 110 on that is up to 2/87 of a level, and the room of a
        # row that grows goes with the square of one.
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, rtol=2 * 2 / 87 + 4e-3, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_no_nan_arises_within_a_storage_from_zeros_and_from_the_largest_and_least_floats(storage):
    hard = jnp.linspace(-1, 1, 64).reshape(4, 16).at[:, ::3].set(0).at[0].set(0)
    hard = hard.at[1, 1].set(1e30).at[2, 2].set(1e-40).at[2, 4].set(3e38)
    tx = mo.scale_by_momentum(mo.heavy_ball(0.5), storage=STORAGES[storage]())
    state = tx.init(hard)
    with jax.disable_jit(), jax.debug_nans(True):
        for g in (hard, hard):
            _, state = tx.update(g / 2, state)
    assert np.isfinite(mo.velocity(state)[0]).all()


def types(tx, params):
    return [(x.dtype, x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda p: steps(tx, p), params))]


@pytest.mark.one_in(4)
@every_dtype
@pytest.mark.parametrize("name", {**OPTIMIZERS, **STORED})
def test_64_bits_change_no_type(name, dtype, x64):
    params, build = params_of(dtype), EVERYTHING[name]
    wide = types(build(), params)
    with enable_x64(False):
        assert wide == types(build(), params)


STATES = {
    "velocity": lambda tx, s, p: mo.velocity(s),
    "convert": lambda tx, s, p: [
        mo.convert(s, "float32"),
        mo.convert(s, "bfloat16"),
        mo.convert(s, mo.storage.int8(min_size=1)),
    ],
    "rescale": lambda tx, s, p: mo.rescale(s, 0.3),
    "reset": lambda tx, s, p: [mo.reset(s, tx.init(p)), mo.reset(s, tx.init(p), lambda path: path == "w")],
    "eval_params": lambda tx, s, p: [mo.eval_params(s, p, rate) for rate in (0.1, jnp.float32(0.1))],
}


@pytest.mark.one_in(8)
@every_dtype
@pytest.mark.parametrize(
    "storage", ["float32", "int8", *(pytest.param(s, marks=pytest.mark.slow) for s in ("bfloat16", "int4"))]
)
@pytest.mark.parametrize("name", STATES)
def test_states_are_read_and_edited_in_the_strictest_modes(name, storage, dtype):
    params = params_of(dtype)
    tx = mo.sgd(0.1, mo.nesterov(0.9), storage=STORAGES[storage]())

    def run(p):
        return STATES[name](tx, tx.update(p, tx.init(p), p)[1], p)

    with strictest(), jax.disable_jit():
        strict = str(jax.make_jaxpr(run)(params))
    with jax.disable_jit():
        assert strict == str(jax.make_jaxpr(run)(params))


OUTER = {
    "diloco": lambda: mo.outer.diloco(storage="int8"),
    "diloco, int8 exchange": lambda: mo.outer.diloco(exchange="int8"),
    "bmuf": lambda: mo.outer.bmuf(2),
    "slowmo": mo.outer.slowmo,
}


@every_dtype
@pytest.mark.parametrize("name", OUTER)
def test_workers_meet_in_the_strictest_modes(name, dtype):
    kind = OUTER[name]()
    params = jax.tree.map(lambda x: jnp.stack([x, x]), params_of(dtype))

    def meet(p):
        extra = {"inner_learning_rate": jnp.float32(0.1)} if name == "slowmo" else {}
        _, state = kind.sync(p, kind.init(p), axis_name="workers", **extra)
        return kind.pull(p, state, retain=jnp.float32(0.5))

    def run(p):
        return jax.vmap(meet, axis_name="workers")(p)

    with strictest(), jax.disable_jit():
        strict = str(jax.make_jaxpr(run)(params))
    with jax.disable_jit():
        assert strict == str(jax.make_jaxpr(run)(params))


@every_dtype
def test_tables_of_rows_work_in_the_strictest_modes(dtype):
    table = params_of(dtype)["w"]
    sparse = mo.row_sparse(mo.nesterov(0.9), optax.linear_schedule(0.1, 0.01, 9))
    rows, mask = jnp.array([1, 3]), jnp.array([True, False, True, False])

    def run(table):
        state = sparse.init(table)
        table, state = sparse.update(table, state, table[:2], rows)
        table, state = sparse.update(table, state, table, mask=mask, size=2)
        return sparse.read(table, state, rows), sparse.flush(table, state)

    with strictest():
        strict = str(jax.make_jaxpr(run)(table))
    assert len(strict) > 1000
