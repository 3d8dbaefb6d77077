"""`sgd`, `lion` and `signum` in place of Optax's: arguments, steps and state."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo

EPS, BF16 = 2.0**-24, 2.0**-9  # half a unit in the last place of float32 and bfloat16, relative


@pytest.mark.parametrize("name", ["sgd", "lion", "signum"])
def test_arguments_have_optax_s_names_order_and_defaults(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (mo, optax))
    shown = [(p.name, p.default, p.kind) for p in theirs]
    assert [(p.name, p.default, p.kind) for p in ours][: len(shown)] == shown
    assert all(p.kind == p.KEYWORD_ONLY for p in list(ours)[len(shown) :])


def normal(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("w", (6, 4)), ("b", (5,)))}


PARAMS = normal(0)
SIGNAL = jax.tree.map(lambda *x: jnp.stack(x), *map(normal, range(1, 13)))


def updates(tx):
    """The updates of twelve compiled steps, and the last state."""

    def step(state, g):
        u, state = tx.update(g, state, PARAMS)
        return state, u

    state, out = jax.jit(lambda: jax.lax.scan(step, tx.init(PARAMS), SIGNAL))()
    return out, state


def size(state):
    """Bytes of everything that has the size of a parameter."""
    return sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)


SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)

GRID = itertools.product(
    (0.1, SCHEDULE), (None, 0.0, 0.9, 1.0), (False, True), (None, jnp.float32, jnp.bfloat16, "bfloat16")
)

# A schedule of the rate and the other ways to say a dtype are slow tests.
GRID = [
    pytest.param(*row, marks=pytest.mark.slow if row[0] is SCHEDULE or row[3] in (jnp.float32, "bfloat16") else ())
    for row in GRID
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("rate", "momentum", "nesterov", "dtype"), GRID)
def test_sgd_is_optax_s_over_its_whole_option_grid(rate, momentum, nesterov, dtype):
    arguments = (rate, momentum, nesterov, dtype)
    # Positionally, as a program that says optax.sgd may.
    (got, ours), (expected, theirs) = updates(mo.sgd(*arguments)), updates(optax.sgd(*arguments))
    decay = momentum or 0.0
    # Each of twelve steps rounds a product and a sum; in bfloat16 Optax also rounds the decayed and the kept velocity.
    # What a step adds to the error decays with the velocity.
    unit = 4 * EPS + (2 * BF16 if dtype in (jnp.bfloat16, "bfloat16") and decay else 0)
    for name in PARAMS:
        largest = sum(decay**k for k in range(12)) * float(jnp.abs(SIGNAL[name]).max()) * 0.1 * (1 + decay)
        bound = unit * sum(decay**k for k in range(12)) * largest
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=bound)
        assert got[name].dtype == expected[name].dtype
    # A momentum of 0 keeps nothing here.
    assert size(ours) == (size(theirs) if momentum else 0)


def test_a_bfloat16_accumulator_rounds_to_nearest_as_optax_s():
    for name, options in (("sgd", (0.9, False)), ("signum", (0.9,)), ("lion", (0.9, 0.9))):
        ours, theirs = (getattr(module, name)(0.1, *options, jnp.bfloat16) for module in (mo, optax))
        state, other = (tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1] for tx in (ours, theirs))
        (v,) = mo.velocity(state)
        expected = next(x for x in jax.tree.leaves(other) if x.dtype == jnp.bfloat16 and x.shape == (5,))
        np.testing.assert_array_equal(v["b"], expected.astype(jnp.float32))
        # Neither a counter nor noise: that rounding to nearest needs none.
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["lion", "signum"])
def test_sign_methods_keep_their_velocity_in_optax_s_dtype(name, dtype):
    place = {"lion": (0.1, 0.8, 0.7, dtype), "signum": (0.1, 0.8, dtype)}[name]
    (got, ours), (expected, theirs) = updates(getattr(mo, name)(*place)), updates(getattr(optax, name)(*place))
    for leaf in PARAMS:
        # A sign differs only where what it is taken of is as small as the rounding.
        same = abs(got[leaf] - expected[leaf]) < 1e-6
        assert np.mean(same) >= (1 if dtype != jnp.bfloat16 else 0.97)
    assert size(ours) == size(theirs)


def test_sgd_has_no_velocity_and_decays_nothing_by_default():
    assert mo.velocity(mo.sgd(0.1).init(PARAMS)) == ()
    u, _ = mo.sgd(0.1).update(PARAMS, mo.sgd(0.1).init(PARAMS))
    jax.tree.map(lambda x, p: np.testing.assert_array_equal(x, -0.1 * p), u, PARAMS)
