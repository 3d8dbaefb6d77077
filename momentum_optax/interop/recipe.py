"""`Recipe`: a dialect with its hyperparameters."""

__all__ = ["Recipe"]

from typing import cast

import optax

from .. import _checks
from ..filters import Filter
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description
from .dialect import DIALECTS, Hyperparameter, plain


class Recipe:
    """A dialect with its hyperparameters: `Recipe("torch_sgd", lr=0.1, momentum=0.9)`.

    Attributes:
      dialect: The name of a function of `interop`.
      hyperparameters: Its arguments, without `storage`; a tensor of PyTorch's as the number that it held.
    """

    def __init__(self, dialect: str, /, **hyperparameters: Hyperparameter) -> None:
        _checks.choice("dialect", dialect, tuple(DIALECTS))
        if "storage" in hyperparameters:
            raise TypeError("storage is not a hyperparameter: give it to transformation")
        self.dialect = dialect
        self.hyperparameters: dict[str, Hyperparameter] = {name: plain(x) for name, x in hyperparameters.items()}
        self.description()

    def __repr__(self) -> str:
        return f"Recipe({', '.join([repr(self.dialect), *(f'{k}={v!r}' for k, v in self.hyperparameters.items())])})"

    def transformation(self, *, storage: AnyStorage = "float32") -> optax.GradientTransformationExtraArgs:
        """The optimizer, as the dialect's own function gives it."""
        return DIALECTS[self.dialect].describe(**self.hyperparameters, storage=storage).transformation()

    def filter(self) -> Filter:
        """The filter from the gradients, with weight decay and sign of ascent, to the steps; learning rate included.

        Taking the sign and decoupled weight decay are not linear filters of the gradient and are left out.
        """
        return self.description().displacement()

    def description(self) -> Description:
        """The parts of the optimizer."""
        return DIALECTS[self.dialect].describe(**self.hyperparameters)


def changed(recipe: Recipe, **changes: Hyperparameter) -> Recipe:
    """The recipe with other hyperparameters."""
    return Recipe(recipe.dialect, **{**recipe.hyperparameters, **changes})


def value(recipe: Recipe, argument: str) -> Hyperparameter:
    """The value of an argument: what the recipe says, or the dialect's default."""
    return recipe.hyperparameters.get(argument, DIALECTS[recipe.dialect].defaults.get(argument))


def constant_form(recipe: Recipe) -> ConstantForm:
    """The form of a recipe of numbers; an error if it has schedules, or more than one velocity."""
    for name, given in recipe.hyperparameters.items():
        for x in given if isinstance(given, tuple | list) else (given,):
            if _checks.is_schedule(x) or _checks.is_scalar_array(x):
                raise TypeError(
                    f"source must have numbers, apart from a schedule of the learning rate, got {name}={x!r}"
                )
    d = recipe.description()
    # Numbers, as the loop has seen.
    learning_rate, l2, decoupled = cast("tuple[float | None, float, float]", (d.learning_rate, d.l2, d.decoupled))
    rule = Filter((), (), (), 1.0) if d.rule is None else d.rule
    settled = rule.at(1, 1).pruned()
    direct, start = cast("tuple[float, float]", (settled.D, rule.at(0, 0).D))
    gain, decay, nu = direct, 0.0, 1.0
    if settled.order:
        try:
            gain, decay, nu = settled.normal_form()
        except ValueError as error:
            raise ValueError(f"{recipe!r} has no equivalent in another dialect: {error}") from None
    if start != direct == 0:
        raise ValueError(f"{recipe!r} has no equivalent in another dialect: after the first gradient, none counts")
    # A sign forgets the size of its argument, and the learning rate comes after it.
    size = 1.0 if learning_rate is None or d.sign else learning_rate
    return ConstantForm(
        learning_rate=learning_rate,
        gain=gain * size,
        decay=decay,
        nu=nu,
        first_gradient=1.0 if start == direct else start / direct,
        l2=l2,
        shrink=decoupled * (1.0 if learning_rate is None else learning_rate),
        maximize=d.maximize,
        sign=d.sign,
    )
