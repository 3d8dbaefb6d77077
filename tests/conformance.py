"""The conformance table: every public rule and every storage, and what the tests of the contracts share.

A rule or storage without a row here fails `test_conformance.py`. `RULES[name]()` builds the rule, and
`RULES[name](decay=0.5)` the same rule with another argument.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.storage.protocol import SUPPORTED

EPS = 2.0**-24  # the largest relative error of one float32 rounding

RULES = {
    rule.__name__: partial(rule, **arguments)
    for rule, arguments in (
        (mo.accelerated, {"kappa": 100.0, "xi": 5.0, "epsilon": 0.7}),
        (mo.adan_mix, {"b1": 0.9, "b2": 0.8}),
        (mo.aggregated, {"decays": (0.0, 0.9, 0.99)}),
        (mo.aggregated_exponential, {"base": 0.2, "count": 3}),
        (mo.chebyshev, {"L": 4.0, "mu": 1.0}),
        (mo.complex_heavy_ball, {"decay": 0.9, "angle": 0.4}),
        (mo.ademamix_mix, {"fast": 0.8, "slow": 0.99, "alpha": 2.0}),
        (mo.ema, {"decay": 0.9}),
        (mo.ema_nesterov, {"decay": 0.9, "lookahead": 0.5}),
        (mo.grokfast, {"decay": 0.9, "amplification": 2.0}),
        (mo.contrib.grokfast_average, {"window": 5, "amplification": 3.0}),
        (mo.heavy_ball, {"decay": 0.9, "dampening": 0.3, "first_step": "gradient"}),
        (mo.contrib.implicit_transport, {"delta": 1.0}),
        (mo.lion_mix, {"b1": 0.9, "b2": 0.99}),
        (mo.lookahead, {"period": 2, "step_size": 0.8}),
        (mo.mars_mix, {"decay": 0.9, "gamma": 0.025}),
        (mo.mass, {"alpha": 0.1, "kappa": 5.0}),
        (mo.muon_mix, {"decay": 0.9}),
        (mo.nadam_mix, {"decay": 0.9, "psi": 0.004}),
        (mo.nesterov, {"decay": 0.9}),
        (mo.optimized_gradient, {"steps": 9}),
        (mo.contrib.optimized_gradient_norm, {"steps": 9}),
        (mo.optimistic, {"alpha": 1.0, "beta": 0.5}),
        (mo.outer_nesterov, {"period": 2, "learning_rate": 0.7, "decay": 0.5}),
        (mo.overshoot, {"decay": 0.8, "overshoot": 2.0}),
        (mo.pid, {"proportional": 0.5, "integral": 1.0, "derivative": 0.2, "decay": 0.8}),
        (mo.positive_negative, {"decay": 0.9, "beta0": 1.0}),
        (mo.primal_averaging, {"mu_x": 0.9, "mu_y": 0.7}),
        (mo.quasi_hyperbolic, {"decay": 0.9, "nu": 0.7}),
        (mo.contrib.recht_pid, {"proportional": -0.5, "integral": 1.0, "derivative": 2.0}),
        (mo.robust_momentum, {"L": 4.0, "mu": 1.0, "rho": 0.6}),
        (mo.schedule_free, {"beta": 0.8, "warmup_steps": 3, "weight_power": 2.0}),
        (mo.simplified_ademamix, {"decay": 0.9, "alpha": 2.0}),
        (mo.synthesized_nesterov, {"decay": 0.8, "lookahead": 0.5}),
        (mo.torch_nesterov, {"decay": 0.9}),
        (mo.triple_momentum, {"L": 4.0, "mu": 1.0}),
    )
}

STORAGES = {
    "float32": mo.storage.float32,
    "bfloat16": mo.storage.bfloat16,
    "int8": partial(mo.storage.int8, min_size=1),  # bytes for the small leaves of the tests too
    "int4": partial(mo.storage.int4, min_size=1),
}

# Storages that keep no velocities: squares, through `compress`.
SQUARES = {"uint8"}

# Rules whose response to a constant vanishes or changes sign somewhere, at the arguments above.
NOT_DEBIASABLE = {"complex_heavy_ball", "positive_negative"}

# Arguments that are no coefficients: they say which filter it is, not how much of it.
STATIC = {"first_step", "window", "count", "psi", "decays", "period", "steps", "warmup_steps", "weight_power"}
# Rules with a schedule of their own.
OWN_SCHEDULE = {"nadam_mix"}

# The real dtypes of leaves without 64-bit types.
REAL = tuple(jnp.dtype(name).type for name in SUPPORTED if name not in ("float64", "complex64", "complex128"))

every_rule = pytest.mark.parametrize("rule", RULES)
every_storage = pytest.mark.parametrize("storage", STORAGES)


def rule_functions():
    """Every public function that returns a rule, by name: those of the catalogue and those of `contrib`."""
    functions = {**vars(mo.rules), **vars(mo.contrib)}
    returns = {n: inspect.signature(f).return_annotation for n, f in functions.items() if inspect.isfunction(f)}
    return {name: functions[name] for name, kind in returns.items() if kind in (mo.Filter, "Filter")}


def public_rules():
    """The names that should have a row in `RULES`."""
    return set(rule_functions())


def finished_optimizers():
    """Every public finished optimizer, by name: those at the top level and those of `contrib`."""
    functions = {n: f for n, f in (vars(mo) | vars(mo.contrib)).items() if inspect.isfunction(f)}
    rooms = tuple(f"momentum_optax.{room}." for room in ("optimizers", "contrib"))
    parts = {"saturate", "mars_correction", *(n for n in functions if n.startswith("scale_by_")), *rule_functions()}
    return {n: f for n, f in functions.items() if f.__module__.startswith(rooms) and n not in parts}


def public_storages():
    """The names that should have a row in `STORAGES`."""
    names = {name for name in vars(mo.storage) if not name.startswith("_")} - {"by_leaf", "resolve"}
    return {name for name in names if inspect.isfunction(getattr(mo.storage, name))}


def storages_with(option):
    """The storages, of velocities and of squares, whose function has an argument of this name."""
    return [n for n in (*STORAGES, *SQUARES) if option in inspect.signature(getattr(mo.storage, n)).parameters]


def runner(rule, storage="float32", debias=False):
    """The transformation for a row of the tables."""
    keep = STORAGES[storage]() if storage in STORAGES else storage
    return mo.scale_by_momentum(RULES[rule](), storage=keep, debias=debias)


def own_jit(function, **options):
    """`jax.jit` with a cache that is not shared.

    JAX keeps one cache for all jits of one function, so that a count of compilations would include those of other
    tests that compile the `update` of the same optimizer.
    """
    return jax.jit(partial(function), **options)


def avals(tree):
    """Everything that a compiled step may depend on: structure, dtypes, shapes, weak types."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda t: t, tree))
    return treedef, [(x.dtype, x.shape, x.weak_type) for x in leaves]


def gradients(like, seed=0):
    """A seeded standard normal gradient for each leaf, of its shape and dtype."""
    rng = np.random.default_rng(seed)

    def draw(x):
        real = rng.normal(size=x.shape)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return jnp.asarray(real + 1j * rng.normal(size=x.shape), x.dtype)
        return jnp.asarray(real, x.dtype)

    return jax.tree.map(draw, like)


def trajectory(tx, signal, params=None):
    """The updates for the gradients `signal`, a tree of arrays with a leading axis of steps, in one scan."""
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), signal) if params is None else params

    def step(state, g):
        u, state = tx.update(g, state, params)
        return state, u

    return jax.lax.scan(step, tx.init(params), signal)[::-1]


def descend(tx, params, signal):
    """The parameters after a step for each gradient of the list `signal`, and the last state; not compiled."""
    state = tx.init(params)
    for g in signal:
        updates, state = tx.update(g, state, params)
        params = mo.apply_updates(params, updates)
    return params, state


def slot(state, key):
    """The leaves of a state that belong to the parameter `key` of a flat dictionary."""
    pairs = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: x is None)
    return [leaf for path, leaf in pairs if jax.tree_util.DictKey(key) in path]


def pointers(tree):
    """The addresses of the buffers of a tree; arrays of no elements have none."""
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size]


def assert_bit_equal(a, b):
    """Same structure, and every leaf the same to the bit (NaN equals NaN)."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_run(a, b, roundings):
    """Of two compiled programs that make the same steps: stored codes to the bit, floats to a number of roundings.

    The noise of a storage is the same in every program, but XLA's CPU backend does not join float operations alike in
    all of them. A rounding is half a unit in the last place of the largest element.
    """
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize > 2:
            unit = jnp.finfo(x.dtype).eps / 2 * float(jnp.abs(y).max(initial=0))
            np.testing.assert_allclose(x, y, rtol=0, atol=roundings * unit)
        else:
            np.testing.assert_array_equal(x, y)


def chained(rule, learning_rate, **options):
    """The usual optimizer of a rule."""
    return optax.chain(mo.scale_by_momentum(rule, **options), optax.scale_by_learning_rate(learning_rate))


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def injected(decay, *, rule=mo.heavy_ball, hyperparam_dtype=None):
    """The rule with its decay a hyperparameter in the state, as a user of Optax would write it."""

    def factory(decay):
        return mo.scale_by_momentum(rule(decay))

    return optax.inject_hyperparams(factory, hyperparam_dtype=hyperparam_dtype)(decay)


def slow_decay(kind):
    """A heavy ball with decay 0.999, given in one of the ways in which Optax gives hyperparameters."""
    return {
        "number": mo.scale_by_momentum(mo.heavy_ball(0.999)),
        "array": mo.scale_by_momentum(mo.heavy_ball(jnp.float32(0.999))),
        "schedule": mo.scale_by_momentum(mo.heavy_ball(lambda step: 0.999)),
        "optax schedule": mo.scale_by_momentum(mo.heavy_ball(optax.constant_schedule(0.999))),
        "injected": injected(0.999, hyperparam_dtype=jnp.float32),
        "injected schedule": injected(optax.constant_schedule(0.999), hyperparam_dtype=jnp.float32),
        "injected in the parameters' dtype": injected(0.999),
    }[kind]


def numeric_arguments(rule):
    """The arguments in a rule's row that are coefficients."""
    return [name for name, value in RULES[rule].keywords.items() if name not in STATIC and isinstance(value, float)]
