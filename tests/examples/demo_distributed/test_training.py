"""The computations of the workers against NumPy in float64, written from the methods' own forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
from jax.sharding import Mesh
from small_network import SETTINGS

import momentum_optax as mo
from examples.demo_distributed import traffic, training


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_shards_are_disjoint_and_complete(workers):
    images, labels = np.arange(10), np.arange(10) % 3
    found = training.shards(images, labels, workers)
    assert len(found) == workers
    assert sorted(np.concatenate([x for x, _ in found])) == list(range(10))
    assert max(len(x) for x, _ in found) - min(len(x) for x, _ in found) <= 1
    for x, y in found:
        np.testing.assert_array_equal(y, x % 3)


def test_a_worker_takes_every_image_before_it_takes_one_again():
    rows = training.order(SETTINGS, 1, 30)
    assert rows.shape == (3, 5, 8)
    flat = rows.reshape(-1)
    for epoch in (flat[:30], flat[30:60], flat[60:90], flat[90:120]):
        assert sorted(epoch) == list(range(30))
    np.testing.assert_array_equal(rows, training.order(SETTINGS, 1, 30))
    assert (rows != training.order(SETTINGS, 2, 30)).any()
    assert (rows != training.order(SETTINGS._replace(seed=1), 1, 30)).any()


def rate(step, peak=0.1, total=15):
    """No warm-up to speak of: one step; then half a cosine to zero at `total` + 1."""
    return 0.0 if step == 0 else peak * 0.5 * (1 + np.cos(np.pi * (step - 1) / (total + 1 - 1)))


def numpy_gradient(params, images, labels):
    x = images.reshape(len(images), -1).astype(np.float64)
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return {"b": p.mean(0), "w": x.T @ p / len(x)}


def numpy_steps(params, gradients_at):
    return numpy_path(params, gradients_at)[-1]


def numpy_path(params, gradients_at):
    """The weights after each step."""
    params, path = {k: np.asarray(p, np.float64) for k, p in params.items()}, []
    velocity = {k: np.zeros_like(p) for k, p in params.items()}
    for step, gradient_at in enumerate(gradients_at):
        g = gradient_at(params)
        clip = min(1.0, 1 / np.sqrt(sum((x**2).sum() for x in g.values())))
        for k in params:
            velocity[k] = 0.9 * velocity[k] + clip * g[k]
            params[k] = params[k] - rate(step) * (clip * g[k] + 0.9 * velocity[k])
        path.append(dict(params))
    return path


def start():
    """Parameters, inner and outer state, images, labels; with an axis of workers where each has its own."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype) * 0.1, small_network.PARAMS)
    each = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * 4))
    outer = training.outer().init(params)
    images = rng.normal(size=(4, 5, 8, 7, 1)).astype(np.float32)
    labels = rng.integers(0, 9, size=(4, 5, 8))
    inner, every_step = (tx.init(params) for tx in (training.inner(SETTINGS), training.every_step(SETTINGS)))
    return params, every_step, each(params), each(inner), outer._replace(residual=each(outer.residual)), images, labels


@functools.cache
def compiled():
    """The three programs, compiled for four devices."""
    mesh = Mesh(np.asarray(jax.devices()[:4]), (training.AXIS,))
    local, meet, step = training.programs(mesh, SETTINGS, small_network.apply)
    params, state, each_params, each_inner, outer, images, labels = start()

    return training.Programs(
        local.lower(each_params, each_inner, images, labels).compile(),
        meet.lower(each_params, outer).compile(),
        step.lower(params, state, images[:, 0], labels[:, 0]).compile(),
    )


@pytest.mark.slow
def test_a_step_on_all_devices_is_one_on_all_images():
    programs = compiled()
    params, state, *_, images, labels = start()
    path = numpy_path(
        params,
        [
            functools.partial(numpy_gradient, images=images[:, t].reshape(32, 7), labels=labels[:, t].reshape(-1))
            for t in range(5)
        ],
    )
    params, state = jax.tree.map(jnp.copy, (params, state))
    for t in range(5):
        params, state = programs.step(params, state, images[:, t], labels[:, t])
    averaged, average = mo.averaged_params(state, params), small_network.average(path)
    for k, found in params.items():
        np.testing.assert_allclose(found, path[-1][k], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(averaged[k], average[k], rtol=2e-5, atol=2e-6)
        assert abs(average[k] - path[-1][k]).max() > 1e-3


@pytest.mark.slow
def test_a_round_is_steps_alone_and_a_meeting():
    programs = compiled()
    params, _, each_params, each_inner, outer, images, labels = start()
    ends = [
        numpy_steps(params, [functools.partial(numpy_gradient, images=x, labels=y) for x, y in zip(*own, strict=True)])
        for own in zip(images, labels, strict=True)
    ]
    each_params, _ = programs.local(each_params, each_inner, images, labels)
    for k, found in each_params.items():
        np.testing.assert_allclose(found, [end[k] for end in ends], rtol=2e-5, atol=2e-6)
    each_params, outer = programs.meet(each_params, outer)
    for k, found in outer.anchor.items():
        gone = np.asarray(params[k], np.float64) - np.stack([end[k] for end in ends])
        # The first meeting of Nesterov's method at decay 0.9; a worker's numbers are off by half a code at most.
        expected = params[k] - 0.7 * 1.9 * gone.mean(0)
        code = abs(gone).reshape(4, -1, 9).max((0, 2)).reshape(-1, 1) / 127
        assert (abs(found - expected) <= 0.7 * 1.9 * code.reshape(-1, *(1,) * (found.ndim - 1)) / 2 + 5e-6).all()
        for own in each_params[k]:
            np.testing.assert_array_equal(own, found)


def test_bytes_of_the_compiled_programs_are_those_planned():
    found = {name: traffic.collectives(run.as_text()) for name, run in compiled()._asdict().items()}
    assert found["local"] == [], "nothing is sent between meetings"
    assert {one.kind for one in found["step"]} == {"all-reduce"}
    assert {one.kind for one in found["meet"]} == {"all-gather", "all-reduce"}
    bytes_of = {name: sum(traffic.sent(one, 4) for one in every) for name, every in found.items()}
    assert bytes_of["step"] == traffic.gradient_bytes(small_network.PARAMS, 4)
    # What each worker counts for: a number for each of two leaves from each, and two sums.
    assert 0 < bytes_of["meet"] - traffic.exchange_bytes(small_network.PARAMS, 4) <= 2 * 4 * 3 + 2 * 6
