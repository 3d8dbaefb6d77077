"""Training with Flax, NNX and Linen, against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax_models import as_pure, digits, loss

import momentum_optax as mo

STEPS = 40


def torch_nesterov(v, g):
    v = 0.9 * v + g
    return v, g + 0.9 * v


def damped_heavy_ball(v, g, first):
    v = g if first else 0.9 * v + 0.7 * g
    return v, v


def debiased_ema(v, g, t):
    v = 0.8 * v + 0.2 * g
    return v, v / (1 - 0.8 ** (t + 1))


OPTIMIZERS = {
    "sgd": (lambda: mo.sgd(0.1, 0.9, nesterov=True), lambda v, g, t: torch_nesterov(v, g)),
    "damped": (lambda: mo.sgd(0.1, 0.9, dampening=0.3), lambda v, g, t: damped_heavy_ball(v, g, t == 0)),
    "debiased": (
        lambda: optax.chain(mo.scale_by_momentum(mo.ema(0.8), debias=True), optax.scale_by_learning_rate(0.1)),
        debiased_ema,
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.cache
def numpy_training(name):
    """Losses before each step of softmax regression from zero, and the last parameters, in float64."""
    x, y = map(np.float64, digits())
    x = np.hstack([x, np.ones((len(x), 1))])
    w = v = np.zeros((65, 10))
    losses = []
    for t in range(STEPS):
        logits = x @ w
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(-(y * log_p).sum(1).mean())
        v, u = OPTIMIZERS[name][1](v, x.T @ (np.exp(log_p) - y) / len(x), t)
        w = w - 0.1 * u
    return np.array(losses), w


def check_training(name, losses, kernel, bias):
    expected, w = numpy_training(name)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # A sum of 40 float32 steps of at most 1 in size.
    np.testing.assert_allclose(np.vstack([kernel, bias]), w, rtol=0, atol=STEPS * 2.0**-24)
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.one_in(4)
@every_optimizer
def test_an_nnx_optimizer_trains_as_numpy_does(name):
    x, y = map(jnp.asarray, digits())
    model = nnx.Linear(64, 10, kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name][0](), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: loss(m(x), y))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    check_training(name, losses, model.kernel[...], model.bias[...])
    (velocity,) = mo.velocity(as_pure(optimizer.opt_state))
    assert velocity["kernel"].shape == (64, 10)


@pytest.mark.one_in(2)
@every_optimizer
def test_a_linen_train_state_trains_as_numpy_does(name):
    x, y = map(jnp.asarray, digits())
    model = nn.Dense(10, kernel_init=nn.initializers.zeros_init())
    params = model.init(jax.random.key(0), x)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZERS[name][0]())

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        value, grads = jax.value_and_grad(lambda p: loss(state.apply_fn(p, x), y))(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(STEPS):
        state, value = step(state)
        losses.append(float(value))
    check_training(name, losses, state.params["params"]["kernel"], state.params["params"]["bias"])


@pytest.mark.slow
def test_an_nnx_model_can_freeze_a_part_and_keep_bf16_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.frozen = nnx.Linear(4, 4, rngs=rngs)
            self.trained = nnx.Linear(4, 1, param_dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x):
            return self.trained(self.frozen(x))

    model = Model(nnx.Rngs(0))
    only = nnx.All(nnx.Param, nnx.PathContains("trained"))
    optimizer = nnx.Optimizer(model, mo.sgd(0.1, 0.9), wrt=only)
    before = as_pure(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda m: (m(jnp.ones((2, 4))) ** 2).mean(), argnums=nnx.DiffState(0, only))(model)
    optimizer.update(model, grads)
    after = as_pure(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before["frozen"], after["frozen"])
    assert (np.float32(before["trained"]["kernel"]) != np.float32(after["trained"]["kernel"])).all()
    assert after["trained"]["kernel"].dtype == jnp.bfloat16
    (velocity,) = mo.velocity(as_pure(optimizer.opt_state))
    assert set(velocity) == {"trained"}
    assert velocity["trained"]["kernel"].dtype == jnp.float32
