"""Workers with one quadratic each, trained under `vmap` and by a loop in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

WORKERS = 4
RATE = 0.05


def problem(seed=0):
    """One quadratic per worker: curvatures and minima, of shape (workers, 3, 5)."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2, 2, size=(WORKERS, 3, 5)), rng.normal(size=(WORKERS, 3, 5))


def local_steps(x, curvature, minimum, count):
    for _ in range(count):
        x = x - RATE * curvature * (x - minimum)
    return x


def rounds(kind, *, count=12, inner=5, weights=None, extra=(), dtype=np.float64):
    """The anchor after each exchange, workers under `vmap`; and the last state, parameters of every worker."""
    curvature, minimum = (jnp.asarray(a, dtype) for a in problem())
    start = {"w": jnp.ones((3, 5), dtype)}
    # Anchor and momentum are the same on all workers; residuals differ.
    state = jax.vmap(kind.init, axis_size=WORKERS)(jax.tree.map(lambda a: jnp.stack([a] * WORKERS), start))

    @functools.partial(jax.vmap, axis_name="workers")
    def go(params, state, problem, weight, arguments):
        params = {"w": local_steps(params["w"], *problem, inner)}
        return kind.sync(params, state, axis_name="workers", weight=weight, **arguments)

    params = jax.tree.map(lambda a: jnp.stack([a] * WORKERS), start)
    anchors = []
    for t in range(count):
        weight = jnp.ones(WORKERS) if weights is None else jnp.asarray(weights[t])
        arguments = {k: jnp.full(WORKERS, v[t]) for k, v in dict(extra).items()}
        params, state = jax.jit(go)(params, state, (curvature, minimum), weight, arguments)
        for leaf in jax.tree.leaves((state.anchor, state.momentum)):
            np.testing.assert_array_equal(leaf[0], leaf[-1], err_msg="all workers hold the same")
        anchors.append(np.asarray(state.anchor["w"][0], np.float64))
    return anchors, state, params


def loop(move, count=12, inner=5, weights=None):
    """The same in NumPy: `move(x, mean of what the workers reached, t)` gives the next common point."""
    curvature, minimum = problem()
    x, found = np.ones((3, 5)), []
    for t in range(count):
        weight = np.ones(WORKERS) if weights is None else np.asarray(weights[t], float)
        ends = local_steps(np.stack([x] * WORKERS), curvature, minimum, inner)
        if weight.sum():
            x = move(x, np.tensordot(weight, ends, 1) / weight.sum(), t)
        found.append(x)
    return found


def assert_follows(kind, move, **arguments):
    found = rounds(kind, **arguments)[0]
    expected = loop(move, weights=arguments.get("weights"))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


class Velocity:
    """A velocity that persists between rounds."""

    value = 0.0


def exchanged(kind, params, weight=None, **arguments):
    """The state after one exchange of workers that all start at zero, compiled."""
    state = jax.vmap(kind.init)(jax.tree.map(jnp.zeros_like, params))
    weight = jnp.ones(WORKERS) if weight is None else weight
    go = jax.vmap(lambda p, s, w: kind.exchange(p, s, axis_name="workers", weight=w, **arguments), axis_name="workers")
    return jax.jit(go)(params, state, weight)
