"""A rule inside Optax's wrappers, each against a NumPy loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, gradients, own_jit

import momentum_optax as mo

B, NU = 0.9, 0.7
LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
SIGNAL = [gradients(LIKE, seed) for seed in range(6)]
TX = mo.scale_by_momentum(mo.quasi_hyperbolic(B, NU))


def oracle(signal):
    """The updates of quasi-hyperbolic momentum, from the paper's two lines."""
    v, out = 0.0, []
    for g in map(np.float64, signal):
        v = B * v + (1 - B) * g
        out.append((1 - NU) * g + NU * v)
    return out


def run(tx, signal=None, params=None):
    """The updates of a compiled transformation, and the last state."""
    params = LIKE if params is None else params
    state, step, out = tx.init(params), own_jit(tx.update), []
    for g in SIGNAL if signal is None else signal:
        u, state = step(g, state, params)
        out.append(u)
    assert step._cache_size() == 1
    return out, state


def assert_close(got, expected):
    np.testing.assert_allclose(got, np.array(expected), rtol=1e-5, atol=1e-6)


def column(trees, name):
    return [tree[name] for tree in trees]


def test_in_a_chain_the_rule_sees_what_stands_before_it_and_feeds_what_stands_after():
    params = jax.tree.map(lambda x: x + 2.0, LIKE)
    tx = optax.chain(optax.clip(0.5), optax.add_decayed_weights(0.1), TX, optax.scale(-3.0))
    out, state = run(tx, params=params)
    for name in LIKE:
        seen = [np.clip(np.float64(g), -0.5, 0.5) + 0.1 * 2.0 for g in column(SIGNAL, name)]
        assert_close(column(out, name), [-3.0 * u for u in oracle(seen)])
    assert len(mo.velocity(state)) == 1


def test_two_rules_in_a_chain_are_applied_one_after_the_other():
    out, state = run(optax.chain(TX, TX))
    assert_close(column(out, "b"), oracle(oracle(column(SIGNAL, "b"))))
    assert len(mo.velocity(state)) == 2


@pytest.mark.parametrize(
    "mask", [{"a": True, "b": False}, lambda tree: {"a": True, "b": False}], ids=["tree", "function"]
)
def test_masked_leaves_pass_through_and_the_others_follow_the_rule(mask):
    out, state = run(optax.masked(TX, mask))
    assert_close(column(out, "a"), oracle(column(SIGNAL, "a")))
    for u, g in zip(out, SIGNAL, strict=True):
        np.testing.assert_array_equal(u["b"], g["b"])
    (v,) = mo.velocity(state)
    assert jax.tree.leaves(v["b"]) == []


def test_nested_masks_leave_only_what_both_let_through():
    tx = optax.masked(optax.masked(TX, {"a": True, "b": optax.MaskedNode()}), {"a": True, "b": False})
    out, _ = run(tx)
    assert_close(column(out, "a"), oracle(column(SIGNAL, "a")))
    np.testing.assert_array_equal(column(out, "b"), column(SIGNAL, "b"))


def test_partition_gives_each_leaf_its_own_rule():
    other = mo.scale_by_momentum(mo.heavy_ball(0.5), debias=True)
    out, state = run(optax.partition({"qhm": TX, "ball": other}, {"a": "qhm", "b": "ball"}))
    assert_close(column(out, "a"), oracle(column(SIGNAL, "a")))
    v, expected = 0.0, []
    for t, g in enumerate(map(np.float64, column(SIGNAL, "b"))):
        v = 0.5 * v + g
        expected.append(v / sum(0.5**i for i in range(t + 1)))
    assert_close(column(out, "b"), expected)
    assert len(mo.velocity(state)) == 2


@pytest.mark.one_in(4)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("storage", STORAGES)
def test_multi_steps_with_any_storage_is_the_rule_on_averaged_gradients(k, storage):
    # Small whole numbers and halves: every mean and velocity is exact in float32, so each storage sees the same ones.
    tx = mo.scale_by_momentum(mo.grokfast(0.5, 2.0), storage=storage)
    signal = [jax.tree.map(lambda g: jnp.round(8 * g), g) for g in SIGNAL]
    means = [jax.tree.map(lambda *g: sum(g) / k, *signal[i : i + k]) for i in range(0, len(signal), k)]
    out, expected = run(optax.MultiSteps(tx, k), signal)[0], run(tx, means)[0]
    for i, u in enumerate(out):
        for name in LIKE:
            np.testing.assert_array_equal(u[name], 0 * u[name] if (i + 1) % k else expected[i // k][name])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("k", [2, 3])
def test_multi_steps_averages_its_gradients_for_the_rule(k):
    out, _ = run(optax.MultiSteps(TX, k))
    means = np.float64(column(SIGNAL, "b")).reshape(-1, k, 4).mean(1)
    assert_close(column(out[k - 1 :: k], "b"), oracle(means))


def test_injected_arguments_follow_a_change_by_hand_and_a_schedule():
    def rule(decay, nu):
        return mo.scale_by_momentum(mo.quasi_hyperbolic(decay, nu))

    def nu_at(step):
        return 0.5 + 0.1 * step

    tx = optax.inject_hyperparams(rule, hyperparam_dtype=jnp.float32)(decay=0.9, nu=nu_at)
    state, step = tx.init(LIKE), jax.jit(tx.update)
    v, decays = 0.0, [0.9, 0.9, 0.5, 0.5, 0.99, 0.99]
    for t, (g, decay) in enumerate(zip(SIGNAL, decays, strict=True)):
        state.hyperparams["decay"] = jnp.float32(decay)
        u, state = step(g, state, LIKE)
        v = decay * v + (1 - decay) * np.float64(g["b"])
        assert_close(u["b"], (1 - nu_at(t)) * np.float64(g["b"]) + nu_at(t) * v)
    assert step._cache_size() == 1


def test_apply_if_finite_leaves_out_the_bad_steps():
    spoilt = [*SIGNAL[:2], jax.tree.map(lambda g: g * jnp.nan, SIGNAL[2]), *SIGNAL[3:]]
    out, state = run(optax.apply_if_finite(TX, 2), spoilt)
    good = [u for i, u in enumerate(out) if i != 2]
    assert_close(column(good, "a"), oracle(column(SIGNAL[:2] + SIGNAL[3:], "a")))
    np.testing.assert_array_equal(out[2]["a"], 0.0)
    assert int(state.total_notfinite) == 1


def test_ages_of_leaves_unfrozen_later_are_their_own():
    # With debiasing the first update of each leaf is its first gradient, whenever that comes.
    tx = mo.scale_by_momentum(mo.ema(B), debias=True)
    state = tx.init(LIKE)
    for g in SIGNAL[:3]:
        _, state = tx.update({**g, "b": None}, state)
    u, _ = tx.update(SIGNAL[3], state)
    assert_close(u["b"], SIGNAL[3]["b"])
    weights = np.array([(1 - B) * B ** (3 - i) for i in range(4)])
    assert_close(u["a"], np.tensordot(weights / weights.sum(), np.float64(column(SIGNAL[:4], "a")), 1))


def test_the_wrapped_rule_passes_extra_arguments_by():
    tx = optax.chain(TX, optax.scale(1.0))
    u, _ = tx.update(SIGNAL[0], tx.init(LIKE), LIKE, value=1.0, unknown=None)
    assert_close(u["b"], oracle(column(SIGNAL[:1], "b"))[0])
