"""`optax.inject_hyperparams` around every finished optimizer and every dialect, without `static_args`.

Optax makes an array of every number, also of defaults, and a schedule of every function; what is None, a bool, a word,
a tuple or a rule stays as it came.
"""

import dataclasses
import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import avals, finished_optimizers
from dialects import CALLS
from precision import enable_x64

import momentum_optax as mo
from momentum_optax.interop.dialect import DIALECTS as DIALECT_RECORDS

FINISHED = finished_optimizers()
DIALECTS = {
    f"interop.{name}": f for name, f in vars(mo.interop).items() if "storage" in getattr(f, "__annotations__", ())
}
FACTORIES = FINISHED | DIALECTS


@dataclasses.dataclass
class Row:
    """An optimizer with a number for each argument that Optax injects.

    `required` are numbers of arguments without a default; `static` are arguments that Optax leaves alone; `constant`
    are numbers for which the optimizer itself takes no schedule, or counts other steps.
    """

    numbers: dict[str, Any]
    required: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()


DECAY = {"weight_decay": 0.02}
MUON = (
    *("weight_dimension_numbers", "steps", "coefficients", "preconditioning", "scale", "mask", "others", "dtype"),
    *("mesh", "specs"),
)
ROWS = {
    "sgd": Row(
        {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.3, **DECAY},
        ("learning_rate",),
        ("nesterov", "accumulator_dtype", "mask", "maximize"),
    ),
    "lion": Row({"learning_rate": 0.1, "b1": 0.8, "b2": 0.7, **DECAY}, ("learning_rate",), ("mu_dtype", "mask")),
    "signum": Row({"learning_rate": 0.1, "beta": 0.8, **DECAY}, ("learning_rate",), ("accumulator_dtype", "mask")),
    "muon": Row(
        {"learning_rate": 0.1, "momentum": 0.8, "eps": 0.1, "consistent_rms": 0.3, **DECAY},
        ("learning_rate",),
        (*MUON, "adaptive"),
        constant=("eps", "consistent_rms"),
    ),
    "normuon": Row(
        {"learning_rate": 0.1, "momentum": 0.8, "b2": 0.9, "eps": 0.1, "consistent_rms": 0.3, **DECAY},
        ("learning_rate",),
        MUON,
        constant=("b2", "eps", "consistent_rms"),
    ),
    "normalized_sgd": Row({"learning_rate": 0.1, "momentum": 0.8}, ("learning_rate",), ("scope",)),
    "srsgd": Row({"learning_rate": 0.1, "restarts": 2}, ("learning_rate", "restarts"), constant=("restarts",)),
    "relativistic": Row({"learning_rate": 0.1, "decay": 0.8, "delta": 2.0}, ("learning_rate",), constant=("delta",)),
    "yellowfin": Row({"learning_rate": 0.5, "decay": 0.9}, static=("window",)),
    "storm": Row({"c": 30.0, "k": 0.2, "w": 0.3}, ("c",), constant=("c", "k", "w")),
    "mars_adamw": Row(
        {"learning_rate": 0.1, "decay": 0.8, "b2": 0.9, "gamma": 0.1, "eps": 1e-3, **DECAY},
        ("learning_rate",),
        ("scope", "mask"),
        constant=("decay", "b2", "eps"),
    ),
    "mars_lion": Row(
        {"learning_rate": 0.1, "decay": 0.8, "gamma": 0.1, **DECAY}, ("learning_rate",), ("scope", "mask")
    ),
}


def dialect_row(name):
    """The row of a dialect, from its call in `dialects.py`."""
    describe = DIALECT_RECORDS[name].describe
    arguments, changed = CALLS[name]
    parameters = inspect.signature(describe).parameters
    numbers = {key: value for key, value in (changed | arguments).items() if isinstance(value, float)}
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    static = [key for key in parameters if key not in numbers and key != "storage"]
    return Row(
        numbers, tuple(required), tuple(static), tuple(key for key in numbers if is_constant(describe, numbers, key))
    )


def is_constant(describe, numbers, key):
    """Whether a dialect takes no schedule for one of its numbers."""
    try:
        describe(**numbers | {key: lambda t: numbers[key]})
    except (TypeError, ValueError):
        return True
    return False


ROWS |= {f"interop.{name}": dialect_row(name) for name in DIALECT_RECORDS}
RULES = tuple(name for name, f in FACTORIES.items() if "Filter" in str(f.__annotations__.get("momentum")))
STEPS = 4
# Rows whose steps at defaults and under schedules are fast tests; the others are slow ones.
FAST = {"sgd", "srsgd", "relativistic", "interop.torch_sgd", "interop.keras_sgd", "interop.qhoptim_qhm"}
# NorMuon is Muon with one more part.
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "normuon" else name for name in ROWS]
)
thinned = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)


BIG = {"w": jnp.linspace(1.0, 2.0, 48).reshape(6, 8)}


def signal(dtype=jnp.float64, steps=STEPS):
    """Parameters and gradients: a matrix, which every optimizer takes."""
    rng = np.random.default_rng(5)
    params, *gradients = [{"w": jnp.asarray(rng.normal(size=(6, 8)), dtype)} for _ in range(steps + 1)]
    return params, gradients


def second(name, gradient):
    """The second gradient that some optimizers ask for."""
    takes = name in ("storm", "mars_adamw", "mars_lion")
    return {"previous_gradient": jax.tree.map(lambda g: jnp.roll(g, 1), gradient)} if takes else {}


def run(name, tx, params, gradients, *, state=None, step=None):
    """Updates of a compiled `init` and `update`, and the last state."""
    state = jax.jit(tx.init)(params if params is not None else gradients[0]) if state is None else state
    step, begin, out = step or jax.jit(tx.update), avals(state), []
    for g in gradients:
        u, state = step(g, state, params, **second(name, g))
        assert avals(state) == begin
        out.append(u["w"])
    assert step._cache_size() == 1
    return np.array(out), state


def own_steps(tx, params, gradients, name):
    """The updates of an optimizer that is not injected.

    Mostly operation by operation: the rows share what that compiles.
    """
    state, out = tx.init(params if params is not None else gradients[0]), []
    step = jax.jit(tx.update) if name in ("muon", "normuon", "yellowfin") else tx.update
    for g in gradients:
        u, state = step(g, state, params, **second(name, g))
        out.append(u["w"])
    return np.array(out)


def assert_same(ours, theirs, name):
    """Equal signs and steps in float64, up to roundings that differ where a coefficient is traced.

    Some thousand operations round to 2^-53; Newton and Schulz multiply by up to 3.4445 in each of five iterations.
    """
    scale = 3.4445**5 if "muon" in name else 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e3 * scale * 2**-53 * abs(theirs).max())


def injected(name, static_args=(), **arguments):
    return optax.inject_hyperparams(FACTORIES[name], static_args=static_args)(**arguments)


def test_every_public_optimizer_and_dialect_has_a_row_with_all_its_arguments():
    assert set(ROWS) == set(FACTORIES)
    assert {f"interop.{name}" for name in DIALECT_RECORDS} == set(DIALECTS)
    for name, row in ROWS.items():
        arguments = set(inspect.signature(FACTORIES[name]).parameters) - {"storage"}
        assert {*row.numbers, *row.static} == arguments, name
    assert set(RULES) == {"sgd", "muon", "normuon", "normalized_sgd"}


@every
def test_defaults_are_traced_and_need_no_parameters(name):
    tx = injected(name, **{key: ROWS[name].numbers[key] for key in ROWS[name].required})
    state = jax.eval_shape(tx.init, BIG)
    # Lion is the one that decays by default.
    updates, after = jax.eval_shape(tx.update, BIG, state, BIG if name == "lion" else None, **second(name, BIG))
    assert avals(updates) == avals(BIG)
    assert avals(after) == avals(state)


@pytest.mark.one_in(8)
@thinned
def test_the_steps_at_injected_defaults_are_those_at_defaults(name, x64):
    required = {key: ROWS[name].numbers[key] for key in ROWS[name].required}
    params, gradients = signal()
    params = params if name == "lion" else None
    ours, state = run(name, injected(name, **required), params, gradients)
    theirs = own_steps(FACTORIES[name](**required), params, gradients, name)
    assert_same(ours, theirs, name)
    assert set(state.hyperparams) <= set(ROWS[name].numbers)


@pytest.mark.one_in(12)
@every
def test_numbers_are_injected_and_act_when_they_change(name, x64):
    numbers = ROWS[name].numbers
    params, gradients = signal()
    tx = injected(name, **numbers)
    step = jax.jit(tx.update)
    ours, state = run(name, tx, params, gradients, step=step)
    theirs = own_steps(FACTORIES[name](**numbers), params, gradients, name)
    assert_same(ours, theirs, name)
    assert set(state.hyperparams) == set(numbers)
    same, _ = run(name, tx, params, gradients, state=state, step=step)
    for key, value in numbers.items():
        new = jnp.asarray(value + 1 if isinstance(value, int) else np.float64(value / 2))
        changed = state._replace(hyperparams={**state.hyperparams, key: new})
        other, _ = run(name, tx, params, gradients, state=changed, step=step)
        assert abs(other - same).max() > 1e-6 * abs(same).max(), key


@pytest.mark.one_in(2)
@thinned
def test_schedules_are_injected_as_the_optimizer_itself_takes_them(name, x64):
    row = ROWS[name]
    params, gradients = signal()
    taken = {
        key: (lambda t, x=value: x) if key in row.constant else (lambda t, x=value: x * (1 - 0.05 * t))
        for key, value in row.numbers.items()
    }
    ours, state = run(name, injected(name, **taken), params, gradients)
    own = {key: row.numbers[key] if key in row.constant else schedule for key, schedule in taken.items()}
    theirs = own_steps(FACTORIES[name](**own), params, gradients, name)
    assert_same(ours, theirs, name)
    assert set(state.hyperparams) == set(row.numbers)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_as_momentum_stays_a_rule(name, x64):
    _, gradients = signal()
    rule = mo.nesterov(mo.schedules.nesterov_convex())
    ours, state = run(name, injected(name, learning_rate=0.1, momentum=rule), None, gradients)
    theirs = own_steps(FACTORIES[name](0.1, rule), None, gradients, name)
    assert_same(ours, theirs, name)
    assert set(state.hyperparams) - {"b2"} == {"learning_rate"}


@pytest.mark.one_in(2)
@every
def test_hyperparameters_of_a_wider_type_change_no_type(name):
    def check(params, dtype):
        tx = optax.inject_hyperparams(FACTORIES[name], hyperparam_dtype=dtype)(**ROWS[name].numbers)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params, **second(name, params))
        assert avals(updates) == avals(params)
        assert avals(after) == avals(state)
        assert {x.dtype for x in jax.tree.leaves(state.hyperparams) if x.dtype.kind == "f"} == {jnp.dtype(dtype)}

    check({"w": jnp.ones((4, 8), jnp.bfloat16)}, jnp.float32)
    with enable_x64(True):
        check({"w": jnp.ones((4, 8), jnp.float32)}, jnp.float64)


def test_restarts_may_be_the_steps_themselves(x64):
    params, gradients = signal(steps=7)
    theirs = own_steps(mo.srsgd(0.1, (2, 5)), params, gradients, "srsgd")
    for restarts in ((2, 5), jnp.array([2, 5]), np.array([2, 5])):
        ours, _ = run("srsgd", injected("srsgd", learning_rate=0.1, restarts=restarts), params, gradients)
        assert_same(ours, theirs, "srsgd")


MASKED = tuple(name for name, f in FACTORIES.items() if "mask" in inspect.signature(f).parameters)
# Arguments that cannot be arrays: the argument, and a value that Optax would make one of.
STATIC = [
    ("muon", "steps", 3),
    ("muon", "dtype", jnp.bfloat16),
    ("yellowfin", "window", 3),
    ("sgd", "accumulator_dtype", jnp.bfloat16),
    ("lion", "mu_dtype", jnp.bfloat16),
    ("signum", "accumulator_dtype", jnp.bfloat16),
    *((name, "mask", lambda params: jax.tree.map(lambda p: p.ndim > 2, params)) for name in MASKED),
]


@pytest.mark.parametrize(("name", "argument", "value"), STATIC, ids=[f"{name}-{key}" for name, key, _ in STATIC])
def test_what_must_be_static_says_so_and_works_as_static_argument(name, argument, value):
    numbers = ROWS[name].numbers
    for init in (lambda tx: tx.init(BIG), lambda tx: jax.jit(tx.init)(BIG)):
        with pytest.raises(TypeError, match=rf"^{argument} must be .*static_args='{argument}'") as error:
            init(injected(name, **numbers, **{argument: value}))
        assert len(str(error.value)) < 300
    tx = injected(name, static_args=argument, **numbers, **{argument: value})
    own = FACTORIES[name](**numbers, **{argument: value})
    assert avals(jax.eval_shape(tx.init, BIG).inner_state) == avals(jax.eval_shape(own.init, BIG))


def test_a_static_number_of_iterations_is_the_one_that_runs(x64):
    params, gradients = signal(steps=1)
    ours, _ = run("muon", injected("muon", "steps", learning_rate=0.1, steps=2), params, gradients)
    theirs = own_steps(mo.muon(0.1, steps=2), params, gradients, "muon")
    assert_same(ours, theirs, "muon")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "weight_decay" in row.numbers])
def test_a_weight_decay_that_was_given_is_never_dropped(name):
    numbers = ROWS[name].numbers
    for tx in (FACTORIES[name](**numbers), injected(name, **numbers)):
        with pytest.raises(ValueError, match=r"weight_decay needs the parameters: update\(gradients, state, params\)"):
            tx.update(BIG, tx.init(BIG), **second(name, BIG))


# Transformations and wrappers with numbers, each with those that Optax injects.
PARTS = {
    "contrib.scale_by_storm": ({"a": 0.5}, {"a"}),
    "contrib.scale_by_adaptive_storm": ({"c": 1.0}, {"c", "k", "w"}),
    "contrib.mars_correction": ({"decay": 0.9}, {"decay", "gamma"}),
    "contrib.saturate": ({"delta": 1.0}, {"delta"}),
    "orthogonalize": ({}, set()),
    "contrib.scale_by_yellowfin": ({}, {"decay"}),
    "scheduled_restart": ({"tx": mo.sgd(0.1, 0.9), "at": 3}, {"at"}),
    "accumulated": ({"rule": mo.ema(0.9), "every_k": 3, "inner": optax.scale(-1.0)}, {"every_k"}),
    "monitor": ({"tx": mo.sgd(0.1, 0.9), "rule": mo.heavy_ball(0.9)}, "every"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_injected_too_or_name_what_must_be_static(name):
    arguments, expected = PARTS[name]
    make = operator.attrgetter(name)(mo)
    tx = optax.inject_hyperparams(make)(**arguments)
    if isinstance(expected, str):
        with pytest.raises(TypeError, match=f"{expected} must be .*static_args='{expected}'"):
            jax.eval_shape(tx.init, BIG)
        tx = optax.inject_hyperparams(make, static_args=expected)(**arguments)
        expected = set()
    state = jax.eval_shape(tx.init, BIG)
    assert set(state.hyperparams) == expected
    extra = {"previous_gradient": BIG} if "storm" in name or "mars" in name else {}
    updates, after = jax.eval_shape(tx.update, BIG, state, BIG, **extra)
    assert avals(updates) == avals(BIG)
    assert avals(after) == avals(state)
