"""The record that makes a function a dialect: its name, its inverse and its schedulable arguments, in one registry.

A dialect is one function from its library's arguments to a `Description`, under a decorator that holds the rest:

    @dialect(inverse=_arguments, learning_rate="lr", momentum="beta")
    def heavyball_sgd(lr=0.0025, beta=0.9, ...): ...

No part has a default: a part that is left out is a `TypeError` on import.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeAlias

import optax

from .. import _checks
from ..filters.coefficients import Scalar
from .constant_form import ConstantForm, NotExpressibleError
from .description import Description
from .entries import as_array

P = ParamSpec("P")

# An argument of a dialect, `storage` apart.
Hyperparameter: TypeAlias = "Scalar | tuple[Scalar, ...] | list[Scalar] | str | bool | None"


@dataclasses.dataclass(frozen=True, eq=False)
class Dialect:
    """A momentum optimizer of another library, under its own arguments.

    Attributes:
      name: That of its function in `interop`.
      describe: From the library's arguments to a `Description`.
      inverse: From a `ConstantForm` to the arguments that give it; raises `NotExpressibleError` if none do.
      learning_rate: Which argument is the learning rate; None for a momentum without one.
      momentum: Which argument, or pair of arguments, is the decay that may follow a schedule; None if none may.
    """

    name: str
    describe: Callable[..., Description]
    inverse: Callable[[ConstantForm], Mapping[str, Hyperparameter]]
    learning_rate: str | None
    momentum: str | None

    def __post_init__(self) -> None:
        for role in ("learning_rate", "momentum"):
            argument = getattr(self, role)
            if argument is not None and argument not in self._parameters:
                raise ValueError(f"{role} must be an argument of {self.name} or None, got {argument!r}")

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.describe).parameters

    @functools.cached_property
    def defaults(self) -> Mapping[str, Hyperparameter]:
        """The arguments that have a default, with it."""
        return {
            name: parameter.default
            for name, parameter in self._parameters.items()
            if parameter.default is not inspect.Parameter.empty and name != "storage"
        }

    def arguments(self, form: ConstantForm) -> dict[str, Hyperparameter]:
        """The arguments with the steps of `form`; a `ValueError` with the reason if there are none."""
        try:
            return dict(self.inverse(form))
        except NotExpressibleError as reason:
            raise ValueError(f"{self.name} cannot take these steps: {reason}") from None


# The dialects by name.
DIALECTS: dict[str, Dialect] = {}


def dialect(
    *,
    inverse: Callable[[ConstantForm], Mapping[str, Hyperparameter]],
    learning_rate: str | None,
    momentum: str | None,
) -> Callable[[Callable[P, Description]], Callable[P, optax.GradientTransformationExtraArgs]]:
    """Make a function that describes an optimizer return its transformation, and list it in `DIALECTS`.

    An argument may be a tensor of PyTorch's with one element, as its learning rate is where programs are captured: it
    counts as the number that it holds now.

    Args:
      inverse: See `Dialect`, as the others.
      learning_rate: The name of an argument, or None.
      momentum: The name of an argument, or None.
    """

    def register(function: Callable[P, Description]) -> Callable[P, optax.GradientTransformationExtraArgs]:
        @functools.wraps(function)
        def describe(*args: P.args, **kwargs: P.kwargs) -> Description:
            return function(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})

        record = Dialect(function.__name__, describe, inverse, learning_rate, momentum)
        DIALECTS[record.name] = record

        @functools.wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
            return describe(*args, **kwargs).transformation()

        shown = inspect.signature(function).replace(return_annotation=optax.GradientTransformationExtraArgs)
        public.__signature__ = shown  # type: ignore[attr-defined] # what inspect and help read
        return public

    return register


def check_without_effect(**flags: object) -> None:
    """Raise unless each argument that only chooses an implementation in PyTorch is None, True or False."""
    for name, value in flags.items():
        if value is not None:
            _checks.flag(name, value)


def plain(argument: Any) -> Any:
    """An argument of a dialect; a tensor of PyTorch's as its one number."""
    if not hasattr(argument, "detach"):
        return argument
    array = as_array("tensor", argument)
    if array.size != 1:
        raise ValueError(f"a tensor must have one element to be a hyperparameter, got shape {array.shape}")
    return float(array.item())
