"""Every rule against its reference of `references.py`, and against exact facts about it."""

import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import rule_functions
from references import DIMENSION, START, TABLE, gradient, nesterov

import momentum_optax as mo
from momentum_optax import rules

STEPS = 200
PUBLIC = list(rule_functions())
ROWS = {str(row): row for row in TABLE}
BY_RULE = {row.rule: row for row in reversed(TABLE)}  # the first row of each
# Numbers, and random schedules for everything that can be scheduled.
CASES = [(row, False) for row in TABLE] + [(row, True) for row in TABLE if row.ranges]
every_case = pytest.mark.parametrize(
    ("row", "scheduled"), CASES, ids=[f"{row}-{'scheduled' if scheduled else 'constant'}" for row, scheduled in CASES]
)
every_row = pytest.mark.parametrize("row", TABLE, ids=str)


@pytest.fixture
def x64():
    # A context manager of jax itself since 0.8, of jax.experimental before.
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True):
        yield


def test_every_public_rule_has_a_row():
    assert set(PUBLIC) == set(BY_RULE)
    assert len(ROWS) == len(TABLE), "two rows have the same name"


def test_the_rows_of_a_rule_give_every_argument_of_it():
    for name in set(PUBLIC) - {"aggregated"}:  # its one argument is a tuple, given entry by entry
        given = set().union(*(row.constants for row in TABLE if row.rule == name))
        assert given == set(inspect.signature(rule_functions()[name]).parameters), name


def test_two_references_of_one_rule_agree_on_numbers():
    pairs = [row for row in TABLE if row.scheduled_reference is not None]
    assert len(pairs) >= 3
    for row in pairs:
        first, _ = row.run(gradient, START, STEPS)
        second, _ = row.run(gradient, START, STEPS, lambda t, row=row: row.constants)
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)


@pytest.mark.one_in(2)
@every_case
def test_the_closed_loop_is_the_papers_over_200_steps(row, scheduled, x64):
    # The same gradient function on both sides; ours sees it at the points of its own jitted updates.
    schedules, h = hyperparameters(row, scheduled)
    expected, _ = row.run(gradient, START, STEPS, h)
    got, _ = closed_loop(row.make(**schedules), row.rate, STEPS)
    # An objective that contracts does not amplify rounding; 1e-12 is some thousand roundings.
    assert np.all(abs(got - expected) <= 1e-12 * np.maximum(1, abs(expected)))
    assert abs(expected[-1] - expected[-2]).max() > 1e-5, "converged too early to tell anything"


@pytest.mark.one_in(2)
@every_case
def test_float32_updates_keep_within_the_rounding_of_their_arithmetic(row, scheduled):
    # Open loop: both sides get the gradients of one run, rounded to float32, and the same float32 hyperparameters.
    schedules, h = hyperparameters(row, scheduled, float32=True)
    gradients = []

    def record(x):
        gradients.append(np.float64(np.float32(gradient(x))))
        return gradients[-1]

    row.run(record, START, STEPS, h)
    replayed = iter(gradients)
    # From zero and at rate 1 the differences of the points are the negative updates, to float64's rounding.
    points, _ = row.run(lambda _: next(replayed), np.zeros(DIMENSION), STEPS, h, rate=1.0)
    expected = -np.diff(points, axis=0, prepend=0.0)

    rule = row.make(**schedules)
    tx = mo.scale_by_momentum(rule)
    run = jax.jit(lambda g: jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(g[0]), g)[1])
    got = run(np.float32(gradients))
    assert got.dtype == np.float32
    assert np.all(abs(np.float64(got) - expected) <= float32_bound(rule, gradients))


def float32_bound(rule, gradients):
    """The most that float32 can do to the updates: every rounding error followed through the filter.

    A sum of K + 1 products costs K + 2 roundings of 2^-24 times the sum of the absolute values: one of each
    coefficient, one of each product, K of the additions. An error made in a velocity at step s meets the update at
    step t through C A ... A, as a gradient would. A coefficient that the program itself computes from float32 costs
    some roundings more, enlarged where terms cancel: two dozen are granted, and no rule needs more than half of its
    bound. In ulps of the largest update so far the bounds are between 2 and 60 for numbers, the errors up to 5.3.
    """
    computed = 0 if rule.is_constant else 24
    rule = rule.pruned()
    K = rule.order
    unit = (K + 2 + computed) * 2.0**-24
    v = np.zeros((K, DIMENSION))
    paths, made = np.zeros((0, K, K)), np.zeros((0, K, DIMENSION))
    bounds = []
    for t, g in enumerate(gradients):
        A, B, C, D = rule.at(t).matrices()
        here = unit * (abs(C) @ abs(v) + abs(D * g))
        bounds.append(np.einsum("si,sin->n", abs(C @ paths), made) + here)
        made = np.concatenate([made, [unit * (abs(A) @ abs(v) + np.multiply.outer(abs(B), abs(g)))]])
        paths = np.concatenate([A @ paths, [np.eye(K)]])
        v = A @ v + np.multiply.outer(B, g)
    return np.array(bounds)


# These two are defined by the global step, whatever a leaf has received.
LATE = [(row, scheduled) for row, scheduled in CASES if row.rule not in ("chebyshev", "schedule_free")]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("row", "scheduled"), LATE, ids=[f"{row}-{'scheduled' if scheduled else 'constant'}" for row, scheduled in LATE]
)
def test_a_leaf_without_gradients_for_three_steps_begins_at_the_fourth(row, scheduled, x64):
    # Its own first step is then the special one; schedules go on by the global step.
    late, steps = 3, 12
    schedules, h = hyperparameters(row, scheduled)
    hyper = h or (lambda t: row.constants)
    tx = mo.scale_by_momentum(row.make(**schedules))

    @jax.jit
    def step(x, state, g):
        u, state = tx.update(g, state)
        return mo.apply_updates(x, jax.tree.map(lambda u: -row.rate * u, u)), state

    x = {"early": jnp.asarray(START), "late": jnp.asarray(START)}
    state = tx.init(x)
    got = []
    for t in range(steps):
        g = {name: gradient(np.asarray(leaf)) for name, leaf in x.items()}
        x, state = step(x, state, g | ({"late": None} if t < late else {}))
        got.append({name: np.asarray(leaf) for name, leaf in x.items()})

    early, _ = row.run(gradient, START, steps, h)
    shifted, _ = row.run(gradient, START, steps - late, (lambda t: hyper(t + late)) if scheduled else None)
    np.testing.assert_allclose([points["early"] for points in got], early, rtol=0, atol=1e-12)
    np.testing.assert_array_equal([points["late"] for points in got[:late]], [START] * late)
    np.testing.assert_allclose([points["late"] for points in got[late:]], shifted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("row", "scheduled"),
    [(row, scheduled) for row, scheduled in CASES if row.evaluates],
    ids=[f"{row}-{'scheduled' if scheduled else 'constant'}" for row, scheduled in CASES if row.evaluates],
)
def test_eval_params_is_the_papers_evaluated_sequence(row, scheduled, x64):
    schedules, h = hyperparameters(row, scheduled)
    stored, expected = row.run(gradient, START, STEPS, h)
    _, got = closed_loop(row.make(**schedules), row.rate, STEPS, evaluate=True)
    assert np.all(abs(got - expected) <= 1e-12 * np.maximum(1, abs(expected)))
    assert abs(stored - expected).max() > 1e-3, "the two sequences do not differ enough to tell"


def test_eval_params_of_torch_nesterov_is_nesterovs_x_at_a_constant_decay(x64):
    row = BY_RULE["torch_nesterov"]
    _, x = zip(*nesterov(gradient, START, STEPS, row.rate, lambda t: row.constants), strict=True)
    _, got = closed_loop(row.make(), row.rate, STEPS, evaluate=True)
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("rate", [0.25, np.float64(0.25), jnp.float32(0.25)], ids=lambda rate: type(rate).__name__)
def test_eval_params_keeps_the_dtype_of_the_parameters(rate, dtype):
    rule, params = rules.nesterov(0.5), {"x": jnp.ones(3, dtype)}
    tx = mo.scale_by_momentum(rule)
    _, state = tx.update({"x": jnp.full(3, 4.0, dtype)}, tx.init(params))
    point = mo.eval_params(rule, state, params, rate)["x"]
    assert point.dtype == dtype
    np.testing.assert_array_equal(point, jnp.full(3, 1.5, dtype))  # 1 + 0.25 * 0.5 * 4


@pytest.mark.parametrize("row", [row for row in TABLE if not row.evaluates and row.rule != "torch_nesterov"], ids=str)
def test_eval_params_of_every_other_rule_is_the_stored_point(row, x64):
    stored, evaluated = closed_loop(row.make(), row.rate, 5, evaluate=True)
    np.testing.assert_array_equal(stored, evaluated)


@pytest.mark.parametrize("kappa", [2.0, 100.0, 1e4])
def test_chebyshevs_error_is_the_least_possible_at_every_step(kappa):
    # Largest over the spectrum and from a start of 1 in every direction: 1/T_T(s), which is 2 q^T/(1 + q^2T).
    L, mu, T = 3.0, 3.0 / kappa, 60
    curvature = np.append(mu + (L - mu) * (1 - np.cos(np.linspace(0, np.pi, 401))) / 2, [mu, L])
    q = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    errors = points(rules.chebyshev(L, mu), 1.0, T, lambda e: curvature * e, np.ones_like(curvature))
    expected = [2 * q**t / (1 + q ** (2 * t)) for t in range(1, T + 1)]
    np.testing.assert_allclose(abs(errors).max(1), expected, rtol=1e-10)


def _optimal_nesterov(L, mu):
    root = math.sqrt(3 * L / mu + 1)
    return rules.nesterov((root - 2) / (root + 2)), 4 / (3 * L + mu), 1 - 2 / root


# Rule, learning rate and worst spectral radius for curvatures in [mu, L] and kappa = L/mu.
RADII = {
    "gradient descent": lambda L, mu: (rules.heavy_ball(0.0), 2 / (L + mu), (L - mu) / (L + mu)),
    "heavy ball": lambda L, mu: (
        rules.heavy_ball(((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)) ** 2),
        4 / (L**0.5 + mu**0.5) ** 2,
        (L**0.5 - mu**0.5) / (L**0.5 + mu**0.5),
    ),
    "Nesterov": lambda L, mu: (
        rules.nesterov((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)),
        1 / L,
        1 - (mu / L) ** 0.5,
    ),
    "Nesterov, best for quadratics": _optimal_nesterov,
    "triple momentum": lambda L, mu: (rules.triple_momentum(L, mu), 1.0, 1 - (mu / L) ** 0.5),
    "robust momentum": lambda L, mu: (rules.robust_momentum(L, mu), 1.0, 1 - (mu / L) ** 0.5),
    "robust momentum, slowest": lambda L, mu: (rules.robust_momentum(L, mu, 1 - mu / L), 1.0, 1 - mu / L),
}


@pytest.mark.parametrize("kappa", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("name", RADII)
def test_the_worst_spectral_radius_is_the_theorys(name, kappa):
    L, mu = 3.0, 3.0 / kappa
    rule, rate, expected = RADII[name](L, mu)
    A, B, C, D = rule.matrices()
    K = rule.order
    worst = 0.0
    for curvature in [mu, L, *np.geomspace(mu, L, 200)]:
        loop = np.zeros((K + 1, K + 1))  # of (v, x)
        loop[:K, :K], loop[:K, K] = A, B * curvature
        loop[K, :K], loop[K, K] = -rate * C, 1 - rate * D * curvature
        worst = max(worst, abs(np.linalg.eigvals(loop)).max())
    # Most of them are double roots at an end of the interval, found to the square root of float64's rounding.
    assert worst == pytest.approx(expected, rel=1e-7)


# Rule and (decay, nu, scale), then the white-noise gain and the gain at the highest frequency for a scale of 1.
COMMON_SETTINGS = {
    "heavy ball": (rules.heavy_ball(0.9), (0.9, 1, 10, 0.0526, 0.053)),
    "Nesterov": (rules.nesterov(0.9), (0.9, 0.9, 10, 0.0706, 0.147)),
    "PyTorch's Nesterov": (rules.torch_nesterov(0.9), (0.9, 0.9, 10, 0.0706, 0.147)),
    "Lion": (rules.lion_mix(), (0.99, 0.909, 1, 0.0141, 0.095)),
    "Muon": (rules.muon_mix(), (0.95, 0.95, 1, 0.0304, 0.074)),
    "Grokfast": (rules.grokfast().at(1), (0.98, 0.667, 3, 0.124, 0.340)),
    "MARS": (rules.mars_mix(), (0.95, 0.975, 1, 0.0274, 0.050)),
    "QHM": (rules.quasi_hyperbolic(0.999, 0.7), (0.999, 0.7, 1, 0.0907, 0.300)),
    "AccSGD": (rules.accelerated(), (0.98818, 0.77922, 4.529, 0.0564, 0.225)),
    "MaSS": (rules.mass(), (0.90476, 0.25, 1.333, 0.601, 0.763)),
}


@pytest.mark.parametrize("name", COMMON_SETTINGS)
def test_common_settings_have_these_quasi_hyperbolic_numbers(name):
    rule, expected = COMMON_SETTINGS[name]
    form = rule.normal_form()
    numerator, denominator = rule.transfer_function()
    first, second = rule.impulse_response(2)  # later ones are smaller by the decay each
    noise = (first**2 + second**2 / (1 - form.decay**2)) / form.scale**2
    highest = abs(numerator @ [1, -1] / (denominator @ [1, -1])) / form.scale
    for got, stated in zip((form.decay, form.nu, form.scale, noise, highest), expected, strict=True):
        # Correct to the last digit that is printed.
        digits = len(repr(stated).partition(".")[2])
        assert got == pytest.approx(stated, abs=0.5000001 * 10.0**-digits)


def test_every_rule_of_order_one_is_its_normal_form():
    checked = []
    for row in TABLE:
        rule = row.make()
        if rule.is_constant and rule.pruned().order == 1 and row.rule != "optimistic":
            scale, decay, nu = rule.normal_form()
            assert mo.equivalent(rules.quasi_hyperbolic(decay, nu).scale(scale), rule, rtol=1e-12), str(row)
            checked.append(row.rule)
    assert len(checked) >= 16
    assert "heavy_ball" in checked


def _triple(L, rho):
    return {"rho": rho, "alpha": (1 + rho) / L, "beta": rho**2 / (2 - rho)}


# What the symbols of the docstrings' normal forms mean.
SYMBOLS = {
    "heavy_ball": lambda decay: {"mu": decay},
    "ema": lambda decay: {"beta": decay},
    "nesterov": lambda decay: {"mu": decay},
    "torch_nesterov": lambda decay: {"mu": decay},
    "simplified_ademamix": lambda decay, alpha: {"beta": decay, "alpha": alpha},
    "synthesized_nesterov": lambda decay, lookahead: {"b1": decay, "b2": lookahead},
    "triple_momentum": lambda L, mu: _triple(L, 1 - math.sqrt(mu / L)),
    "robust_momentum": lambda L, mu, rho: {
        "alpha": L / mu * (1 - rho) ** 2 * (1 + rho) / L,
        "beta": L / mu * rho**3 / (L / mu - 1),
        "gamma": rho**3 / ((L / mu - 1) * (1 - rho) ** 2 * (1 + rho)),
    },
    "accelerated": lambda kappa, xi, epsilon: {"kappa": kappa, "xi": xi, "eps": epsilon},
    "mass": lambda alpha, kappa: {"alpha": alpha, "kappa": kappa, "s": (1 + 1 / (alpha * kappa)) / 2},
    "recht_pid": lambda proportional, integral, derivative: {
        "k_P": proportional,
        "k_I": integral,
        "k_D": derivative,
    },
    "lion_mix": lambda b1, b2: {"b1": b1, "b2": b2},
    "muon_mix": lambda decay: {"beta": decay},
    "grokfast": lambda decay, amplification: {"alpha": decay, "lambda_": amplification},
    "mars_mix": lambda decay, gamma: {"beta": decay, "gamma": gamma},
}


def stated_normal_form(name):
    """The text between the parentheses after "Normal form ...:" in a docstring as a Python expression, or None."""
    text = " ".join(rule_functions()[name].__doc__.split())
    begin = re.search(r"Normal form[^:(]*: (?=\()", text)
    if begin is None:
        return None
    depth = itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in text[begin.end() :])
    length = next(i for i, d in enumerate(depth) if d == 0) + 1
    formula = text[begin.end() : begin.end() + length].replace("^", "**").replace("lambda", "lambda_")
    return re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula)


def test_the_normal_forms_in_the_docstrings_are_true():
    stated = {name: stated_normal_form(name) for name in PUBLIC}
    assert {name for name, formula in stated.items() if formula} == set(SYMBOLS)
    rng = np.random.default_rng(7)
    for name, symbols in SYMBOLS.items():
        for _ in range(10):
            values = {key: rng.uniform(*ends) for key, ends in BY_RULE[name].ranges.items()}
            # Step 1, for the one that is stated apart from its first step.
            form = BY_RULE[name].make(**values).at(1).normal_form()
            expected = eval(stated[name], {}, symbols(**values))
            # nu is found by dividing by the decay, which is small now and then.
            np.testing.assert_allclose(form, expected, rtol=1e-10, err_msg=name)


# Two rules, each with its learning rate, that are the same rule: what docstrings say in passing.
SAME = {
    "a heavy ball is a sum that an average is, too": (rules.heavy_ball(0.8), 0.2, rules.ema(0.8), 1.0),
    "nu 0 is plain descent": (rules.quasi_hyperbolic(0.9, 0.0), 1.0, rules.heavy_ball(0.0), 1.0),
    "nu 1 is the average": (rules.quasi_hyperbolic(0.9, 1.0), 1.0, rules.ema(0.9), 1.0),
    "nu beta is Nesterov": (rules.quasi_hyperbolic(0.9, 0.9), 1.0, rules.nesterov(0.9), 0.1),
    "at a constant decay there is one Nesterov": (rules.torch_nesterov(0.7), 1.0, rules.nesterov(0.7), 1.0),
    "without look-ahead it is a heavy ball": (rules.synthesized_nesterov(0.7, 0.0), 1.0, rules.heavy_ball(0.7), 1.0),
    "looking ahead by the decay is Nesterov": (rules.synthesized_nesterov(0.7, 0.7), 1.0, rules.nesterov(0.7), 1.0),
    "0.1 and 3 give 0, 0.9, 0.99": (rules.aggregated_exponential(0.1, 3), 1.0, rules.aggregated(), 1.0),
    "least rho": (rules.robust_momentum(4.0, 0.5), 1.0, rules.triple_momentum(4.0, 0.5), 1.0),
    "largest rho": (rules.robust_momentum(4.0, 0.5, 1 - 0.5 / 4), 1.0, rules.heavy_ball(0.0), 1 / 4),
    "the tied pole": (mo.contrib.recht_pid(-1.9, 0.3, 17.0), 1.0, rules.pid(-1.9, 0.3, 17.0, 17 / 18.9), 1.0),
    "the integral alone is plain descent": (rules.pid(0.0, 0.3, 0.0, 0.5), 1.0, rules.heavy_ball(0.0), 0.3),
    "gamma 1 - beta is Nesterov": (rules.mars_mix(0.9, 0.1), 1.0, rules.nesterov(0.9), 0.1),
    "Muon's mix is Nesterov": (rules.muon_mix(0.9), 1.0, rules.nesterov(0.9), 0.1),
    "undampened, the first step is no special one": (
        rules.heavy_ball(0.9, first_step="gradient"),
        1.0,
        rules.heavy_ball(0.9),
        1.0,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_rules_that_are_said_to_be_the_same_are(name):
    f, rate, g, other = SAME[name]
    assert mo.equivalent(f, g, (rate, other), rtol=1e-12)


def test_the_two_nesterovs_differ_under_a_schedule():
    decay = mo.schedules.nesterov_convex()
    assert not mo.equivalent(rules.nesterov(decay), rules.torch_nesterov(decay), rtol=1e-2)


def test_recht_pids_way_back_from_the_normal_form_is_right():
    a, b, n = 0.3, 0.9, 0.7
    form = mo.contrib.recht_pid(-a * b * n / (1 - b), a, a * n * b**2 / (1 - b) ** 2).normal_form()
    np.testing.assert_allclose(form, (a, b, n), rtol=1e-12)


# Of an average, and of a sum, which may forget nothing.
_DECAY, _SUM = {"decay": "[0, 1)"}, {"decay": "[0, 1]"}
_CURVATURES = {"L": "(0, inf)", "mu": "(0, L)"}
FINITE = "(-inf, inf)"
# The allowed interval of every number; "at least n" for whole ones.
ALLOWED = {
    "heavy_ball": {"decay": "(-1, 1]", "dampening": "[0, 1)"},
    "ema": _DECAY,
    "nesterov": _SUM,
    "torch_nesterov": _SUM | {"dampening": "[0, 1)"},
    # As wide as the normal form of a heavy ball or of a synthesised Nesterov needs.
    "quasi_hyperbolic": {"decay": "(-1, 1)", "nu": FINITE},
    "aggregated": {"b0": "[0, 1]", "b1": "[0, 1]", "b2": "[0, 1]"},
    "aggregated_exponential": {"base": "(0, 1)", "count": "at least 1"},
    "ademamix_mix": {"fast": "[0, 1)", "slow": "[0, 1)", "alpha": "[0, inf)"},
    "simplified_ademamix": _SUM | {"alpha": "[0, inf)"},
    "synthesized_nesterov": {"decay": "(-1, 1]", "lookahead": FINITE},
    "triple_momentum": _CURVATURES,
    "robust_momentum": _CURVATURES | {"rho": "[1 - sqrt(mu/L), 1 - mu/L]"},
    "accelerated": {"kappa": "[1, inf)", "xi": "[1, inf)", "epsilon": "(0, 1]"},
    "mass": {"alpha": "(0, 1)", "kappa": "[1, inf)"},
    "pid": _DECAY | {"proportional": FINITE, "integral": FINITE, "derivative": FINITE},
    "recht_pid": {"proportional": "(-inf, 0)", "integral": "(0, inf)", "derivative": "(0, inf)"},
    "optimistic": {"alpha": FINITE, "beta": FINITE},
    "complex_heavy_ball": _SUM | {"angle": FINITE},
    "lion_mix": {"b1": "[0, 1)", "b2": "[0, 1)"},
    "muon_mix": _DECAY,
    "grokfast": _DECAY | {"amplification": "[0, inf)"},
    "grokfast_average": {"window": "at least 2", "amplification": "[0, inf)"},
    "mars_mix": _DECAY | {"gamma": FINITE},
    "nadam_mix": _DECAY | {"psi": "(0, inf)"},
    "adan_mix": {"b1": "[0, 1)", "b2": "[0, 1)"},
    "chebyshev": _CURVATURES,
    "schedule_free": {"beta": "[0, 1]"},
}
ARGUMENTS = [(rule, name) for rule, names in ALLOWED.items() for name in names]
every_argument = pytest.mark.parametrize(("rule", "name"), ARGUMENTS, ids=[".".join(pair) for pair in ARGUMENTS])


def ends(rule, name):
    """The values at the ends of an argument's interval, as (end, whether it belongs, outward direction)."""
    allowed = ALLOWED[rule][name]
    if allowed.startswith("at least"):
        return [(int(allowed.split()[-1]), True, -1)]
    low, high = (eval(end, {"inf": math.inf, "sqrt": math.sqrt}, BY_RULE[rule].constants) for end in _split(allowed))
    return [(low, allowed[0] == "[", -1), (high, allowed[-1] == "]", 1)]


def _split(interval):
    return interval[1:-1].split(", ")


def _called(name):
    """What messages call an argument of a row."""
    return f"decays[{name[1]}]" if name in ("b0", "b1", "b2") else name


def test_every_number_of_every_rule_has_its_interval_here():
    for rule in PUBLIC:
        given = set().union(*(row.constants for row in TABLE if row.rule == rule))
        assert set(ALLOWED[rule]) == given - {"first_step"}, rule


@every_argument
def test_a_number_out_of_range_is_an_error_that_names_argument_and_value(rule, name):
    for end, belongs, outward in ends(rule, name):
        outside = end if not belongs else end + outward * (1 if isinstance(end, int) else 1e-9)
        # For whole numbers NaN is a TypeError, see below.
        for value in (outside,) if isinstance(end, int) else (outside, math.nan):
            with pytest.raises(ValueError, match=re.escape(_message_name(rule, name))) as error:
                BY_RULE[rule].make(**{name: value})
            assert repr(value) in str(error.value)


def _message_name(rule, name):
    return _called(name) if rule == "aggregated" else name


@every_argument
def test_the_docstring_states_the_interval_that_is_checked(rule, name):
    name, allowed = ("decays" if rule == "aggregated" else name), ALLOWED[rule][name]
    doc = rule_functions()[rule].__doc__
    entry = re.search(rf"^ +{name}: (.*?)(?=^ +\w+: |^\s*$)", doc, re.MULTILINE | re.DOTALL).group(1)
    assert ("finite" if allowed == FINITE else allowed) in " ".join(entry.split())


@every_argument
def test_a_string_is_no_number(rule, name):
    with pytest.raises(TypeError, match=re.escape(_message_name(rule, name))):
        BY_RULE[rule].make(**{name: "0.9"})


@pytest.mark.parametrize(("rule", "name"), [("aggregated_exponential", "count"), ("grokfast_average", "window")])
def test_a_fraction_is_no_whole_number(rule, name):
    for value in (2.5, math.nan, lambda step: 3):
        with pytest.raises(TypeError, match=name):
            BY_RULE[rule].make(**{name: value})


def test_other_wrong_arguments_are_errors_too():
    with pytest.raises(ValueError, match="first_step must be one of 'zero', 'gradient', got 'one'"):
        rules.heavy_ball(0.9, first_step="one")
    with pytest.raises(ValueError, match="decays must have at least one entry"):
        rules.aggregated(())
    with pytest.raises(TypeError, match=r"decays must be a tuple or list of decays, got 0\.9"):
        rules.aggregated(0.9)
    with pytest.raises(TypeError, match="decay must be a number or a scalar array, got a schedule"):
        rules.nadam_mix(mo.schedules.fista())
    with pytest.raises(TypeError, match="psi must be a number"):
        rules.nadam_mix(0.9, psi=mo.schedules.fista())


@every_argument
def test_a_rule_is_the_papers_at_the_closed_ends_of_its_ranges_too(rule, name):
    # Where a decay is 0, velocities vanish from the filter.
    row = BY_RULE[rule]
    for end, belongs, _ in ends(rule, name):
        if belongs:
            constants = row.constants | {name: end}
            steps = 20
            stored = row.reference(gradient, START, steps, row.rate, lambda t, constants=constants: constants)
            expected = np.array([point[0] if row.evaluates else point for point in stored])
            got = points(row.make(**{name: end}), row.rate, steps, gradient, START)
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@every_row
def test_every_hyperparameter_changes_the_trajectory(row):
    before = points(row.make(), row.rate, STEPS, gradient, START)
    for name, value in row.constants.items():
        after = points(row.make(**{name: _perturbed(value)}), row.rate, STEPS, gradient, START)
        assert abs(after - before).max() > 1e-6, name


def _perturbed(value):
    if value is None:
        return 0.9
    if isinstance(value, str):
        return {"zero": "gradient", "gradient": "zero"}[value]
    if isinstance(value, int):
        return value + 1
    return 1.01 * value if value else 0.01


def hyperparameters(row, scheduled, float32=False):
    """Schedules for `row.make` and the function h of the references; nothing and None for numbers."""
    if not scheduled:
        return {}, None
    rng = np.random.default_rng(sum(map(ord, str(row))))
    tables = {name: rng.uniform(*ends, STEPS + 2) for name, ends in row.ranges.items()}
    if float32:
        tables = {name: np.float64(np.float32(table)) for name, table in tables.items()}

    def schedule(table):
        return lambda step: float(table[step]) if isinstance(step, int) else jnp.asarray(table)[step]

    def h(t):
        return row.constants | {name: float(table[t]) for name, table in tables.items()}

    return {name: schedule(table) for name, table in tables.items()}, h


def closed_loop(rule, rate, steps, *, evaluate=False):
    """Stored and (where asked for) evaluated points after each jitted step of our transformation on `gradient`."""
    tx = mo.scale_by_momentum(rule)

    @jax.jit
    def step(x, state, g):
        u, state = tx.update(g, state)
        x = x - rate * u
        return x, state, mo.eval_params(rule, state, x, rate) if evaluate else None

    x, state = START, tx.init(jnp.asarray(START))
    stored, evaluated = [], []
    for _ in range(steps):
        x, state, best = step(x, state, gradient(np.asarray(x)))
        assert x.dtype == jnp.float64
        stored.append(np.asarray(x))
        evaluated.append(np.asarray(best) if evaluate else None)
    return np.array(stored), np.array(evaluated)


def points(rule, rate, steps, grad, x):
    """The stored points after each step of a rule's own coefficients, by NumPy alone."""
    rule = rule.pruned()
    v = np.zeros((rule.order, *x.shape))
    out = []
    for t in range(steps):
        g = grad(x)
        A, B, C, D = rule.at(t).matrices()
        x, v = x - rate * (np.tensordot(C, v, 1) + D * g), np.tensordot(A, v, 1) + np.multiply.outer(B, g)
        out.append(x)
    return np.array(out)
