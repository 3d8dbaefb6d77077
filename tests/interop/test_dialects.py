"""The dialects: their errors, their events, and those whose library is not on PyPI against its own two lines."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals

import momentum_optax as mo

interop = mo.interop
STEPS = 40
START = np.array([1.0, -0.7, 1.9, 0.4])

# A dialect that is called, and for each argument another value under which the steps must differ.
CALLS = {
    "torch_sgd": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ),
    "timm_sgdw": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ),
    "apex_sgd": (
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {
            "lr": 0.2,
            "momentum": 0.8,
            "dampening": 0.5,
            "weight_decay": 0.2,
            "nesterov": True,
            "wd_after_momentum": True,
        },
    ),
    "flash_sgd": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True},
    ),
    "heavyball_sgd": ({}, {"lr": 0.2, "beta": 0.8, "weight_decay": 0.1}),
    "keras_sgd": (
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ),
    "tf1_momentum": (
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.2, "momentum": 0.8, "use_nesterov": True},
    ),
    "caffe_sgd": ({"base_lr": 0.1, "momentum": 0.9}, {"base_lr": 0.2, "momentum": 0.8, "weight_decay": 0.1}),
    "qhoptim_qhm": (
        {"lr": 0.1, "momentum": 0.9, "nu": 0.7, "weight_decay": 0.1},
        {"lr": 0.2, "momentum": 0.8, "nu": 0.6, "weight_decay": 0.2, "weight_decay_type": "direct"},
    ),
    "aggmo": ({"lr": 0.1}, {"lr": 0.2, "betas": (0.0, 0.9), "weight_decay": 0.1}),
    "accsgd": ({"lr": 0.1}, {"lr": 0.2, "kappa": 100.0, "xi": 5.0, "smallConst": 0.5, "weight_decay": 0.1}),
    "mass": ({}, {"lr": 0.2, "alpha": 0.1, "kappa_t": 5.0}),
    "lion": ({}, {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.1, "maximize": True}),
    "signum": (
        {"weight_decay": 0.5},
        {"lr": 0.2, "momentum": 0.3, "weight_decay": 0.1, "weight_decouple": False, "maximize": True},
    ),
    "muon_average": ({}, {"momentum": 0.8, "nesterov": False}),
    "muon_sum": ({}, {"momentum": 0.8, "nesterov": True}),
}
# One allowed value only: everything else is refused.
FIXED = {("caffe_sgd", "regularization_type")}
# How PyTorch computes: arguments that change no number, there or here.
IGNORED = {"foreach", "differentiable", "fused", "capturable"}

every = pytest.mark.parametrize("name", CALLS)


def gradient(x, t):
    return np.array([0.9, 1.3, 0.7, 1.1]) * (x - 0.3) + 0.2 * x**3 + 0.3 * np.array([(-1) ** t, 0, 0.5, (t % 3) - 1])


def descend(tx, steps=STEPS, first=0):
    """The parameters after each step, from `START`; gradients of None before step `first`."""
    x = {"x": jnp.asarray(START)}
    state, out = tx.init(x), []
    for t in range(steps):
        g = None if t < first else jnp.asarray(gradient(np.asarray(x["x"]), t))
        u, state = tx.update({"x": g}, state, x)
        x = mo.apply_updates(x, u)
        out.append(np.asarray(x["x"]))
    return np.array(out)


def follow(tx, steps=8):
    """The updates for given gradients of either sign, at parameters that stay."""
    x, rng, out = jnp.asarray(START), np.random.default_rng(0), []
    state = tx.init(x)
    for _ in range(steps):
        u, state = tx.update(jnp.asarray(rng.normal(size=x.shape), x.dtype), state, x)
        out.append(u)
    return np.array(out)


def test_every_dialect_has_a_row():
    from momentum_optax.interop.dialect import DIALECTS

    assert set(CALLS) == set(DIALECTS)
    assert set(CALLS) == {n for n, f in vars(interop).items() if "storage" in _parameters(f)}


def _parameters(f):
    return inspect.signature(f).parameters if inspect.isfunction(f) else {}


@every
def test_every_argument_changes_the_steps(name):
    base, others = CALLS[name]
    function = getattr(interop, name)
    arguments = set(_parameters(function)) - {"storage"} - {a for d, a in FIXED if d == name} - IGNORED
    assert set(others) == arguments
    before = follow(function(**base))
    for argument, value in others.items():
        after = follow(function(**{**base, argument: value}))
        assert abs(after - before).max() > 1e-6, argument


@every
def test_an_argument_that_the_dialect_does_not_have_is_refused(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'caution'"):
        getattr(interop, name)(**CALLS[name][0], caution=True)


@pytest.mark.parametrize("name", ["torch_sgd", "timm_sgdw", "lion"])
def test_how_pytorch_computes_is_accepted_and_ignored(name):
    function, base = getattr(interop, name), CALLS[name][0]
    before = follow(function(**base))
    for argument in IGNORED:
        for value in (None, False, True):
            np.testing.assert_array_equal(follow(function(**base, **{argument: value})), before)
        with pytest.raises(TypeError, match=f"{argument} must be True or False, got 'yes'"):
            function(**base, **{argument: "yes"})


class Tensor:
    """What of PyTorch's tensors is looked at."""

    def __init__(self, value):
        self.value, self.dtype = np.float32(value), "torch.float32"
        self.shape = self.value.shape

    def detach(self):
        return self

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return np.array(self.value, dtype)


@every
def test_a_rate_may_be_a_tensor_of_one_element(name, x64):
    base, others = CALLS[name]
    rate = next((key for key in ("lr", "learning_rate", "base_lr") if key in others), None)
    if rate is None:
        pytest.skip("it has no rate")
    function = getattr(interop, name)
    expected = follow(function(**{**base, rate: float(np.float32(0.1))}))
    for value in (0.1, [0.1]):
        np.testing.assert_array_equal(follow(function(**{**base, rate: Tensor(value)})), expected)
    with pytest.raises(ValueError, match=r"a tensor must have one element to be a hyperparameter, got shape \(2,\)"):
        function(**{**base, rate: Tensor([0.1, 0.2])})


@pytest.mark.parametrize("name", ["torch_sgd", "timm_sgdw", "apex_sgd", "flash_sgd"])
def test_without_momentum_dampening_does_nothing_as_in_pytorch(name):
    function = getattr(interop, name)
    plain, damped = function(lr=0.1), function(lr=0.1, momentum=0.0, dampening=0.3)
    np.testing.assert_array_equal(follow(damped), follow(plain))
    assert mo.velocity(damped.init(jnp.ones(3))) == ()


@every
def test_a_storage_without_a_momentum_to_keep_is_refused(name):
    others = CALLS[name][1]
    if "momentum" not in others or name.startswith(("tf1", "qhoptim", "muon")):
        pytest.skip("it always keeps a velocity")
    base = {key: value for key, value in CALLS[name][0].items() if key != "momentum"}
    with pytest.raises(ValueError, match="storage needs a momentum to keep, got 'int8' and momentum 0"):
        getattr(interop, name)(**base, momentum=0.0, storage="int8")


@every
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_the_velocity_can_be_kept_in_any_storage(name, storage):
    tx = getattr(interop, name)(**CALLS[name][0], storage=storage)
    params = {"w": jnp.ones((64, 128))}
    states = [s for s in tx.init(params) if isinstance(s, mo.transform.MomentumState)]
    (state,) = states
    assert isinstance(state.velocity, mo.storage.resolve(storage).state_type)
    with pytest.raises(ValueError, match="storage must be one of"):
        getattr(interop, name)(**CALLS[name][0], storage="float8")


@every
def test_a_step_compiles_once_and_keeps_its_types(name):
    tx = getattr(interop, name)(**CALLS[name][0])
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(2):
        updates, new = step(jax.tree.map(lambda x: x / 2, params), state, params)
        assert avals(new) == avals(state)
        state = new
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.float32, jnp.bfloat16]
    assert step._cache_size() == 1


@every
def test_a_parameter_without_a_gradient_is_left_alone(name):
    base, others = CALLS[name]
    decay = {k: v for k, v in others.items() if k == "weight_decay"}
    tx = getattr(interop, name)(**{**base, **decay})
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params)
    updates, after = tx.update({"a": params["a"], "b": None}, state, params)
    assert updates["b"] is None
    for old, new in zip(mo.velocity(state), mo.velocity(after), strict=True):
        np.testing.assert_array_equal(old["b"], new["b"])
        assert (old["a"] != new["a"]).any()


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
        ("apex_sgd", {"lr": 0.1, "wd_after_momentum": True}, ValueError, "wd_after_momentum must be False without"),
        ("apex_sgd", {"lr": 0.1, "wd_after_momentum": None}, TypeError, "wd_after_momentum must be True or False"),
        ("flash_sgd", {"momentum": 0.9, "nesterov": True, "dampening": 0.1}, ValueError, "nesterov needs"),
        ("heavyball_sgd", {"beta": 1.1}, ValueError, r"beta must be in \[0, 1\], got 1.1"),
        ("keras_sgd", {"momentum": 1}, ValueError, r"momentum must be a float in \[0, 1\] or a scalar array, got 1"),
        ("keras_sgd", {"momentum": 1.1}, ValueError, "momentum must be a float"),
        ("keras_sgd", {"momentum": lambda t: 0.9}, ValueError, "momentum must be a float"),
        ("keras_sgd", {"nesterov": True}, ValueError, "nesterov needs a momentum above 0"),
        ("keras_sgd", {"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
        ("keras_sgd", {"learning_rate": -0.1}, ValueError, "learning_rate must be in"),
        ("tf1_momentum", {"learning_rate": 0.1, "momentum": -0.1}, ValueError, "momentum must be in"),
        (
            "tf1_momentum",
            {"learning_rate": 0.1, "momentum": 0.0, "use_nesterov": True},
            ValueError,
            "use_nesterov needs",
        ),
        (
            "caffe_sgd",
            {"base_lr": 0.1, "regularization_type": "L1"},
            ValueError,
            "regularization_type must be one of 'L2'",
        ),
        ("caffe_sgd", {"base_lr": 0.1, "momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\]"),
        ("caffe_sgd", {"base_lr": 0.1, "momentum": lambda t: 0.9}, TypeError, "momentum must be a number"),
        (
            "qhoptim_qhm",
            {"lr": 0.1, "momentum": 0.9, "nu": 0.7, "weight_decay_type": "l2"},
            ValueError,
            "weight_decay_type must be one of 'grad', 'direct', got 'l2'",
        ),
        ("qhoptim_qhm", {"lr": 0.1, "momentum": 1.0, "nu": 0.7}, ValueError, "momentum must be in"),
        ("aggmo", {"lr": 0.1, "betas": (0.9, 0.9)}, ValueError, r"betas must be distinct, got \(0.9, 0.9\)"),
        ("aggmo", {"lr": 0.1, "betas": (lambda t: 0.9,)}, TypeError, r"betas\[0\] must be a number"),
        ("aggmo", {"lr": 0.1, "betas": 0.9}, TypeError, "must be a tuple or list"),
        ("accsgd", {"lr": 0.1, "smallConst": 1.5}, ValueError, r"smallConst must be in \(0, 1\], got 1.5"),
        ("mass", {"kappa_t": 0.5}, ValueError, r"kappa_t must be in \[1, inf\), got 0.5"),
        ("lion", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("lion", {"betas": (0.9,)}, ValueError, "betas must have 2 entries"),
        ("lion", {"betas": 0.9}, TypeError, "betas must be a pair"),
        ("signum", {"weight_decouple": False}, ValueError, "weight_decouple must be True without"),
        ("signum", {"momentum": 1.0}, ValueError, "momentum must be in"),
        ("muon_average", {"momentum": 0.0}, ValueError, "nesterov needs a momentum above 0"),
        ("muon_sum", {"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\]"),
        ("muon_average", {"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)


def rate(t):
    return 0.05 * (1 + t % 3)


def test_tf1_has_its_rate_outside_the_accumulator(x64):
    for nesterov in (False, True):
        x, a, expected = START, 0.0, []
        for t in range(STEPS):
            g, m = gradient(x, t), 0.5 + 0.01 * t
            a = m * a + g
            x = x - rate(t) * g - rate(t) * m * a if nesterov else x - rate(t) * a
            expected.append(x)
        got = descend(interop.tf1_momentum(rate, lambda t: 0.5 + 0.01 * t, use_nesterov=nesterov))
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_caffe_has_its_rate_inside_and_its_decay_in_the_gradient(x64):
    x, v, expected = START, 0.0, []
    for t in range(STEPS):
        v = 0.9 * v + rate(t) * (gradient(x, t) + 0.1 * x)
        x = x - v
        expected.append(x)
    np.testing.assert_allclose(descend(interop.caffe_sgd(rate, 0.9, 0.1)), expected, rtol=1e-12)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_apex_adds_its_decay_before_or_after_the_momentum(after, nesterov, x64):
    x, v, expected = START, None, []
    for t in range(STEPS):
        g = gradient(x, t) + (0 if after else 0.1 * x)
        v = g if v is None else 0.9 * v + g
        u = g + 0.9 * v if nesterov else v
        x = x - 0.05 * (u + (0.1 * x if after else 0))
        expected.append(x)
    got = descend(interop.apex_sgd(0.05, 0.9, weight_decay=0.1, nesterov=nesterov, wd_after_momentum=after))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


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


def test_mass_is_the_three_lines_of_its_reference(x64):
    u, w_and_v, expected = START, START, []
    for t in range(STEPS):
        g = gradient(u, t)
        w = u - rate(t) * g
        w_and_v = (1 - 0.1) * w_and_v + 0.1 * u - rate(t) / 0.1 / 5 * g
        u = 0.1 / (1 + 0.1) * w_and_v + 1 / (1 + 0.1) * w
        expected.append(u)
    np.testing.assert_allclose(descend(interop.mass(rate, alpha=0.1, kappa_t=5.0)), expected, rtol=1e-12)


def test_accsgd_keeps_its_point_when_the_rate_changes(x64):
    kappa, xi, eps = 100.0, 5.0, 0.6
    x, b, expected = START, START, []
    beta = xi * eps**2 / kappa
    for t in range(STEPS):
        g = gradient(x, t)
        b = (1 - beta) * b + beta * (x - rate(t) * kappa / eps * g)
        zeta = eps / (eps + beta)
        x = zeta * (x - rate(t) * g) + (1 - zeta) * b
        expected.append(x)
    np.testing.assert_allclose(descend(interop.accsgd(rate, kappa, xi, eps)), expected, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_two_conventions_of_muon_differ_by_the_sum_of_their_weights(nesterov, x64):
    one, two = interop.muon_average(0.9, nesterov), interop.muon_sum(0.9, nesterov)
    p = jnp.asarray(START)
    s, z, v = one.init(p), two.init(p), 0.0
    for t in range(20):
        g = gradient(START, t)
        v = 0.9 * v + g
        a, s = one.update(jnp.asarray(g), s)
        b, z = two.update(jnp.asarray(g), z)
        np.testing.assert_allclose(b, g + 0.9 * v if nesterov else v, rtol=1e-13)
        np.testing.assert_allclose(a, 0.1 * np.asarray(b), rtol=1e-12)


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


def test_without_momentum_there_is_no_state():
    for name in ("torch_sgd", "timm_sgdw", "flash_sgd", "keras_sgd"):
        state = getattr(interop, name)().init({"x": jnp.ones(3)})
        assert jax.tree.leaves(state) == []


@pytest.mark.parametrize("scheduled", [False, True])
def test_numbers_can_be_injected(scheduled):
    fixed = interop.torch_sgd(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)
    tx = optax.inject_hyperparams(interop.torch_sgd, static_args=("nesterov", "maximize", "storage"))(
        lr=(lambda t: 0.1 + 0 * t) if scheduled else 0.1, momentum=0.9, dampening=0.5, weight_decay=0.1
    )
    p = {"x": jnp.asarray(START, jnp.float32)}
    a, b = fixed.init(p), tx.init(p)
    step = jax.jit(tx.update)
    for t in range(4):
        g = {"x": jnp.asarray(gradient(START, t), jnp.float32)}
        u, a = fixed.update(g, a, p)
        w, b = step(g, b, p)
        np.testing.assert_allclose(u["x"], w["x"], rtol=3e-7)
    b.hyperparams["momentum"] = jnp.float32(0.0)
    w, b = step(g, b, p)
    np.testing.assert_allclose(w["x"], -0.1 * (g["x"] + 0.1 * p["x"]), rtol=1e-6)


def test_a_scheduled_dialect_is_the_same_compiled():
    tx = interop.torch_sgd(lr=rate, momentum=lambda t: 0.5 + 0.01 * t, weight_decay=0.1, nesterov=True)
    params = {"x": jnp.asarray(START, jnp.float32)}

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"x": g}, state, params)
        return (optax.apply_updates(params, updates), state), None

    gradients = jnp.asarray([gradient(START, t) for t in range(20)], jnp.float32)
    (got, state), _ = jax.lax.scan(step, (params, tx.init(params)), gradients)
    x, v = START, 0.0
    for t, g in enumerate(np.float64(gradients)):
        m, d = 0.5 + 0.01 * t, g + 0.1 * x
        v = m * v + d
        x = x - rate(t) * (d + m * v)
    np.testing.assert_allclose(got["x"], x, rtol=2e-6)
    assert_bit_equal(jax.tree.structure(state), jax.tree.structure(tx.init(params)))


def test_help_says_that_a_transformation_comes_out():
    for name in CALLS:
        signature = inspect.signature(getattr(interop, name))
        assert signature.return_annotation is optax.GradientTransformationExtraArgs
        assert signature.parameters["storage"].kind is inspect.Parameter.KEYWORD_ONLY
