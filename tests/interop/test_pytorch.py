"""PyTorch's `SGD` and timm's `SGDW`: errors, first steps, scheduled momenta and dampening."""

import jax.numpy as jnp
import numpy as np
import pytest
from interop.dialect_calls import START, STEPS, descend, follow, gradient

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("torch_sgd", {"lr": -0.1}, ValueError, r"lr must be in \[0, inf\), got -0.1"),
        ("torch_sgd", {"momentum": -0.5}, ValueError, r"momentum must be in \[0, inf\), got -0.5"),
        ("torch_sgd", {"weight_decay": -1.0}, ValueError, "weight_decay must be"),
        ("torch_sgd", {"nesterov": True}, ValueError, "nesterov needs a momentum above 0 and dampening 0"),
        ("torch_sgd", {"momentum": 0.9, "nesterov": True, "dampening": 0.1}, ValueError, "nesterov needs a momentum"),
        ("torch_sgd", {"momentum": lambda t: 0.0 * t, "dampening": 0.1}, ValueError, "starts at 0, got 0.1"),
        ("torch_sgd", {"momentum": 0.9, "nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ("torch_sgd", {"maximize": "yes"}, TypeError, "maximize must be True or False, got 'yes'"),
        ("torch_sgd", {"lr": None}, TypeError, "lr must be a number, a scalar array or a schedule"),
        ("timm_sgdw", {"nesterov": True}, ValueError, "nesterov needs"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)


@pytest.mark.parametrize("name", ["torch_sgd", "timm_sgdw", "apex_sgd", "flash_sgd"])
def test_without_momentum_dampening_does_nothing_as_in_pytorch(name):
    function = getattr(interop, name)
    plain, damped = function(lr=0.1), function(lr=0.1, momentum=0.0, dampening=0.3)
    np.testing.assert_array_equal(follow(damped), follow(plain))
    assert mo.velocity(damped.init(jnp.ones(3))) == ()


@pytest.mark.parametrize("late", [0, 3])
def test_first_steps_are_undampened_per_parameter_or_per_run_or_never(late, x64):
    def reference(first):
        x, v, out = START, 0.0, []
        for t in range(STEPS):
            if t >= late:
                g = gradient(x, t)
                v = 0.9 * v + (1.0 if t == first else 0.6) * g
                x = x - 0.05 * v
            out.append(x)
        return out

    for name, first in (("torch_sgd", late), ("timm_sgdw", late), ("apex_sgd", 0), ("flash_sgd", -1)):
        got = descend(getattr(interop, name)(lr=0.05, momentum=0.9, dampening=0.4), first=late)
        np.testing.assert_allclose(got, reference(first), rtol=1e-12, err_msg=name)


def test_a_momentum_of_zero_for_a_while_leaves_the_buffer_as_it_is(x64):
    def momentum(t):
        return 0.9 * ((t < 5) | (t > 9))

    tx = interop.torch_sgd(0.05, lambda t: 0.9 * ((t < 5) | (t > 9)))
    p = {"x": jnp.asarray(START)}
    state, buffer = tx.init(p), None
    for t in range(14):
        g, m = gradient(START, t), momentum(t)
        if m:
            buffer = g if buffer is None else m * buffer + g
        u, state = tx.update({"x": jnp.asarray(g)}, state, p)
        np.testing.assert_allclose(u["x"], -0.05 * (buffer if m else g), rtol=1e-13)
        np.testing.assert_allclose(mo.velocity(state)[0]["x"], buffer, rtol=1e-13)


def test_a_scheduled_dampening_acts_on_nesterov_as_torchs_arithmetic_has_it(x64):
    # PyTorch checks the pair when it is built; a group that is changed later is not refused.
    def dampening(t):
        return 0.5 - 0.01 * t

    for momentum in (0.9, lambda t: 0.9 - 0.01 * t):
        x, v, expected = START, None, []
        for t in range(STEPS):
            m = momentum(t) if callable(momentum) else momentum
            g = gradient(x, t)
            v = g if v is None else m * v + (1 - dampening(t)) * g
            x = x - 0.05 * (g + m * v)
            expected.append(x)
        got = descend(interop.torch_sgd(0.05, momentum, dampening, nesterov=True))
        np.testing.assert_allclose(got, expected, rtol=1e-12)
