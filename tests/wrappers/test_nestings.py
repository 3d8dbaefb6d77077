"""Wrappers in wrappers, as the docstrings recommend them: types stay, a NaN is skipped, figures are there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals

import momentum_optax as mo

RULE = mo.heavy_ball(0.9)
PARAMS = {"a": jnp.ones((4, 6)), "b": jnp.ones(3)}
BYTES = mo.storage.int8(min_size=1)


def lion():
    return optax.chain(mo.scale_by_momentum(mo.lion_mix()), optax.scale_by_sign())


GUARDED = {
    "monitor": lambda scope: mo.guarded(mo.monitor(mo.sgd(0.1, RULE), RULE), scope),
    "monitor of bytes": lambda scope: mo.guarded(mo.monitor(mo.sgd(0.1, RULE, storage=BYTES), RULE, every=2), scope),
    "monitor of a schedule": lambda scope: mo.guarded(
        mo.monitor(mo.scale_by_momentum(mo.ema(optax.constant_schedule(0.9)), debias=True)), scope
    ),
    "compressed monitor": lambda scope: mo.guarded(mo.monitor(mo.compress(optax.adam(0.1), {"mu"}, BYTES)), scope),
    "monitor in a chain": lambda scope: mo.guarded(
        optax.chain(optax.clip_by_global_norm(1.0), mo.monitor(mo.sgd(0.1, 0.9), every=3)), scope
    ),
    "guard in a monitor": lambda scope: mo.monitor(mo.guarded(mo.sgd(0.1, 0.9), scope)),
    "spikes and a monitor": lambda scope: mo.guarded(mo.monitor(mo.sgd(0.1, 0.9)), scope, max_ratio=10.0),
    "two guards": lambda scope: mo.guarded(mo.guarded(mo.sgd(0.1, 0.9), scope, max_ratio=10.0)),
    "accumulated": lambda scope: mo.guarded(mo.accumulated(RULE, 2, optax.scale(-0.1)), scope),
    "restart": lambda scope: mo.guarded(mo.adaptive_restart(mo.nesterov(0.9), scope=scope), scope),
    "scheduled restart": lambda scope: mo.guarded(mo.scheduled_restart(mo.sgd(0.1, 0.9), 2), scope),
    "cautious": lambda scope: mo.guarded(mo.cautious(lion(), "count"), scope),
    "muon": lambda scope: optax.chain(
        mo.guarded(mo.cautious(mo.scale_by_momentum(RULE), "mean"), scope), mo.contrib.saturate(1.0)
    ),
    "injected": lambda scope: mo.guarded(optax.inject_hyperparams(mo.signum)(0.1), scope),
    "masked": lambda scope: mo.guarded(optax.masked(mo.sgd(0.1, 0.9), {"a": True, "b": False}), scope),
    "partition": lambda scope: mo.guarded(
        optax.partition({"x": mo.sgd(0.1, 0.9), "y": mo.monitor(mo.lion(0.1))}, {"a": "x", "b": "y"}), scope
    ),
}  # fmt: skip
WHOLE = {
    "yellowfin": lambda: mo.guarded(mo.contrib.yellowfin()),
    "storm": lambda: mo.guarded(mo.monitor(mo.contrib.scale_by_storm(0.1))),
    "mars": lambda: mo.guarded(mo.compress(mo.contrib.mars_adamw(0.1), {"mu": BYTES, "nu": "uint8"})),
    "restart by loss": lambda: mo.guarded(mo.adaptive_restart(mo.nesterov(0.9), "function"), measure="norm"),
    "spikes of the loss": lambda: mo.guarded(mo.monitor(mo.sgd(0.1, 0.9)), max_ratio=5.0, measure="value"),
    "micro-batches of Optax": lambda: optax.MultiSteps(mo.guarded(mo.monitor(mo.sgd(0.1, 0.9))), 1),
    "apply if finite": lambda: optax.apply_if_finite(mo.monitor(mo.sgd(0.1, 0.9)), 5),
}  # fmt: skip
# By leaf there is more to go wrong; compressed states take seconds to compile.
FAST = {(name, "leaf") for name in GUARDED} - {("monitor of bytes", "leaf"), ("compressed monitor", "leaf")}
TABLE = [
    pytest.param(lambda m=m, s=s: m(s), id=f"{n}, {s}", marks=[pytest.mark.slow] * ((n, s) not in FAST))
    for n, m in GUARDED.items()
    for s in ("tree", "leaf")
]
TABLE += [pytest.param(make, id=name) for name, make in WHOLE.items()]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("make", TABLE)
def test_a_nesting_runs_skips_a_nan_and_keeps_its_types(make):
    tx = make()
    g = jax.tree.map(lambda x: 0.1 * x, PARAMS)
    bad = {**g, "a": g["a"].at[0, 0].set(jnp.nan)}
    extra = {"previous_gradient": g, "value": jnp.float32(1.0)}
    state = fresh = tx.init(PARAMS)
    step = jax.jit(lambda g, s: optax.with_extra_args_support(tx).update(g, s, PARAMS, **extra))
    for now in (g, bad, g):
        u, state = step(now, state)
    assert avals(state) == avals(fresh)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((u, mo.velocity(state))))
    monitored = [x for x in jax.tree.leaves(state, is_leaf=_is_monitor) if _is_monitor(x)]
    if monitored:
        assert all(np.isfinite(x) for x in mo.telemetry(state).values())


def _is_monitor(x):
    return isinstance(x, mo.wrappers.monitor.MonitorState)


def test_the_figures_of_a_guard_by_leaf_are_those_without_the_leaf():
    tx = mo.guarded(mo.monitor(mo.scale_by_momentum(RULE), RULE), "leaf")
    g = jax.tree.map(lambda x: 0.1 * x, PARAMS)
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(g, state)
    _, after = jax.jit(tx.update)({**g, "a": jnp.full((4, 6), jnp.inf)}, state)
    found = mo.telemetry(after)
    b = np.sqrt(3) * 0.1
    np.testing.assert_allclose(found["gradient_norm"], b, rtol=1e-6)
    # Beside the heavy ball of b there is 0.9 of that of a, whose gradient counts as zero.
    norm = np.hypot(1.9 * b, 0.9 * np.sqrt(24) * 0.1)
    np.testing.assert_allclose(found["velocity_norm"], norm, rtol=1e-6)
    assert found["age"] == pytest.approx(0.9 / 1.9)
    assert_bit_equal(mo.velocity(after)[0]["a"], mo.velocity(state)[0]["a"])
    assert after.inner.step == 2
