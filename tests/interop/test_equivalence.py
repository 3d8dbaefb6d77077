"""Hyperparameters between dialects: every pair, run side by side."""

import numpy as np
import optax
import pytest
from interop.recipe_pairs import PAIRS, RATES, cached, changed, every_pair, is_same, rate, run

import momentum_optax as mo
from momentum_optax.interop import Recipe, equivalent_hyperparameters
from momentum_optax.interop.dialect import DIALECTS


def test_there_are_pairs_of_every_dialect():
    assert {p.values[0].dialect for p in PAIRS} == {p.values[1].recipe.dialect for p in PAIRS} == set(DIALECTS)
    assert len(PAIRS) > 100


@pytest.mark.one_in(8)
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


@pytest.mark.one_in(8)
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


@pytest.mark.one_in(2)
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


def test_a_schedule_of_optax_is_corrected_too():
    # Its values are float32, in which the filters agree to seven digits.
    for schedule in (optax.cosine_decay_schedule(0.1, 50), optax.linear_schedule(0.01, 0.1, 9)):
        source = Recipe("keras_sgd", learning_rate=schedule, momentum=0.9)
        found = equivalent_hyperparameters(source, "torch_sgd").recipe.hyperparameters
        assert found["lr"] is schedule
        for step in (1, 5, 12):
            before, now = (float(schedule(t)) for t in (step - 1, step))
            np.testing.assert_allclose(found["momentum"](step), 0.9 * before / now, rtol=1e-6)
    # At 0 Keras goes on along its velocity, and PyTorch does not write to the buffer.
    for schedule in (optax.cosine_decay_schedule(0.1, 20), optax.linear_schedule(0.0, 0.1, 9)):
        source = Recipe("keras_sgd", learning_rate=schedule, momentum=0.9)
        with pytest.raises(ValueError, match="torch_sgd has no such steps: the learning rate is 0 at a step"):
            equivalent_hyperparameters(source, "torch_sgd")
    with pytest.raises(ValueError, match="no momentum of keras_sgd makes up for it"):
        equivalent_hyperparameters(Recipe("torch_sgd", lr=schedule, momentum=0.9), "keras_sgd")


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


@pytest.mark.one_in(2)
@every_pair
def test_there_and_back_is_where_it_started(source, found):
    if not found.first_step:
        return
    back = equivalent_hyperparameters(found.recipe, source.dialect).recipe
    assert mo.equivalent(source.filter(), back.filter(), steps=8)
    a, b = source.description(), back.description()
    assert [b.l2, b.decoupled] == pytest.approx([a.l2, a.decoupled], rel=1e-12)
    assert (a.sign, a.maximize) == (b.sign, b.maximize)
