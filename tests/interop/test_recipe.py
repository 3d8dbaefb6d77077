"""Recipes: errors of their arguments, and what they make."""

import jax.numpy as jnp
import numpy as np
import pytest
from interop.recipe_pairs import SOURCES
from interop.test_dialect import Tensor

import momentum_optax as mo
from momentum_optax.interop import Recipe, equivalent_hyperparameters


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
    with pytest.raises(TypeError, match="storage is not a hyperparameter"):
        Recipe("torch_sgd", storage="int8")
    for momentum in (lambda t: 0.9, np.float32(0.9) * jnp.ones(())):
        with pytest.raises(
            TypeError, match="source must have numbers, apart from a schedule of the learning rate, got momentum="
        ):
            equivalent_hyperparameters(Recipe("torch_sgd", momentum=momentum), "tf1_momentum")


def test_dampening_that_takes_no_gradient_has_no_equivalent():
    with pytest.raises(ValueError, match="has no equivalent in another dialect: after the first gradient, none counts"):
        equivalent_hyperparameters(Recipe("torch_sgd", lr=0.1, momentum=0.9, dampening=1.0), "keras_sgd")


def test_a_tensor_counts_as_its_number():
    recipe = Recipe("torch_sgd", lr=Tensor(0.5), momentum=0.9)
    assert repr(recipe) == "Recipe('torch_sgd', lr=0.5, momentum=0.9)"
    assert equivalent_hyperparameters(recipe, "keras_sgd").recipe.hyperparameters["learning_rate"] == 0.5


def test_a_recipe_shows_what_it_is_and_makes_the_optimizer():
    recipe = Recipe("torch_sgd", lr=0.1, momentum=0.9)
    assert repr(recipe) == "Recipe('torch_sgd', lr=0.1, momentum=0.9)"
    state = recipe.transformation(storage="bfloat16").init(jnp.ones(8))
    assert mo.velocity(state)[0].shape == (8,)
    assert mo.equivalent(recipe.filter(), mo.heavy_ball(0.9).scale(-0.1))
