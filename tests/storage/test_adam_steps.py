"""Adam divides by an element's own size: no step is more than twice float32's longest because moments are in bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo

STEPS, B1, B2, EPS = 60, 0.9, 0.999, 1e-30
RNG = np.random.default_rng(0)


def noise(*shape):
    """Gradients of noise with a mean of a tenth of it."""
    return RNG.normal(size=(STEPS, *shape)) + 0.1 * RNG.normal(size=shape)


def with_rows(gradients, steps, factor):
    """Every third row times `factor` in these steps."""
    gradients[steps, ::3] *= factor
    return gradients


# Matrices of which a row is one scale, and several rows; shapes of a small transformer among them.
GRADIENTS = {
    "columns of unlike scale": noise(128, 256) * 10.0 ** np.linspace(0, -8, 256),
    "units that are all but dead": noise(64, 256) * 10.0 ** RNG.uniform(-12, 0, (64, 1)),
    "embedding": noise(512, 64) * (RNG.random((STEPS, 512, 1)) < 0.1),
    "attention": noise(64, 192) * 1e-2,
    "hidden": RNG.standard_t(2, (STEPS, 16, 512)),
    "bias": noise(8192) * 1e-3,
    "rows that wake up": with_rows(noise(16, 512), slice(1, 40), 0.0),
    "rows that grow": with_rows(noise(16, 512), slice(0, 40), 1e-6),
    "a spike": with_rows(noise(16, 512), slice(30, 31), 1e6),
}
FIELDS = {"mu in int8": {"mu": "int8"}, "nu in uint8 as well": {"mu": "int8", "nu": "uint8"}}


def adam(gradients):
    """The updates of Adam (Kingma and Ba, 2015) after each gradient, in float64."""
    m = v = np.zeros(gradients.shape[1:])
    updates = []
    for t, g in enumerate(gradients, 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        updates.append(m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS))
    return np.array(updates)


@pytest.fixture(scope="module", params=[pytest.param("mu in int8", marks=pytest.mark.slow), "nu in uint8 as well"])
def updates(request):
    tx = mo.compress(optax.scale_by_adam(B1, B2, EPS), FIELDS[request.param])
    signal = {name: jnp.asarray(g, jnp.float32) for name, g in GRADIENTS.items()}

    def run(signal):
        return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init({k: g[0] for k, g in signal.items()}),
                            signal)[1]  # fmt: skip

    return jax.tree.map(np.float64, jax.jit(run)(signal))


def over_writes(shares):
    """Values of these shares of their row's scale, as they are read after each of 4096 writes, over themselves."""
    storage = mo.storage.int8(min_size=1)
    exact = jnp.broadcast_to(jnp.asarray(shares, jnp.float32), (4096, len(shares)))
    before = storage.numbered(storage.init(exact, 1), exact)
    before = before._replace(reach=(jnp.ones((4096, 1)),))
    nothing = (jnp.zeros_like(exact), 0.0, True)
    for is_divided in (True, False):
        context = mo.storage.EncodeContext(None, (1.0,), nothing, is_divided)
        parts = storage.encode((exact,), before, context)
        yield np.float64(storage.state_type.decode(parts)[0]) / np.asarray(shares)


def test_what_is_divided_is_never_read_as_more_than_half_as_large_again():
    shares = np.concatenate([10.0 ** np.linspace(-8.4, 6, 500), 1.9 * 16.0 ** np.arange(-1, 11)])
    divided, summed = over_writes(shares)
    # The lowest codes of the root have dither of their own.
    foot = (shares < 0.0017) | (shares > 1)
    assert divided[:, foot].max() <= 1.5 * (1 + 1e-6)
    assert summed[:, foot].max() > 10
    assert not divided[:, shares < 1.5e-7].any()
    # Where levels are no farther apart it is right in the mean, as everything is in a sum.
    for kept, where in ((divided, (shares > 2.4e-7) & (shares < 1)), (summed, shares < 500)):
        spread = kept.std(0)[where] / 64
        assert np.all(abs(kept.mean(0)[where] - 1) < 4.5 * spread + 1e-3)


EIGHT = mo.storage.int8(min_size=1)
SIGNS = {
    "lion": lambda: mo.lion(1.0, weight_decay=None, storage=EIGHT),
    "signum": lambda: mo.signum(1.0, 0.99, storage=EIGHT),
    "mars_lion": lambda: mo.contrib.mars_lion(1.0, storage=EIGHT),
    "a chain with Lion's rule": lambda: optax.chain(
        mo.scale_by_momentum(mo.lion_mix(), storage=EIGHT), optax.scale_by_sign()
    ),
    "the same scaled": lambda: optax.chain(
        mo.scale_by_momentum(mo.lion_mix().scale(2.0).scale_gradient(3.0).change_basis(0.5), storage=EIGHT),
        optax.scale_by_sign(),
    ),
    "a scheduled decay": lambda: optax.chain(
        mo.scale_by_momentum(mo.lion_mix(lambda step: 0.9 - 0.0 * step).at(0), storage=EIGHT), optax.scale_by_sign()
    ),
    "micro-batches": lambda: mo.accumulated(mo.lion_mix(0.9, 0.9), 2, optax.scale_by_sign(), storage=EIGHT),
    "Signum of another library": lambda: mo.interop.signum(1.0, 0.99, storage=EIGHT),
}


@pytest.mark.parametrize("name", SIGNS)
def test_velocities_before_a_sign_are_rounded_as_those_that_are_divided(name):
    # A hundred millionth of their row's scale: a level above zero is fifty times as much.
    gradients = jnp.asarray(np.resize([1.0, 1e-8], (8, 512)), jnp.float32)
    tx = optax.with_extra_args_support(SIGNS[name]())
    state = tx.update(gradients, tx.init(gradients), gradients, previous_gradient=gradients)[1]
    (kept,) = mo.velocity(state)
    assert np.all(kept[:, ::2])
    assert not np.any(kept[:, 1::2])
    # Which is right on average, and what sums of steps need.
    summed = mo.scale_by_momentum(mo.ema(0.99), storage=EIGHT)
    assert np.any(mo.velocity(summed.update(gradients, summed.init(gradients))[1])[0][:, 1::2])


def test_a_first_moment_that_fills_has_room_to_grow():
    signal = jnp.asarray(RNG.normal(size=(8, 512)), jnp.float32)
    tx = mo.compress(optax.scale_by_adam(B1, B2), {"mu": mo.storage.int8(min_size=1)})
    step, state = jax.jit(tx.update), tx.init(signal)
    for t in range(1, 9):
        state = step(signal, state)[1]
        parts, exact = state.inner.mu.parts, (1 - B1**t) * np.float64(signal)
        error = np.linalg.norm(type(parts).decode(parts)[0] - exact) / np.linalg.norm(exact)
        assert error < 0.05, t


@pytest.mark.parametrize("name", GRADIENTS)
def test_no_step_is_more_than_twice_the_longest_of_float32(updates, name):
    exact = adam(GRADIENTS[name])
    assert abs(updates[name]).max() < 2 * abs(exact).max()
    # And it goes where Adam goes, where columns are not below what a byte can tell apart.
    if name != "columns of unlike scale" and "dead" not in name:
        assert (updates[name] * exact).sum() > 0.93 * np.linalg.norm(updates[name]) * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
def test_steps_of_gradients_that_never_change_are_hardly_ever_more_than_twice_as_long(kind):
    gradients = np.random.default_rng(0).normal(size=(64, 1024))
    constant = jnp.asarray(gradients if kind == "normal" else np.exp(3 * gradients), jnp.float32)
    # With both fields in bytes the longest is rare: what rounding `mu` gives at most times what rounding `nu` does.
    for fields, bound, share in zip(FIELDS.values(), (2.9, 2.9 * 2.1), (40e-6, 300e-6), strict=True):
        tx = mo.compress(optax.scale_by_adam(B1, B2), fields)

        def step(state, _, tx=tx):
            sizes, state = tx.update(constant, state)
            return state, (jnp.max(jnp.abs(sizes)), jnp.sum(jnp.abs(sizes) > 2))

        longest, count = jax.jit(lambda tx=tx, step=step: jax.lax.scan(step, tx.init(constant), None, 1000)[1])()
        assert longest.max() < bound
        assert count.sum() < share * 1000 * constant.size
