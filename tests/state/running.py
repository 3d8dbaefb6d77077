"""Optimizers with a state after two steps: states that others refuse or continue from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import STORAGES, avals

import momentum_optax as mo
from momentum_optax.state.mismatch import StateMismatchError

PARAMS = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
BYTES = STORAGES["int8"]()
SQUARES = mo.storage.uint8(min_size=1)
SCHEDULE = optax.linear_schedule(0.9, 0.5, 8)
SGD = functools.partial(mo.sgd, 0.1)


def chained(rule, **options):
    return optax.chain(mo.scale_by_momentum(rule, **options), optax.scale_by_learning_rate(0.1))


def compressed(fields):
    return mo.compress(optax.adam(0.1), fields)


# With the velocity of one rule of order one: each can continue from the state of each other.
ONE_VELOCITY = {
    **{name: lambda name=name: SGD(0.9, storage=STORAGES[name]()) for name in STORAGES},
    "ema": lambda: SGD(mo.ema(0.9)),
    "nesterov": lambda: SGD(mo.nesterov(0.9), storage=BYTES),
    "scheduled": lambda: SGD(SCHEDULE),
    "dampened": lambda: SGD(0.9, dampening=0.5),
    "dampened_int8": lambda: SGD(SCHEDULE, dampening=0.5, storage=BYTES),
    "scheduled_rate": lambda: mo.sgd(lambda t: 0.1 / (t + 1), 0.9),
    "no_momentum": lambda: SGD(None),
    "guarded": lambda: mo.guarded(SGD(0.9)),
    "guarded_leaf": lambda: mo.guarded(SGD(0.9, storage=BYTES), "leaf"),
    "monitor": lambda: mo.monitor(SGD(0.9)),
    "monitor_rule": lambda: mo.monitor(SGD(mo.heavy_ball(0.9)), mo.heavy_ball(0.9)),
    "restart": lambda: mo.adaptive_restart(mo.heavy_ball(0.9)),
    "restart_leaf": lambda: mo.adaptive_restart(mo.heavy_ball(0.9), scope="leaf"),
    "restart_function": lambda: mo.adaptive_restart(mo.heavy_ball(0.9), "function"),
    "restart_steps": lambda: mo.scheduled_restart(SGD(0.9), 4),
    "cautious": lambda: mo.cautious(mo.scale_by_momentum(mo.lion_mix()), "mean"),
    "accumulated": lambda: mo.accumulated(mo.heavy_ball(0.9), 2, optax.scale(-0.1)),
    "accumulated_int8": lambda: mo.accumulated(mo.heavy_ball(SCHEDULE), 2, storage=BYTES),
    "storm": lambda: mo.contrib.scale_by_storm(0.1),
    "storm_scheduled": lambda: mo.contrib.scale_by_storm(lambda t: 0.1),
    "lion": lambda: mo.lion(0.1, storage="bfloat16"),
    "mars": lambda: mo.contrib.mars_lion(0.1, gamma=lambda t: 0.02),
}  # fmt: skip
# Optax reads these states first, so that their errors are Optax's: they are only converted.
BY_OPTAX = {
    "injected": lambda: optax.inject_hyperparams(mo.sgd)(learning_rate=0.1, momentum=0.9),
    "masked": lambda: optax.masked(SGD(0.9), {"w": True, "b": True}),
    "chain": lambda: chained(mo.heavy_ball(0.9)),
    "chain_ema": lambda: chained(mo.ema(0.9)),
    "cautious_decay": lambda: optax.chain(
        mo.scale_by_momentum(mo.ema(0.9)), mo.add_cautious_weight_decay(lambda t: 0.1, "sign_bit")
    ),
}
# No other optimizer can continue from these states.
APART = {
    "aggregated": lambda: SGD(mo.aggregated((0.5, 0.9))),
    "debiased": lambda: mo.guarded(mo.scale_by_momentum(mo.ema(0.9), debias=True)),
    "adaptive_storm": lambda: mo.contrib.storm(0.1),
    "yellowfin": mo.contrib.yellowfin,
    "adam": lambda: optax.adam(0.1),
    "optax_sgd": lambda: optax.sgd(0.1, 0.9),
    "optax_ema": lambda: optax.ema(0.9),
    "optax_lion": lambda: optax.lion(0.1),
}  # fmt: skip
COMPRESSED = {
    "mu": lambda: compressed({"mu": BYTES}),
    "mu_bfloat16": lambda: compressed({"mu": "bfloat16"}),
    "mu_float32": lambda: compressed({"mu": "float32"}),
    "both": lambda: compressed({"mu": BYTES, "nu": SQUARES}),
    "nu": lambda: compressed({"nu": "float32"}),
    "predicate": lambda: mo.compress(optax.adam(0.1), lambda path, leaf: "mu" in str(path), BYTES),
    "plain": lambda: optax.with_extra_args_support(optax.adam(0.1)),
}
FIELDS = {
    "mu": {"mu": BYTES}, "mu_bfloat16": {"mu": "bfloat16"}, "mu_float32": {"mu": "float32"}, "nu": {"nu": "float32"},
    "both": {"mu": BYTES, "nu": SQUARES}, "predicate": {"mu": BYTES, "nu": SQUARES}, "plain": "float32",
}  # fmt: skip
ALL = ONE_VELOCITY | BY_OPTAX | APART
IN_BYTES = {"int8", "nesterov", "dampened_int8", "guarded_leaf", "accumulated_int8"}
KEPT = {name: BYTES for name in IN_BYTES} | {"int4": STORAGES["int4"](), "bfloat16": "bfloat16", "lion": "bfloat16"}
SAYS = ("mo.convert", "mo.interop.from_optax", "mo.checkpoint.from_fields")


def gradients(t, like=PARAMS):
    rng = np.random.default_rng(t)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), like)


def step(tx, g, state):
    extra = {"previous_gradient": g, "value": jnp.float32(1)}
    return optax.with_extra_args_support(tx).update(g, state, PARAMS, **extra)


@functools.cache
def made(name):
    """An optimizer and its state after two steps, two micro-batches at least."""
    tx = (ALL | COMPRESSED)[name]()
    state = tx.init(PARAMS)
    one = jax.jit(lambda g, s: step(tx, g, s)[1])
    for t in range(2):
        state = one(gradients(t), state)
    return tx, state


def outcome(tx, state):
    """None if the optimizer takes the state and keeps its form, else the sentence."""
    try:
        after = jax.eval_shape(lambda s: step(tx, gradients(0), s)[1], state)
    except StateMismatchError as error:
        message = str(error)
        assert len(message) < 300
        assert any(call in message for call in SAYS)
        return message
    assert avals(after) == avals(state)
    return None


FAST = ("float32", "scheduled", "dampened", "scheduled_rate", "no_momentum", "guarded", "monitor_rule", "accumulated")
# Off by a rounding of the storage.
CLOSE = {"int4": 0.5, "int8": 0.05, "bfloat16": 0.01, "float32": 0.0}


def assert_goes_on(old, new):
    """A state of one optimizer is taken or refused by another, and taken once it is converted."""
    (_, state), (tx, _) = made(old), made(new)
    outcome(tx, state)
    like = tx.init(PARAMS)
    converted = mo.convert(state, KEPT.get(new, "float32"), like=like)
    assert avals(converted) == avals(like)
    assert outcome(tx, converted) is None
    if "no_momentum" not in {old, new}:
        close = CLOSE[new if new in CLOSE else "int8" if new in KEPT else "float32"]
        pairs = zip(*(jax.tree.leaves(mo.velocity(x)) for x in (converted, state)), strict=True)
        assert all(np.linalg.norm(a - b) <= close * np.linalg.norm(b) for a, b in pairs)
