"""Agreement with Optax and PyTorch, under injected hyperparameters and with the rate inside the velocity too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    EPS,
    RULES,
    avals,
    chained,
    descend,
    every_rule,
    gradients,
    normal,
    trajectory,
)

import momentum_optax as mo


def both(ours, theirs, signal):
    """The updates of two transformations in float32, each compiled on its own."""
    return [np.asarray(jax.jit(lambda g, tx=tx: trajectory(tx, g)[0])(signal)) for tx in (ours, theirs)]


def ulps(a, b):
    """The largest difference in units in the last place of `b`."""
    return np.max(np.abs(np.float64(a) - np.float64(b)) / np.spacing(np.abs(b)))


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_heavy_ball_equals_optax_trace_to_the_bit(decay):
    ours, theirs = both(mo.scale_by_momentum(mo.heavy_ball(decay)), optax.trace(decay), normal((1000, 16)))
    np.testing.assert_array_equal(ours, theirs)


def test_ema_equals_optax_ema_within_two_ulp():
    signal = jnp.abs(normal((1000, 16)))  # of one sign: no cancellation, so a rounding is an ulp of the result
    ours, theirs = both(mo.scale_by_momentum(mo.ema(0.9)), optax.ema(0.9, debias=False), signal)
    assert ulps(ours, theirs) <= 2


def test_torch_nesterov_equals_optax_nesterov():
    theirs_tx = optax.trace(0.9, nesterov=True)
    for rule in (mo.torch_nesterov(0.9), mo.nesterov(0.9)):
        ours, theirs = both(mo.scale_by_momentum(rule), theirs_tx, normal((1000, 16)))
        assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_the_debiased_ema_is_closer_to_float64_than_that_of_optax(decay):
    n = 1000
    signal = jnp.abs(normal((n, 16)))
    ours, theirs = both(mo.scale_by_momentum(mo.ema(decay), debias=True), optax.ema(decay, debias=True), signal)
    m, oracle = np.zeros(16), []
    for t, g in enumerate(np.float64(signal), start=1):
        m = decay * m + (1 - decay) * g
        oracle.append(m / (1 - decay**t))
    errors = [np.abs(u / np.array(oracle) - 1) for u in (ours, theirs)]
    assert errors[0].max() < errors[1].max()
    # Optax subtracts decay**t, rounded, from 1; we add the same numbers up, one rounding of a product and a sum a step.
    t = np.arange(1, n + 1)[:, None]
    bound = EPS * ((1 + t / 2) * decay**t / (1 - decay**t) + 2 * np.minimum(t, 1 / (1 - decay)) + 4)
    assert (np.abs(ours / np.array(oracle) - theirs / np.array(oracle)) <= bound).all()


def test_a_debiased_constant_stays_that_constant_under_a_scheduled_decay():
    def decay(step):
        return jnp.where(step == 0, 0.5, 0.9)

    tx = mo.scale_by_momentum(mo.ema(decay), debias=True)
    constants = jnp.array([1.0, -8.0, 0.3, 1e-30])
    u = np.asarray(jax.jit(lambda g: trajectory(tx, g)[0])(jnp.tile(constants, (100, 1))))
    # A power of two is filtered as the gain is; XLA then multiplies by the gain's reciprocal, which costs an ulp.
    assert ulps(u[:, :2], np.asarray(constants[:2])) <= 1
    # Otherwise a product and a sum are rounded in each step of both filters, and forgotten at the rate 1 - decay.
    np.testing.assert_allclose(u, np.tile(constants, (100, 1)), rtol=4 * EPS / (1 - 0.9) + 2 * EPS)
    theirs, _ = trajectory(optax.inject_hyperparams(optax.ema)(decay), jnp.ones((3, 2)))
    np.testing.assert_allclose(theirs[:, 0], [1.0, 2.89, 2.20], atol=0.005)


def test_the_signs_of_lion_mix_are_lion():
    ours = optax.chain(
        mo.scale_by_momentum(mo.lion_mix(0.9, 0.99)), optax.scale_by_sign(), optax.scale_by_learning_rate(1.0)
    )
    ours, theirs = both(ours, optax.lion(1.0, b1=0.9, b2=0.99, weight_decay=0.0), normal((200, 64)))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": None}], ids=str
)
def test_sgd_equals_optax_sgd(options):
    ours, theirs = both(mo.sgd(0.1, **options), optax.sgd(0.1, **options), normal((100, 16)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
    if not options.get("nesterov"):
        np.testing.assert_array_equal(ours, theirs)


def test_a_compiled_heavy_ball_costs_what_optax_trace_costs():
    def cost(tx):
        p = jnp.ones((64, 256))

        def step(p, state, g):
            u, state = tx.update(g, state, p)
            return optax.apply_updates(p, u), state

        return jax.jit(step).lower(p, tx.init(p), p).compile().cost_analysis()

    ours = cost(optax.chain(mo.scale_by_momentum(mo.heavy_ball(0.9)), optax.scale_by_learning_rate(0.1)))
    theirs = cost(optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(0.1)))
    assert {k: ours[k] for k in ("flops", "bytes accessed")} == {k: theirs[k] for k in ("flops", "bytes accessed")}


def torch_sgd(params, signal, *, lr, momentum, dampening, weight_decay, nesterov, maximize):
    """`torch.optim.SGD` for a dictionary of arrays, after its documentation."""
    params, buffers = dict(params), {}
    for gradient in signal:
        for name, g in gradient.items():
            if g is None:
                continue
            d = (-g if maximize else g) + weight_decay * params[name]
            if momentum:
                b = momentum * buffers[name] + (1 - dampening) * d if name in buffers else d
                buffers[name] = b
                d = d + momentum * b if nesterov else b
            params[name] = params[name] - lr * d
    return params


NAMES = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")

TORCH = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product((0.03, 1.0), (0.0, 0.9), (0.0, 0.5), (0.0, 0.1), (False, True), (False, True))
    # PyTorch rejects nesterov without momentum or with dampening, and ignores dampening without momentum.
    if not (values[4] and (values[1] == 0 or values[2])) and not (values[2] and values[1] == 0)
]


@pytest.mark.parametrize("options", TORCH, ids=lambda options: "-".join(map(str, options.values())))
def test_sgd_equals_torch_also_for_a_leaf_whose_first_gradients_are_missing(options, x64):
    params = {"a": normal((3,), 1, jnp.float64), "late": normal((2,), 2, jnp.float64)}
    signal = [gradients(params, seed) for seed in range(5)]
    signal[0]["late"] = signal[1]["late"] = signal[3]["late"] = None
    ours, _ = descend(mo.sgd(options["lr"], **{k: v for k, v in options.items() if k != "lr"}), params, signal)
    expected = torch_sgd(*jax.tree.map(np.asarray, (params, signal)), **options)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-12)


@pytest.mark.parametrize(
    "kind", [np.asarray, jnp.float32, lambda x: lambda t: x + 0.0 * t], ids=["numpy", "jax", "schedule"]
)
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_nesterov_takes_a_dampening_whose_value_it_cannot_know(dampening, kind):
    # PyTorch refuses the pair when it is built; its arithmetic, as after a change of a group, is this.
    params, signal = {"a": normal((3,), 1)}, [{"a": normal((3,), seed)} for seed in range(4)]
    ours, _ = descend(mo.sgd(0.1, 0.9, nesterov=True, dampening=kind(dampening)), params, signal)
    expected = torch_sgd(
        *jax.tree.map(np.asarray, (params, signal)),
        **dict(zip(NAMES, (0.1, 0.9, dampening, 0.0, True, False), strict=True)),
    )
    np.testing.assert_allclose(ours["a"], expected["a"], rtol=2e-6, atol=1e-6)


def inside(rule, rate):
    return optax.chain(optax.scale_by_learning_rate(rate), mo.scale_by_momentum(rule))


@pytest.mark.one_in(18)
@every_rule
def test_the_learning_rate_meets_the_gradient_or_the_velocity(rule, x64):
    signal = normal((12, 3), dtype=jnp.float64)
    outer, inner = (trajectory(f(RULES[rule](), 0.1), signal)[0] for f in (chained, inside))
    np.testing.assert_allclose(outer, inner, rtol=1e-9, atol=1e-15)

    # At step 7 every rule reads its memory, those too that do so at every second step only.
    def drop(step):
        return jnp.where(step < 7, 1.0, 0.1)

    outer, inner = (np.asarray(trajectory(f(RULES[rule](), drop), signal)[0]) for f in (chained, inside))
    np.testing.assert_allclose(outer[:7], inner[:7], rtol=1e-9)
    assert (np.abs(outer[7] - inner[7]) > 1e-3 * np.abs(inner[7])).all()


def test_inside_nesterov_is_the_two_sequence_method_under_a_learning_rate_schedule(x64):
    h, start = np.array([1.0, 0.3, 0.05]), np.array([1.0, -2.0, 3.0])

    def rate(step):
        return 0.5 / (1.0 + step)

    def mu(step):
        return (step + 1.0) / (step + 4.0)

    tx = inside(mo.nesterov(mu), rate)
    y, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    x_oracle = y_oracle = start
    for t in range(30):
        u, state = tx.update(h * y, state)
        y = y + u
        x_new = y_oracle - rate(t) * h * y_oracle
        x_oracle, y_oracle = x_new, x_new + mu(t) * (x_new - x_oracle)
        np.testing.assert_allclose(y, y_oracle, rtol=1e-10)


@pytest.mark.parametrize(
    "rate",
    [
        optax.piecewise_constant_schedule(1.0, {5: 0.1, 10: 0.1}),
        optax.warmup_cosine_decay_schedule(0.0, 1.0, 4, 20, 0.01),
        optax.linear_schedule(0.0, 0.5, 10),
    ],
    ids=["drops", "warm-up from 0 and cosine", "warm-up from 0"],
)
def test_momentum_correction_outside_equals_the_plain_heavy_ball_inside(rate, x64):
    signal = normal((20, 3), dtype=jnp.float64)

    def wide(step):
        return jnp.asarray(rate(step), jnp.float64)  # Optax divides int32 steps in float32

    corrected = chained(mo.heavy_ball(mo.schedules.momentum_correction(0.9, wide)), wide)
    outer, inner = (trajectory(tx, signal)[0] for tx in (corrected, inside(mo.heavy_ball(0.9), wide)))
    np.testing.assert_allclose(outer, inner, rtol=1e-10)


SGD = {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("argument", [None, *SGD], ids=["constants", *(f"{a} scheduled" for a in SGD)])
def test_injected_hyperparameters_equal_static_ones(argument):
    base = dict(SGD)
    if argument:
        base[argument] = optax.linear_schedule(SGD[argument], SGD[argument] / 2, 5)
    params = {"a": normal((3,), 1), "b": normal((2, 2), 2)}
    signal = [gradients(params, seed) for seed in range(6)]
    tx = optax.inject_hyperparams(mo.sgd, hyperparam_dtype=jnp.float32)(**base)
    step = jax.jit(tx.update)
    injected, _ = descend(optax.GradientTransformation(tx.init, step), params, signal)
    assert step._cache_size() == 1
    static, _ = descend(mo.sgd(**base), params, signal)
    for name in params:
        atol = 1e-6 * float(jnp.abs(static[name]).max())
        np.testing.assert_allclose(injected[name], static[name], rtol=0, atol=atol)


@pytest.mark.parametrize("argument", SGD)
def test_an_injected_hyperparameter_can_be_changed_between_two_steps(argument):
    params = {"a": normal((3,), 1)}
    g = [gradients(params, seed) for seed in range(2)]
    tx = optax.inject_hyperparams(mo.sgd, hyperparam_dtype=jnp.float32)(**SGD)
    step = jax.jit(tx.update)
    _, state = step(g[0], tx.init(params), params)
    state.hyperparams[argument] = jnp.float32(SGD[argument] / 2)
    u, _ = step(g[1], state, params)
    assert step._cache_size() == 1
    # In NumPy: the velocity after the first step is the first gradient, undampened.
    old, new = SGD, {**SGD, argument: SGD[argument] / 2}
    p = np.float64(params["a"])
    v = np.float64(g[0]["a"]) + old["weight_decay"] * p
    v = new["momentum"] * v + (1 - new["dampening"]) * (np.float64(g[1]["a"]) + new["weight_decay"] * p)
    np.testing.assert_allclose(u["a"], -new["learning_rate"] * v, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_bf16_parameters_get_bf16_updates_from_float32_hyperparameters(nesterov):
    params = {"a": normal((3,), 1, jnp.bfloat16)}
    numbers = {**SGD, "dampening": 0.0}
    tx = optax.inject_hyperparams(mo.sgd, hyperparam_dtype=jnp.float32)(**numbers, nesterov=nesterov)
    updates, state = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert updates["a"].dtype == jnp.bfloat16
    assert avals(state) == avals(jax.eval_shape(tx.init, params))
    assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype("float32")}
