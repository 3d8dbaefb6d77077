"""A momentum optimizer as data, and the one chain that runs it."""

import dataclasses

import optax

from .. import _checks
from ..filters import Filter, before_sign
from ..filters.coefficients import Scalar, is_zero, lift
from ..optimizers.arguments import add_decayed_weights
from ..optimizers.gradient_dtype import in_gradient_dtype
from ..storage import resolve
from ..storage._by_leaf import AnyStorage
from ..storage._float32 import Float32
from ..transform import scale_by_momentum


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    r"""Everything in which momentum optimizers differ.

    With learning rate eta, filter H and weight decays lambda, the learning rate outside or inside the velocity:

    $$ \theta' = \theta - \eta\,H(\pm g + \lambda_1 \theta) - \eta \lambda_2 \theta \quad\text{or}\quad
       \theta' = \theta - H(\eta (\pm g + \lambda_1 \theta)) - \eta \lambda_2 \theta $$

    Both are the same at a constant learning rate.

    Attributes:
      rule: H; None without momentum, and then without state.
      learning_rate: eta; None where the update is neither scaled nor turned downhill.
      rate_inside: Whether each gradient keeps the learning rate of the step at which it arrived.
      l2: lambda_1, coupled weight decay, through the momentum.
      decoupled: lambda_2, weight decay past the momentum.
      maximize: Whether the gradient's sign is turned, before weight decay.
      sign: Whether the sign of the filter's update is taken.
      storage: How the velocity is stored, see `scale_by_momentum`.
    """

    rule: Filter | None
    learning_rate: "Scalar | None"
    rate_inside: bool = False
    l2: Scalar = 0.0
    decoupled: Scalar = 0.0
    maximize: bool = False
    sign: bool = False
    storage: AnyStorage = "float32"

    def __post_init__(self) -> None:
        _checks.flag("maximize", self.maximize)
        if self.rule is None and not isinstance(resolve(self.storage), Float32):
            raise ValueError(f"storage needs a momentum to keep, got {self.storage!r} and momentum 0")

    def displacement(self) -> Filter:
        """The filter from the gradients (sign and coupled decay included) to the steps of the parameters."""
        rule = Filter((), (), (), 1.0) if self.rule is None else self.rule
        if self.learning_rate is None:
            return rule
        down = lift(lambda rate: -rate, self.learning_rate)
        return _rate_inside(rule, down) if self.rate_inside else rule.scale(down)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The chain."""
        inside = self.rate_inside and self.rule is not None
        rule = self.displacement() if inside else self.rule
        if self.sign and rule is not None:
            rule = before_sign(rule)
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


def checked_decay(weight_decay: "Scalar | None") -> Scalar:
    """A weight decay that is a coefficient in range; 0 for None, which `optax.inject_hyperparams` leaves alone."""
    if weight_decay is None:
        return 0.0
    _checks.within("weight_decay", weight_decay, "[0, inf)")
    return weight_decay


def constant_decay(weight_decay: "Scalar | None") -> Scalar:
    """The same of a library that takes no schedule for its weight decay."""
    decay = 0.0 if weight_decay is None else weight_decay
    _checks.constant("weight_decay", decay, "[0, inf)")
    return decay


def _rate_inside(rule: Filter, rate: Scalar) -> Filter:
    """The rule for gradients that are multiplied by the learning rate of the step at which they arrive."""
    B = tuple(lift(lambda b, r: b * r, b, rate) for b in rule.B)
    return Filter(rule.A, B, rule.C, lift(lambda d, r: d * r, rule.D, rate), rule.lookahead)
