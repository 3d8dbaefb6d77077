"""`guarded(max_ratio=)`: spikes are skipped before they enter the velocity, and at most `max_consecutive` in a row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals

import momentum_optax as mo
from momentum_optax.wrappers.guarded import GuardedState, SpikeGuardedState

RATIO, DECAY, WARMUP, MOST = 4.0, 0.8, 3, 2
OPTIONS = {"max_ratio": RATIO, "decay": DECAY, "warmup": WARMUP, "max_consecutive": MOST}
LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}


class Reference(NamedTuple):
    """The definition, for one number after the other, in Python."""

    count: int = 0
    consecutive: int = 0
    sizes: tuple[float, ...] = ()  # those in the average

    @property
    def mean(self) -> float:
        weights = DECAY ** np.arange(len(self.sizes))[::-1]
        return float(np.average(self.sizes, weights=weights)) if self.sizes else 0.0

    def after(self, size: float, finite: bool = True) -> tuple[bool, "Reference"]:
        if not finite:
            return False, self
        spike = len(self.sizes) >= WARMUP and self.mean > 0 and not size <= RATIO * self.mean
        if spike and self.consecutive < MOST:
            return False, self._replace(count=self.count + 1, consecutive=self.consecutive + 1)
        sizes = () if spike else self.sizes
        return True, Reference(self.count, 0, (*sizes, size) if np.isfinite(size) else self.sizes)


def signal(sizes: Any, seed: int = 0) -> list[Any]:
    """Gradients of these norms, each in a direction drawn at random; NaN is one with a NaN in it."""
    rng = np.random.default_rng(seed)
    out = []
    for size in sizes:
        g = {name: rng.normal(size=x.shape) for name, x in LIKE.items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        g = {name: jnp.asarray(x / norm * (1.0 if np.isnan(size) else size), jnp.float32) for name, x in g.items()}
        out.append({**g, "b": g["b"].at[1].set(jnp.nan)} if np.isnan(size) else g)
    return out


# A spike in the warm-up, one of 1e6, two with NaN between, a lasting rise that ends a row, silence, and what follows.
SIZES = [1, 30, 2, 1, 1, 1e6, 1, 200, np.nan, 300, 1, 50, 60, 70, 80, 75, 0, 0, 1, 90, 400, 1e3, 1e3, np.nan, 1]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_a_run_skips_what_the_definition_skips(scope):
    rule, gradients = mo.heavy_ball(0.5), signal(SIZES)
    tx = mo.guarded(mo.scale_by_momentum(rule), scope, **OPTIONS)
    step, state = jax.jit(tx.update), tx.init(LIKE)
    groups = [("a", "b")] if scope == "tree" else [("a",), ("b",)]
    known = {group: Reference() for group in groups}
    v = {name: np.zeros(x.shape) for name, x in LIKE.items()}
    skipped = dict.fromkeys(groups, 0)
    for g in gradients:
        before = state
        u, state = step(g, state)
        for group in groups:
            parts = [np.float64(g[name]) for name in group]
            finite = all(np.isfinite(x).all() for x in parts)
            size = np.sqrt(sum((x**2).sum() for x in parts))
            taken, known[group] = known[group].after(size, finite)
            skipped[group] += not taken
            for name in group:
                if taken:
                    v[name] = 0.5 * v[name] + np.float64(g[name])
                    np.testing.assert_allclose(u[name], v[name], rtol=1e-5, atol=1e-6)
                else:
                    np.testing.assert_array_equal(u[name], np.zeros_like(u[name]))
                    assert_bit_equal(mo.velocity(state)[0][name], mo.velocity(before)[0][name])
            pick = (lambda x: x) if scope == "tree" else (lambda x, name=group[0]: jnp.squeeze(x[name]))
            assert pick(state.finite) == finite
            assert pick(state.skipped) == skipped[group]
            spikes = [pick(x) for x in state.spikes]
            assert spikes[:3] == [known[group].count, known[group].consecutive, len(known[group].sizes)]
            np.testing.assert_allclose(spikes[4], known[group].mean, rtol=1e-5)
    assert all(x.count > 5 for x in known.values())
    assert avals(state) == avals(tx.init(LIKE))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("storage", ["float32", mo.storage.int8(min_size=1)])
def test_a_spike_of_a_million_leaves_everything_as_it_was_to_the_bit(storage):
    tx = mo.guarded(mo.sgd(optax.linear_schedule(0.1, 0.0, 50), 0.9, dampening=0.5, storage=storage), max_ratio=10.0)
    step, state = jax.jit(tx.update), tx.init(LIKE)
    for g in signal([1.0] * 21):
        _, state = step(g, state)
    (spike,) = signal([1e6])
    u, after = step(spike, state)
    assert_bit_equal(u, LIKE)
    assert_bit_equal(after.inner, state.inner)
    assert after.spikes.mean == state.spikes.mean
    assert (after.spikes.count, after.skipped, bool(after.finite)) == (1, 1, True)
    plain, _ = jax.jit(mo.guarded(mo.sgd(0.1, 0.9)).update)(spike, mo.guarded(mo.sgd(0.1, 0.9)).init(LIKE))
    assert np.abs(plain["b"]).max() > 1e3


def test_after_so_many_in_a_row_the_step_is_taken_and_is_the_new_level():
    tx = mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.0)), max_ratio=3.0, warmup=1, max_consecutive=4)
    step, state = jax.jit(tx.update), tx.init(LIKE)
    moved = []
    for g in signal([1.0] * 5 + [100.0] * 20):
        u, state = step(g, state)
        moved.append(bool(u["b"].any()))
    assert moved == [True] * 5 + [False] * 4 + [True] * 16
    np.testing.assert_allclose(state.spikes.mean, 100, rtol=1e-6)
    assert (state.spikes.count, state.spikes.consecutive, state.spikes.accepted) == (4, 0, 16)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("sizes", "taken"),
    [([1, 1, 100], True), ([1, 1, 1, 100], False), ([0, 0, 0, 0, 100], True), ([1, 1, 1, 3.9], True)],
)
def test_the_first_steps_and_those_after_silence_are_taken(sizes, taken):
    tx = mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.5)), **OPTIONS)
    step, state = jax.jit(tx.update), tx.init(LIKE)
    for g in signal(sizes):
        u, state = step(g, state)
    assert bool(u["b"].any()) == taken


def test_a_norm_that_overflows_is_a_spike_and_enters_no_average():
    huge = {"a": jnp.full((2, 3), 1e30), "b": jnp.full(4, 1e30)}
    tx = mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.5)), **OPTIONS)
    step, state = jax.jit(tx.update), tx.init(LIKE)
    _, state = step(huge, state)
    assert (state.spikes.accepted, state.spikes.mean, state.skipped) == (0, 0, 0)
    for g in signal([2.0] * 4):
        _, state = step(g, state)
    u, state = step(huge, state)
    assert_bit_equal(u, LIKE)
    np.testing.assert_allclose(state.spikes.mean, 2, rtol=1e-6)
    assert (state.spikes.count, bool(state.finite)) == (1, True)


def test_the_loss_can_be_what_is_compared():
    tx = mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.5)), measure="value", **OPTIONS)
    step, state = jax.jit(tx.update), tx.init(LIKE)
    known, (g,) = Reference(), signal([1.0])
    losses = [3.0, 2.0, 2.5, 2.0, 90.0, np.nan, 2.0, np.inf, 1e3, 1e3, 1e3, 1e3, 1e3]
    for loss in losses:
        u, state = step(g, state, value=jnp.float32(loss))
        taken, known = known.after(loss, bool(np.isfinite(loss)))
        assert bool(u["b"].any()) == taken, loss
        assert state.finite
    assert (state.spikes.count, state.skipped) == (known.count, known.count + 2)
    np.testing.assert_allclose(state.spikes.mean, known.mean, rtol=1e-6)
    with pytest.raises(TypeError, match="value must be the loss, a scalar given to update for measure 'value'"):
        tx.update(g, state)
    with pytest.raises(ValueError, match=r"value must be a scalar, got shape \(2,\)"):
        tx.update(g, state, value=jnp.ones(2))


@pytest.mark.parametrize("scope", ["tree", "leaf"])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("float16", "float32", "complex64"))]
)
def test_types_do_not_drift_under_scan_and_vmap(scope, dtype):
    tx = mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.5)), scope, **OPTIONS)
    gradients = jax.tree.map(lambda *x: jnp.stack(x).astype(dtype), *signal([1, 1, 1, 1, 900, 1]))
    params = jax.tree.map(lambda x: x.astype(dtype), LIKE)

    def run(gradients):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(params), gradients)

    state, out = jax.jit(run)(gradients)
    assert avals(state) == avals(tx.init(params))
    assert all((x == 1).all() for x in jax.tree.leaves(state.spikes.count))
    assert not out["b"][4].any()
    batched, _ = jax.jit(jax.vmap(run))(jax.tree.map(lambda x: jnp.stack([x, x.at[4].set(x[0])]), gradients))
    count = batched.spikes.count if scope == "tree" else batched.spikes.count["b"]
    np.testing.assert_array_equal(jnp.ravel(count), [1, 0])


def test_sizes_are_of_64_bits_beside_such_leaves(x64):
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.float32)}
    assert mo.guarded(mo.sgd(0.1, 0.9), **OPTIONS).init(params).spikes.mean.dtype == jnp.float64
    by_leaf = mo.guarded(mo.sgd(0.1, 0.9), "leaf", **OPTIONS)
    state = by_leaf.init(params)
    assert [x.dtype for x in state.spikes.mean.values()] == [jnp.float64, jnp.float32]
    g = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.float32)}
    assert avals(by_leaf.update(g, state)[1]) == avals(state)


def test_injected_arguments_act_and_without_a_ratio_the_state_is_as_it_was():
    guard = optax.inject_hyperparams(mo.guarded)
    tx = guard(mo.scale_by_momentum(mo.heavy_ball(0.5)), max_ratio=4.0, warmup=3)
    step, state = jax.jit(tx.update), tx.init(LIKE)
    for g in signal([1.0] * 4):
        _, state = step(g, state)
    (ten,) = signal([10.0])
    for ratio, count in ((4.0, 1), (20.0, 0)):
        state.hyperparams["max_ratio"] = jnp.float32(ratio)
        _, after = step(ten, state)
        assert after.inner_state.spikes.count == count
    off = guard(mo.scale_by_momentum(mo.heavy_ball(0.5)))
    assert type(jax.jit(off.update)(ten, off.init(LIKE))[1].inner_state) is GuardedState
    assert GuardedState._fields == ("inner", "skipped", "finite")
    assert SpikeGuardedState._fields[:3] == GuardedState._fields


def test_a_missing_gradient_counts_in_no_norm_and_keeps_its_own_average():
    gradients = signal([1.0] * 5)
    tree, leaf = (mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.5)), s, **OPTIONS) for s in ("tree", "leaf"))
    for tx in (tree, leaf):
        state = tx.init(LIKE)
        for g in gradients:
            _, state = jax.jit(tx.update)({"a": g["a"], "b": None}, state)
        _, none = jax.jit(tx.update)({"a": None, "b": None}, state)
        assert_bit_equal(none, state)
        mean = state.spikes.mean if tx is tree else state.spikes.mean["a"]
        sizes = [float(jnp.linalg.norm(g["a"])) for g in gradients]
        np.testing.assert_allclose(jnp.squeeze(mean), Reference(sizes=tuple(sizes)).mean, rtol=1e-6)
    assert_bit_equal(state.spikes.mean["b"], jnp.zeros(1))


def test_a_leaf_that_skips_reaches_no_norm_of_the_others():
    tx = mo.guarded(optax.chain(optax.clip_by_global_norm(1.0), mo.scale_by_momentum(mo.heavy_ball(0.5))), "leaf")
    u, state = jax.jit(tx.update)({"a": jnp.full((2, 3), jnp.nan), "b": jnp.full(4, 0.25)}, tx.init(LIKE))
    np.testing.assert_array_equal(u["b"], np.full(4, 0.25))
    np.testing.assert_array_equal(mo.velocity(state)[0]["a"], np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_ratio": 1.0}, ValueError, r"max_ratio must be in \(1, inf\), got 1\.0"),
        ({"max_ratio": optax.constant_schedule(3.0)}, TypeError, "max_ratio must be a number or a scalar array"),
        ({"max_ratio": 3.0, "decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1\.0"),
        ({"max_ratio": 3.0, "warmup": 0}, ValueError, "warmup must be at least 1, got 0"),
        ({"max_ratio": 3.0, "max_consecutive": 2.5}, TypeError, r"max_consecutive must be a whole number, got 2\.5"),
        ({"max_ratio": 3.0, "measure": "loss"}, ValueError, "measure must be one of 'norm', 'value', got 'loss'"),
        (
            {"max_ratio": 3.0, "scope": "leaf", "measure": "value"},
            ValueError,
            "measure must be one of 'norm', got 'value'",
        ),
        ({"decay": 0.9, "warmup": 5}, ValueError, "max_ratio must be given with decay, warmup"),
    ],
)
def test_arguments_are_checked(options, error, words):
    with pytest.raises(error, match=words):
        mo.guarded(optax.identity(), **options)
