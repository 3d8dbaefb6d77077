"""Hyperparameters between dialects: every pair, run side by side, and what is said to differ does."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax.interop import Recipe, equivalent_hyperparameters
from momentum_optax.interop.dialect import DIALECTS

SOURCES = [
    Recipe("torch_sgd", lr=0.1),
    Recipe("torch_sgd", lr=0.1, momentum=0.9),
    Recipe("torch_sgd", lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    Recipe("torch_sgd", lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.05),
    Recipe("torch_sgd", lr=0.1, momentum=0.8, maximize=True),
    Recipe("timm_sgdw", lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    Recipe("apex_sgd", lr=0.1, momentum=0.9, dampening=0.3),
    Recipe("apex_sgd", lr=0.1, momentum=0.9, weight_decay=0.05, wd_after_momentum=True),
    Recipe("flash_sgd", lr=0.1, momentum=0.9, dampening=0.5),
    Recipe("heavyball_sgd", lr=0.1, weight_decay=0.05),
    Recipe("keras_sgd", learning_rate=0.1, momentum=0.9),
    Recipe("keras_sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    Recipe("tf1_momentum", learning_rate=0.1, momentum=0.9, use_nesterov=True),
    Recipe("caffe_sgd", base_lr=0.1, momentum=0.9, weight_decay=0.05),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=1 / 1.1, weight_decay=0.05, weight_decay_type="grad"),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=1.0, weight_decay=0.05, weight_decay_type="direct"),
    Recipe("aggmo", lr=0.1, betas=(0.9,)),
    Recipe("aggmo", lr=0.1, betas=(0.0, 0.9)),
    Recipe("accsgd", lr=0.05),
    Recipe("mass", lr=0.1),
    Recipe("lion", lr=0.01, betas=(0.8, 0.8), weight_decay=0.05),
    Recipe("signum", lr=0.01, momentum=0.8, weight_decay=0.05),
    Recipe("signum", lr=0.01, momentum=0.8, weight_decay=0.05, weight_decouple=False),
    Recipe("muon_average", momentum=0.9),
    Recipe("muon_sum", momentum=0.9),
]
STEPS = 12
ONE_VELOCITY = [d for d in DIALECTS if d not in ("lion", "signum", "muon_average", "muon_sum")]


def pairs():
    for source, target in itertools.product(SOURCES, DIALECTS):
        if source.dialect == target:
            continue
        try:
            yield source, equivalent_hyperparameters(source, target)
        except ValueError:
            continue


PAIRS = [pytest.param(s, e, id=f"{s.dialect}{i}-{e.recipe.dialect}") for i, (s, e) in enumerate(pairs())]
every_pair = pytest.mark.parametrize(("source", "found"), PAIRS)


def rate(step):
    return 1.0 - 0.7 * (step % 4 == 2)


def run(recipe, first=1.0, late=0):
    """The steps on a quartic from step `late` on; `first` multiplies the first gradient, weight decay in it."""
    tx = recipe.transformation()
    down = recipe.description().learning_rate is not None
    x = jnp.asarray([1.0, -0.7, 1.9, 0.4])
    state, out = tx.init(x), []
    for _ in range(late):
        state = tx.update(None, state, x)[1]
    sign = -1 if recipe.description().maximize else 1
    decay = float(recipe.description().l2)
    for t in range(late, late + STEPS):
        p = np.asarray(x)
        g = sign * (np.array([0.9, 1.3, 0.7, 1.1]) * (p - 0.3) + 0.2 * p**3 + 0.3 * (-1) ** t)
        if t == late:
            g = g * first + (first - 1) * decay * p * sign
        u, state = tx.update(jnp.asarray(g), state, x)
        # A momentum that does not descend: its direction, which is all that an orthogonalisation sees.
        x = x + (u if down else -0.1 * u / jnp.linalg.norm(u))
        out.append(np.asarray(x))
    return np.array(out)


cached = functools.cache(run)


def is_same(a, b):
    return bool(np.allclose(a, b, rtol=1e-10, atol=1e-12))


def test_there_are_pairs_of_every_dialect():
    assert {p.values[0].dialect for p in PAIRS} == {p.values[1].recipe.dialect for p in PAIRS} == set(DIALECTS)
    assert len(PAIRS) > 100


@every_pair
def test_both_take_the_same_steps_or_differ_by_the_first_as_is_said(source, found, x64):
    expected, got = cached(source), cached(found.recipe)
    if any("after the first step of the run" in note for note in found.notes):
        assert not found.first_step
        assert is_same(expected, got)
        assert not is_same(run(source, late=3), run(found.recipe, late=3))
        return
    assert is_same(expected, got) == found.first_step
    if found.first_step:
        assert is_same(cached(source, late=3), run(found.recipe, late=3))
    else:
        factor = 1 / (1 - source.hyperparameters["dampening"])
        assert f"{factor:.6g} times" in found.notes[0]
        assert is_same(expected, run(found.recipe, first=factor))


@functools.cache
def changed(recipe, argument, function):
    """The recipe with an argument as a schedule."""
    value = recipe.hyperparameters.get(argument, mo.interop.equivalence._default(recipe.dialect, argument))
    return Recipe(recipe.dialect, **{**recipe.hyperparameters, argument: lambda step: value * function(step)})


RATES = dict.fromkeys(DIALECTS, "lr") | dict(
    keras_sgd="learning_rate", tf1_momentum="learning_rate", caffe_sgd="base_lr"
)


@every_pair
def test_a_scheduled_rate_keeps_them_the_same_if_and_only_if_it_is_said_to(source, found, x64):
    if source.dialect.startswith("muon") or not found.first_step:
        return
    a = cached(changed(source, RATES[source.dialect], rate))
    b = cached(changed(found.recipe, RATES[found.recipe.dialect], rate))
    assert is_same(a, b) == found.scheduled_learning_rate
    assert found.scheduled_learning_rate == (not any("learning rate is inside" in note for note in found.notes))


@every_pair
def test_a_scheduled_rate_comes_out_as_one_with_its_correction_or_is_refused(source, found, x64):
    if source.dialect.startswith("muon") or not found.first_step:
        return
    given = changed(source, RATES[source.dialect], rate)
    inside = source.description().rate_inside
    # Only a heavy ball with its rate outside and a momentum that can be scheduled makes up for a rate inside.
    known = {"torch_sgd", "timm_sgdw", "apex_sgd", "flash_sgd", "heavyball_sgd", "tf1_momentum"}
    can = inside and found.recipe.dialect in known and "nesterov" not in repr(source)
    if not (found.scheduled_learning_rate or can):
        with pytest.raises(ValueError, match=r"the learning rate is inside the velocity in .* makes up for it"):
            equivalent_hyperparameters(given, found.recipe.dialect)
        return
    answer = equivalent_hyperparameters(given, found.recipe.dialect)
    assert answer.scheduled_learning_rate
    assert is_same(cached(given), run(answer.recipe))


@pytest.mark.parametrize("target", ["torch_sgd", "timm_sgdw", "apex_sgd", "flash_sgd", "heavyball_sgd", "tf1_momentum"])
def test_keras_rate_is_corrected_by_a_scheduled_momentum(target, x64):
    def warm(step):
        return 0.1 * (1 + (step > 3)) / (1 + (step > 8))

    source = Recipe("keras_sgd", learning_rate=warm, momentum=0.9)
    found = equivalent_hyperparameters(source, target)
    assert found.first_step
    assert found.scheduled_learning_rate
    assert is_same(run(source), run(found.recipe))
    plain = {k: v for k, v in found.recipe.hyperparameters.items() if not callable(v)}
    rate_name, name = RATES[target], "beta" if target == "heavyball_sgd" else "momentum"
    assert not is_same(run(source), run(Recipe(target, **{**plain, rate_name: warm, name: 0.9})))


@pytest.mark.parametrize(
    ("source", "target", "same"),
    [
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "tf1_momentum", True),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "heavyball_sgd", True),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "qhoptim_qhm", False),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=1.0), "torch_sgd", False),
        (Recipe("muon_average", momentum=0.9), "muon_sum", False),
        (Recipe("signum", momentum=0.9), "lion", True),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "keras_sgd", None),
        (Recipe("aggmo", lr=0.1, betas=(0.9,)), "torch_sgd", None),
        (Recipe("torch_sgd", lr=0.1), "tf1_momentum", None),
    ],
)
def test_a_scheduled_momentum_keeps_them_the_same_if_and_only_if_it_is_said_to(source, target, same, x64):
    found = equivalent_hyperparameters(source, target)
    assert found.scheduled_momentum is same
    assert (same is False) == any("when the momentum changes" in note for note in found.notes)
    if same is None:
        return
    other = Recipe(source.dialect, **{**source.hyperparameters, "momentum": 0.6})
    later = equivalent_hyperparameters(other, target).recipe

    def alternating(a, b):
        """Each number of two recipes in turn."""
        mixed = {}
        for name, x in a.hyperparameters.items():
            y = b.hyperparameters.get(name, x)
            if isinstance(x, tuple):
                mixed[name] = tuple(functools.partial(turn, *p) for p in zip(x, y, strict=True))
            else:
                mixed[name] = x if x == y else functools.partial(turn, x, y)
        return Recipe(a.dialect, **mixed)

    def turn(x, y, step):
        return x + (y - x) * (step % 2)

    def complete(recipe):
        given = {"beta": 0.9} if recipe.dialect == "heavyball_sgd" else {}
        return Recipe(recipe.dialect, **{**given, **recipe.hyperparameters})

    a, b = alternating(source, other), alternating(complete(found.recipe), complete(later))
    assert is_same(run(a), run(b)) == same


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        # qhoptim's own converters and the papers' tables.
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "qhoptim_qhm", {"lr": 1.0, "momentum": 0.9, "nu": 1.0}),
        (
            Recipe("torch_sgd", lr=0.1, momentum=0.9, nesterov=True),
            "qhoptim_qhm",
            {"lr": 1.0, "momentum": 0.9, "nu": 0.9},
        ),
        (
            Recipe("accsgd", lr=0.1),
            "qhoptim_qhm",
            {
                "lr": 0.1 * 0.7 * 11 / 1.7,
                "momentum": (1000 - 0.49 * 10) / (1000 + 7),
                "nu": (7 - 1) / (0.7 * 11),
            },
        ),
        (Recipe("mass", lr=0.3), "qhoptim_qhm", {"lr": 0.4, "momentum": 0.95 / 1.05, "nu": 0.25}),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "keras_sgd", {"learning_rate": 0.1, "momentum": 0.9}),
        (
            Recipe("keras_sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01),
            "qhoptim_qhm",
            {"lr": 1.0, "momentum": 0.9, "nu": 1.0, "weight_decay": 0.001, "weight_decay_type": "direct"},
        ),
        (Recipe("signum", momentum=0.8), "lion", {"lr": 1e-3, "betas": (0.8, 0.8)}),
        (Recipe("muon_sum", momentum=0.9, nesterov=True), "muon_average", {"momentum": 0.9}),
    ],
)
def test_known_conversions(source, target, expected):
    found = equivalent_hyperparameters(source, target).recipe.hyperparameters
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12)), name


@every_pair
def test_there_and_back_is_where_it_started(source, found):
    if not found.first_step:
        return
    back = equivalent_hyperparameters(found.recipe, source.dialect).recipe
    assert mo.equivalent(source.filter(), back.filter(), steps=8)
    a, b = source.description(), back.description()
    assert [b.l2, b.decoupled] == pytest.approx([a.l2, a.decoupled], rel=1e-12)
    assert (a.sign, a.maximize) == (b.sign, b.maximize)


@pytest.mark.parametrize(
    ("source", "target", "match"),
    [
        (Recipe("aggmo", lr=0.1), "torch_sgd", "only a rule of order 1 has a quasi-hyperbolic form, got order 2"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7), "torch_sgd", r"its nu, 0.7, must be 1 \(heavy ball\)"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7), "caffe_sgd", "its nu, 0.7, must be 1: a heavy ball"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7), "aggmo", "for two velocities"),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "mass", "must be above 0 and its nu, 1, below 1"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.95), "mass", "it would need kappa_t 0.48"),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "lion", "it takes the sign of the update"),
        (Recipe("lion"), "torch_sgd", "it takes no sign of the update"),
        (Recipe("lion"), "signum", "its nu, 0.909091, must be 1"),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "muon_sum", "a momentum without a learning rate"),
        (Recipe("torch_sgd", weight_decay=0.1), "keras_sgd", "it has no coupled weight decay"),
        (Recipe("timm_sgdw", weight_decay=0.1), "torch_sgd", "it has no decoupled weight decay"),
        (Recipe("torch_sgd", maximize=True), "keras_sgd", "it cannot maximize"),
        (Recipe("torch_sgd", lr=lambda t: 0.1, momentum=0.9), "keras_sgd", "no momentum of keras_sgd makes up for it"),
        (
            Recipe("keras_sgd", learning_rate=rate, momentum=0.9, nesterov=True),
            "torch_sgd",
            "no momentum of torch_sgd makes up for it",
        ),
    ],
)
def test_what_has_no_equivalent_is_refused_with_the_reason(source, target, match):
    with pytest.raises(ValueError, match=match):
        equivalent_hyperparameters(source, target)


def test_errors_of_the_call():
    with pytest.raises(TypeError, match="source must be a Recipe"):
        equivalent_hyperparameters("torch_sgd", "keras_sgd")
    with pytest.raises(ValueError, match=r"target must be one of 'torch_sgd', .*, got 'keras'"):
        equivalent_hyperparameters(SOURCES[0], "keras")
    with pytest.raises(ValueError, match=r"dialect must be one of .*, got 'adam'"):
        Recipe("adam", lr=0.1)
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got -1"):
        Recipe("torch_sgd", lr=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        Recipe("torch_sgd", learning_rate=0.1)
    with pytest.raises(TypeError, match="storage is no hyperparameter"):
        Recipe("torch_sgd", storage="int8")
    for momentum in (lambda t: 0.9, np.float32(0.9) * jnp.ones(())):
        with pytest.raises(TypeError, match="source must have numbers, but for a schedule of the rate, got momentum="):
            equivalent_hyperparameters(Recipe("torch_sgd", momentum=momentum), "tf1_momentum")


def test_a_recipe_shows_what_it_is_and_makes_the_optimizer():
    recipe = Recipe("torch_sgd", lr=0.1, momentum=0.9)
    assert repr(recipe) == "Recipe('torch_sgd', lr=0.1, momentum=0.9)"
    state = recipe.transformation(storage="bfloat16").init(jnp.ones(8))
    assert mo.velocity(state)[0].shape == (8,)
    assert mo.equivalent(recipe.filter(), mo.heavy_ball(0.9).scale(-0.1))
