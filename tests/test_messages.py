"""Errors for a wrong kind of value: argument, allowed set, value got and the way out, in few characters.

The tables are made from the signatures of the public functions: a new one is tested without a new row.
"""

import copy
import inspect
import pathlib
import pickle
import re
import sys
import tomllib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import avals

import momentum_optax as mo
from momentum_optax import _checks

LONGEST = 300
PARAMS = {"w": jnp.zeros((4, 8)), "b": jnp.zeros(8)}
TX = mo.sgd(0.1, 0.9)
STATE = TX.init(PARAMS)
HUGE = {f"layer_{i}": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)} for i in range(40)}
MESH = jax.make_mesh((1,), ("data",))
WHOLE = jax.NamedSharding(MESH, jax.sharding.PartitionSpec())

# A good value for each argument that must be given; those that a function wants otherwise stand under its name.
GOOD = {
    "rule": mo.heavy_ball(0.9), "f": mo.ema(0.9), "g": mo.ema(0.9), "old": mo.ema(0.9), "new": mo.ema(0.5), "tx": TX,
    "opt_state": STATE, "learning_rate": 0.1, "lr": 0.1, "base_lr": 0.1, "momentum": 0.9, "decay": 0.9, "L": 10.0,
    "mu": 1.0, "beta": 0.5, "nu": 0.5, "c": 1.0, "a": 0.5, "angle": 0.1, "at": 3, "weight_decay": 0.1, "every_k": 2,
    "agreement": "product", "scaling": "mean", "select": {"trace"}, "storage": "int8", "factor": 2.0, "fresh": STATE,
    "params": PARAMS, "updates": PARAMS, "mesh": MESH, "axis": "data", "shardings": dict.fromkeys(PARAMS, WHOLE),
    "restarts": 5, "low": 0.5, "high": 0.9, "period": 4, "total_steps": 9, "start": 1.0, "end": 5.0, "steps": 5,
    "value": 0.9, "schedule": optax.constant_schedule(0.9), "curvature": 1.0, "n": 5, "omega": 1.0, "rate": 0.9,
    "gain": 0.5, "values": np.ones(9), "points": np.ones((9, 2)), "workers": 2,
    "optax_state": optax.trace(0.9).init(PARAMS),
    "names": {"w": "w", "b": "b"}, "state_dict": {"state": {}, "param_groups": []}, "variables": {}, "into": STATE,
    "source": mo.ema(0.9),
    "target": mo.ema(0.9), "proportional": 1.0, "integral": 0.1, "derivative": 0.1, "nu_x": 0.5, "delta": 1.0,
    "lookahead": 1.0, "betas": (0.9, 0.99), "loss": lambda p, b: jnp.sum(p["w"] ** 2), "state": STATE,
    "decays": (0.5, 0.9),
}  # fmt: skip
GOOD_OF = {
    "momentum_correction": {"learning_rate": optax.constant_schedule(0.1)},
}


def public():
    """The public functions, each once."""
    modules = (
        mo,
        mo.contrib,
        mo.schedules,
        mo.storage,
        mo.analysis,
        mo.tuning,
        mo.interop,
        mo.sharding,
        mo.outer,
        mo.checkpoint,
    )
    found = {}
    for module in modules:
        for name, thing in vars(module).items():
            if inspect.isfunction(thing) and not name.startswith("_") and thing.__module__.startswith("momentum_optax"):
                defined = module is mo or thing.__module__.startswith(module.__name__)
                if defined and thing.__module__ != "momentum_optax._checks":
                    found.setdefault(thing, f"{module.__name__}.{name}".removeprefix("momentum_optax."))
    return found


RULES = ("rule", "f", "g", "old", "new")
TRANSFORMATIONS = ("tx", "inner")
# What must be the whole of a coefficient; counts and the like have no schedules.
COEFFICIENTS = (
    "learning_rate",
    "lr",
    "momentum",
    "decay",
    "weight_decay",
    "b1",
    "b2",
    "dampening",
    "beta",
    "nu",
    "alpha",
)
# Values are made when a test runs: `call it` is said of functions and classes that make what is wanted.
WRONG = {
    RULES: {
        "a rule not called": (lambda: mo.nesterov, "call it, nesterov(...)"),
        "the class": (lambda: mo.Filter, "call it, Filter(...)"),
        "a transformation": (lambda: TX, "a transformation"),
        "a state": (lambda: mo.sgd(0.1, 0.9).init(HUGE), "MomentumState(...)"),
        "a tree": (lambda: HUGE, "layer_0"),
        "a number": (lambda: 0.9, "0.9"),
    },
    TRANSFORMATIONS: {
        "an optimizer not called": (lambda: mo.sgd, "call it, sgd(...)"),
        "one of Optax": (lambda: optax.adam, "call it, adam(...)"),
        "a rule": (lambda: mo.aggregated((0.0, 0.9, 0.99, 0.999)), "scale_by_momentum(rule)"),
        "a state": (lambda: mo.sgd(0.1, 0.9).init(HUGE), "MomentumState(...)"),
        "a tree": (lambda: HUGE, "layer_0"),
        "a number": (lambda: 0.9, "0.9"),
    },
    ("opt_state",): {
        "a transformation": (lambda: TX, "a transformation"),
        "an optimizer not called": (lambda: mo.sgd, "call it, sgd(...)"),
        "a rule": (lambda: mo.ema(0.9), "Filter("),
        "a class": (lambda: mo.transform.MomentumState, "MomentumState"),
        "a number": (lambda: 0.9, "0.9"),
    },
    ("storage",): {
        "a storage not called": (lambda: mo.storage.int8, "call it, int8(...)"),
        "a dtype": (lambda: jnp.int8, "int8"),
        "a tree": (lambda: [HUGE], "layer_0"),
        "another name": (lambda: "int7" * 100, "int7"),
    },
    COEFFICIENTS: {
        "a rule not called": (lambda: mo.nesterov, "call it, nesterov(...)"),
        "a schedule not called": (lambda: mo.schedules.fista, "call it, fista(...)"),
        "one of Optax": (lambda: optax.linear_schedule, "call it, linear_schedule(...)"),
        "a transformation": (lambda: TX, "a transformation"),
        "a tree": (lambda: HUGE, "layer_0"),
    },
}  # fmt: skip


def call(function, argument, value):
    """`function` with good values for what it must have, and `value` for one argument."""
    given = {argument: value}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and name != argument and parameter.kind != parameter.VAR_KEYWORD:
            given[name] = GOOD_OF.get(function.__name__, {}).get(name, None) or GOOD[name]
    return function(**given)


def message_of(function, *arguments):
    """The text of the error, which must be one of those for arguments; any other error is passed on."""
    try:
        function(*arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return "accepted"


def wrong_for(argument):
    return [x for arguments, values in WRONG.items() if argument in arguments for x in values.values()]


TAKES = {f: [a for a in inspect.signature(f).parameters if wrong_for(a)] for f in public()}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("function", [pytest.param(f, id=name) for f, name in public().items() if TAKES[f]])
def test_a_wrong_kind_of_value_is_named_in_few_words(function):
    for argument in TAKES[function]:
        for make, words in wrong_for(argument):
            text = message_of(call, function, argument, make())
            assert re.search(rf"\b{argument}\b", text), text
            assert " got " in text
            assert words in text
            assert len(text) < LONGEST, text


@pytest.mark.parametrize(
    "take",
    [
        lambda rule: optax.chain(rule, optax.scale(-0.1)),
        lambda rule: optax.chain(optax.scale(-0.1), rule).init(PARAMS),
        lambda rule: optax.named_chain(("rule", rule)),
        lambda rule: optax.masked(rule, True).init(PARAMS),
        lambda rule: optax.partition({"x": rule}, dict.fromkeys(PARAMS, "x")).init(PARAMS),
        lambda rule: optax.MultiSteps(rule, 2).init(PARAMS),
        lambda rule: optax.apply_if_finite(rule, 2).init(PARAMS),
        lambda rule: optax.inject_hyperparams(mo.heavy_ball)(decay=0.9).init(PARAMS),
        optax.with_extra_args_support,
        lambda rule: optax.flatten(rule).init(PARAMS),
        lambda rule: optax.lookahead(rule, 5, 0.5).init(optax.LookaheadParams.init_synced(PARAMS)),
        lambda rule: optax.conditionally_transform(rule, lambda n: n > 1).init(PARAMS),
        lambda rule: rule.init(PARAMS),
        lambda rule: rule.update(PARAMS, STATE),
    ],
)
def test_a_rule_in_the_place_of_a_transformation_says_how_to_run_it(take):
    with pytest.raises(AttributeError, match=r"it is a rule, and mo\.scale_by_momentum\(rule\) makes a transformation"):
        take(mo.heavy_ball(0.9))


def test_a_rule_is_copied_pickled_and_asked_as_before():
    rule = mo.heavy_ball(0.9)
    assert pickle.loads(pickle.dumps(rule)).A == copy.deepcopy(rule).A == rule.A
    assert not hasattr(rule, "init")
    with pytest.raises(AttributeError, match="'Filter' object has no attribute 'decay'"):
        _ = rule.decay


COUNTED = {"w": jnp.ones((4, 8)), "block": {"steps": jnp.arange(3)}}


@pytest.mark.parametrize(
    "tx",
    [
        mo.sgd(0.1, 0.9), mo.lion(0.1), mo.signum(0.1), mo.normalized_sgd(0.1), mo.srsgd(0.1, 5), mo.muon(0.1),
        mo.contrib.relativistic(0.1), mo.contrib.yellowfin(), mo.contrib.storm(1.0), mo.contrib.mars_lion(0.1),
        mo.adaptive_restart(mo.nesterov(0.9)),
        mo.accumulated(mo.ema(0.9), 2), mo.guarded(mo.sgd(0.1, 0.9)), mo.monitor(mo.sgd(0.1, 0.9)),
        mo.interop.torch_sgd(lr=0.1, momentum=0.9), mo.interop.keras_sgd(0.1, 0.9), mo.sgd(0.1, 0.9, storage="int8"),
    ],
)  # fmt: skip
def test_a_counter_among_the_parameters_is_named_with_the_way_to_keep_it_out(tx):
    text = message_of(tx.init, COUNTED)
    assert "params['block']['steps'] must have a dtype of bfloat16" in text
    assert "got int32" in text
    assert "optax.masked" in text
    assert "is_inexact_array" in text
    assert len(text) < LONGEST
    masked = optax.masked(tx, jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.inexact), COUNTED))
    assert masked.init(COUNTED)
    assert tx.init({"w": COUNTED["w"], "block": {"steps": None}})


def test_compress_sends_the_velocity_of_a_rule_to_its_own_storage():
    for storage in ("int8", "float32", "bfloat16"):
        text = message_of(mo.compress(mo.sgd(0.1, 0.9, storage=storage), {"velocity"}).init, PARAMS)
        assert "got 'velocity'" in text
        assert "give storage= to scale_by_momentum or mo.sgd" in text
        assert len(text) < LONGEST
    assert "storage=" not in message_of(mo.compress(optax.adam(0.1), {"velocity"}).init, PARAMS)


def test_a_state_without_velocities_has_none():
    assert mo.velocity(optax.sgd(0.1).init(PARAMS)) == ()
    assert mo.velocity(mo.sgd(0.1, None).init(PARAMS)) == ()
    assert mo.velocity(()) == ()


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'momentum-optax\[demo\]'"):
        mo.analysis.plot(mo.heavy_ball(0.9), learning_rate=0.1, L=1.0, mu=0.1)
    extras = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert any("matplotlib" in x for x in extras["project"]["optional-dependencies"]["demo"])


FOUR = mo.storage.int4(min_size=1)
SLOW = {
    "sgd": lambda: mo.sgd(0.1, 0.99, storage="int4"),
    "an object": lambda: mo.sgd(0.1, 0.99, nesterov=True, storage=FOUR),
    "dampening": lambda: mo.sgd(0.1, 0.99, dampening=0.5, storage=FOUR),
    "the slowest of several": lambda: mo.scale_by_momentum(mo.aggregated((0.0, 0.5, 0.99)), storage=FOUR),
    "a pair of complex poles": lambda: mo.scale_by_momentum(mo.complex_heavy_ball(0.97, 0.5), storage=FOUR),
    "a negative one": lambda: mo.scale_by_momentum(mo.heavy_ball(-0.97), storage=FOUR),
    "a change of basis": lambda: mo.scale_by_momentum(mo.ema(0.99).change_basis(3.0), storage=FOUR),
    "the memory of lion": lambda: mo.lion(0.1, storage="int4"),
    "accumulated": lambda: mo.accumulated(mo.ema(0.99), 2, storage="int4"),
    "restarts": lambda: mo.adaptive_restart(mo.nesterov(0.99), storage="int4"),
    "signum": lambda: mo.signum(0.1, 0.99, storage="int4"),
    "mars": lambda: mo.contrib.mars_lion(0.1, 0.99, storage="int4"),
    "outer": lambda: mo.outer.diloco(momentum=0.99, storage="int4"),
    "PyTorch": lambda: mo.interop.torch_sgd(lr=0.1, momentum=0.99, storage="int4"),
    "Keras": lambda: mo.interop.keras_sgd(0.1, 0.99, storage="int4"),
}
QUICK = {
    "at the limit": lambda: mo.sgd(0.1, 0.95, storage="int4"),
    "two poles at the limit": lambda: mo.scale_by_momentum(mo.aggregated((0.95, 0.95)), storage=FOUR),
    "eight bits": lambda: mo.sgd(0.1, 0.999, storage="int8"),
    "a schedule": lambda: mo.sgd(0.1, optax.constant_schedule(0.99), storage="int4"),
    "an array": lambda: mo.sgd(0.1, jnp.float32(0.99), storage="int4"),
    "injected": lambda: optax.inject_hyperparams(mo.signum)(0.1, 0.99, storage="int4").init(PARAMS),
    "a velocity never read": lambda: mo.scale_by_momentum(mo.Filter(0.99, 1.0, 0.0, 1.0), storage="int4"),
}


@pytest.mark.parametrize("make", SLOW.values(), ids=SLOW)
def test_int4_warns_of_a_decay_beyond_its_limit(make):
    with pytest.warns(UserWarning, match=r"^Int4\(.*\) is for decays up to 0\.95, got a rule with 0\.9\d") as seen:
        make()
    assert len({str(x.message) for x in seen}) == 1
    assert all(len(str(x.message)) < LONGEST and x.filename == __file__ for x in seen)


@pytest.mark.parametrize("make", QUICK.values(), ids=QUICK)
def test_int4_is_silent_where_nothing_is_known_or_wrong(make):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make()
    assert not seen


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (HUGE, "{'layer_0': {'bias'"), ([np.ones((3, 4))] * 9, "[float64[3,4], float64[3,4], float64[3,4], ...]"),
        (STATE, "(EmptyState(...), EmptyState(...), MomentumState(...), ...)"), (STATE[2], "MomentumState(...)"),
        (TX, "a transformation"), (0.9, "0.9"), ("x" * 1000, "'xxx"), (jnp.float32(0.5), "Array(0.5"),
        (int, "the class int"), (jnp.zeros((2, 3), jnp.bfloat16), "bfloat16[2,3]"), (None, "None"),
        (np.float64, "the class float64"), (jax.ShapeDtypeStruct((2,), jnp.int8), "int8[2]"),
    ],
)  # fmt: skip
def test_a_value_is_shown_in_few_characters(value, text):
    assert _checks.shown(value).startswith(text)
    assert len(_checks.shown(value)) <= 85


DOUBLE = {"w": np.ones((4, 8)), "b": np.ones(8)}
COMPLEX = {"w": np.ones((4, 8), np.complex128)}
REAL_OPTIMIZERS = {
    "sgd": lambda: mo.sgd(0.1, 0.9, dampening=0.1, weight_decay=0.1),
    "sgd, bfloat16": lambda: mo.sgd(0.1, 0.9, storage="bfloat16"),
    "sgd, int8": lambda: mo.sgd(0.1, 0.9, storage=mo.storage.int8(min_size=1)),
    "debias": lambda: mo.scale_by_momentum(mo.ema(0.9), debias=True),
    "lion": lambda: mo.lion(0.1),
    "signum": lambda: mo.signum(0.1),
    "normalized": lambda: mo.normalized_sgd(0.1),
    "srsgd": lambda: mo.srsgd(0.1, 5),
    "relativistic": lambda: mo.contrib.relativistic(0.1),
    "yellowfin": mo.contrib.yellowfin,
    "storm": lambda: mo.contrib.storm(1.0),
    "mars_adamw": lambda: mo.contrib.mars_adamw(0.1),
    "mars_lion": lambda: mo.contrib.mars_lion(0.1),
    "muon": lambda: optax.masked(mo.muon(0.1), {"w": True, "b": False}),
    "accumulated": lambda: mo.accumulated(mo.ema(0.9), 2),
    "guarded": lambda: mo.guarded(mo.sgd(0.1, 0.9), "leaf", max_ratio=5.0),
    "restart": lambda: mo.adaptive_restart(mo.nesterov(0.9), scope="leaf"),
    "restart by loss": lambda: mo.adaptive_restart(mo.nesterov(0.9), "function"),
    "scheduled restart": lambda: mo.scheduled_restart(mo.sgd(0.1, 0.9), 2),
    "cautious": lambda: mo.cautious(mo.scale_by_momentum(mo.ema(0.9)), "mean"),
    "cautious decay": lambda: mo.add_cautious_weight_decay(0.1, "product"),
    "monitor": lambda: mo.monitor(mo.sgd(0.1, 0.9, storage=mo.storage.int8(min_size=1))),
    "compress": lambda: mo.compress(optax.adam(0.1), {"mu": mo.storage.int8(min_size=1), "nu": "uint8"}),
    "torch": lambda: mo.interop.torch_sgd(lr=0.1, momentum=0.9),
    "keras": lambda: mo.interop.keras_sgd(0.1, 0.9, weight_decay=0.1),
}  # fmt: skip


@pytest.mark.one_in(12)
@pytest.mark.parametrize("make", REAL_OPTIMIZERS.values(), ids=REAL_OPTIMIZERS)
def test_parameters_of_numpys_float64_are_those_of_float32_without_a_warning(make):
    tx = optax.with_extra_args_support(make())
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), DOUBLE)
    extra = {"previous_gradient": DOUBLE, "value": 1.0}
    state, there = tx.init(DOUBLE), tx.init(single)
    assert avals(state) == avals(there)
    u, state = tx.update(DOUBLE, state, DOUBLE, **extra)
    assert avals(state) == avals(there)
    # A leaf that is masked is passed on as it was.
    assert {x.dtype.name for x in jax.tree.leaves(u) if isinstance(x, jax.Array)} == {"float32"}


def test_other_things_with_states_take_float64_and_complex128_of_numpy_too():
    for keep in ("float32", "bfloat16", mo.storage.int8(min_size=1)):
        tx = mo.scale_by_momentum(mo.ema(0.9), storage=keep, debias=True)
        assert mo.velocity(tx.init(COMPLEX))[0]["w"].dtype == jnp.complex64
    assert mo.row_sparse(mo.heavy_ball(0.9), 0.1).init(DOUBLE["w"])
    outer = mo.outer.diloco()
    state = outer.init(DOUBLE)
    assert outer.exchange(DOUBLE, state, axis_name=None).anchor["w"].dtype == jnp.float32
    assert mo.convert(mo.sgd(0.1, 0.9).init(DOUBLE), "int8")


@pytest.mark.parametrize(
    "call",
    [
        lambda half: mo.analysis.memory(mo.ema(0.9), half),
        lambda half: mo.tuning.optimal_heavy_ball(half, 0.1),
        lambda half: mo.ema(0.9).impulse_response(half),
        lambda half: mo.schedule_free(weight_power=half),
    ],
)
def test_static_arguments_are_spoken_of_only_where_optax_injects(call):
    with pytest.raises(TypeError, match=r"got Array\(0\.5, dtype=float32\)$"):
        call(jnp.float32(0.5))
