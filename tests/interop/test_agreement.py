"""Whether two recipes stay the same under schedules: where they are said to differ, they do."""

import functools

import pytest
from interop.recipe_pairs import RATES, cached, changed, every_pair, is_same, rate, run

from momentum_optax.interop import Recipe, equivalent_hyperparameters


@pytest.mark.one_in(8)
@every_pair
def test_a_scheduled_rate_keeps_them_the_same_if_and_only_if_it_is_said_to(source, found, x64):
    if source.dialect.startswith("muon") or not found.first_step:
        return
    a = cached(changed(source, RATES[source.dialect], rate))
    b = cached(changed(found.recipe, RATES[found.recipe.dialect], rate))
    assert is_same(a, b) == found.scheduled_learning_rate
    assert found.scheduled_learning_rate == (not any("learning rate is inside" in note for note in found.notes))


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
