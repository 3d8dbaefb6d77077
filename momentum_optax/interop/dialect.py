"""An optimizer of another library as data, and the one chain that runs it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import optax

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift
from ..optimizers.arguments import add_decayed_weights
from ..optimizers.gradient_dtype import in_gradient_dtype
from ..storage import Storage, resolve
from ..storage._float32 import Float32
from ..transform import scale_by_momentum
from .slots import as_array

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True, eq=False)
class Dialect:
    r"""What momentum optimizers differ in.

    With rate eta, filter H and weight decays lambda, rate outside or inside:

    $$ \theta' = \theta - \eta\,H(\pm g + \lambda_1 \theta) - \eta \lambda_2 \theta \quad\text{or}\quad
       \theta' = \theta - H(\eta (\pm g + \lambda_1 \theta)) - \eta \lambda_2 \theta $$

    Both are the same at a constant rate.

    Attributes:
      rule: H; None for none, without state.
      learning_rate: eta; None where the update is neither scaled nor turned downhill.
      rate_inside: Whether each gradient keeps the rate of its own step.
      l2: lambda_1, coupled weight decay, through the momentum.
      decoupled: lambda_2, weight decay past the momentum.
      maximize: Whether the gradient's sign is turned, before weight decay.
      sign: Whether the sign of the filter's update is taken.
      storage: How the velocity is kept, see `scale_by_momentum`.
    """

    rule: Filter | None
    learning_rate: "Scalar | None"
    rate_inside: bool = False
    l2: Scalar = 0.0
    decoupled: Scalar = 0.0
    maximize: bool = False
    sign: bool = False
    storage: str | Storage = "float32"

    def __post_init__(self) -> None:
        _checks.flag("maximize", self.maximize)
        if self.rule is None and not isinstance(resolve(self.storage), Float32):
            raise ValueError(f"storage needs a momentum to keep, got {self.storage!r} and momentum 0")

    def displacement(self) -> Filter:
        """The filter from the gradients (sign and coupled decay in them) to the steps of the parameters."""
        rule = Filter((), (), (), 1.0) if self.rule is None else self.rule
        if self.learning_rate is None:
            return rule
        down = lift(lambda rate: -rate, self.learning_rate)
        return _rate_inside(rule, down) if self.rate_inside else rule.scale(down)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The chain."""
        inside = self.rate_inside and self.rule is not None
        rule = self.displacement() if inside else self.rule
        decay = self.decoupled
        if inside and self.learning_rate is not None:
            decay = lift(lambda r, w: -r * w, self.learning_rate, decay)
        return in_gradient_dtype(
            optax.chain(
                optax.scale(-1.0) if self.maximize else optax.identity(),
                add_decayed_weights(self.l2),
                optax.identity() if rule is None else scale_by_momentum(rule, storage=self.storage),
                optax.scale_by_sign() if self.sign else optax.identity(),
                optax.identity() if is_zero(self.decoupled) else add_decayed_weights(decay),
                optax.identity() if inside else optax.scale_by_learning_rate(self.learning_rate),
            )
        )


# The dialects by name, each a function from its library's arguments to a `Dialect`.
DIALECTS: dict[str, Callable[..., Dialect]] = {}


def dialect(function: Callable[P, Dialect]) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """Make a function that describes an optimizer give its transformation, and list it in `DIALECTS`.

    An argument may be a tensor of PyTorch's with one element, as its learning rate is where programs are captured: it
    counts as the number that it holds now.
    """

    @functools.wraps(function)
    def describe(*args: P.args, **kwargs: P.kwargs) -> Dialect:
        return function(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()})

    DIALECTS[function.__name__] = describe

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        return describe(*args, **kwargs).transformation()

    shown = inspect.signature(function).replace(return_annotation=optax.GradientTransformationExtraArgs)
    public.__signature__ = shown  # type: ignore[attr-defined] # what inspect and help read
    return public


def checked_decay(weight_decay: "Scalar | None") -> Scalar:
    """A weight decay that is a coefficient in range; 0 for None, which `optax.inject_hyperparams` leaves alone."""
    if weight_decay is None:
        return 0.0
    _checks.within("weight_decay", weight_decay, "[0, inf)")
    return weight_decay


def check_without_effect(**flags: Any) -> None:
    """Raise unless each argument that changes how PyTorch computes, but no number, is None, True or False."""
    for name, value in flags.items():
        if value is not None:
            _checks.flag(name, value)


def _plain(argument: Any) -> Any:
    """`argument`; a tensor of PyTorch's as its one number."""
    if not hasattr(argument, "detach"):
        return argument
    array = as_array("tensor", argument)
    if array.size != 1:
        raise ValueError(f"a tensor must have one element to be a hyperparameter, got shape {array.shape}")
    return float(array.item())


def _rate_inside(rule: Filter, rate: Scalar) -> Filter:
    """The rule for gradients that are multiplied by the rate of their own step."""
    B = tuple(lift(lambda b, r: b * r, b, rate) for b in rule.B)
    return Filter(rule.A, B, rule.C, lift(lambda d, r: d * r, rule.D, rate), rule.lookahead)
