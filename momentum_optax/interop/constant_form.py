"""The numbers that the steps of a dialect depend on, and the requirements that a dialect can make of them."""

from typing import NamedTuple


class NotExpressibleError(Exception):
    """The reason why no arguments of a dialect give the same steps, as a clause in which "it" is that dialect."""


class ConstantForm(NamedTuple):
    r"""A dialect of one velocity at constant hyperparameters: all that its steps depend on.

    Past the first gradient it is a quasi-hyperbolic rule (see `Filter.normal_form`), weight decays and signs.

    Attributes:
      learning_rate: None for a momentum without one.
      gain: The response to a constant gradient of 1, learning rate included unless a sign is taken.
      decay: The rule's decay.
      nu: The weight of the average, beside 1 - nu for the gradient: 1 for a heavy ball, the decay for Nesterov's form.
      first_gradient: How many times as much the first gradient counts.
      l2: Coupled weight decay.
      shrink: By how much decoupled weight decay shrinks the parameters in one step, relatively.
      maximize: Whether the steps ascend.
      sign: Whether the sign of the update is taken.
    """

    learning_rate: float | None
    gain: float
    decay: float
    nu: float
    first_gradient: float
    l2: float
    shrink: float
    maximize: bool
    sign: bool

    @property
    def sum_rate(self) -> float:
        """The learning rate of the form v' = decay v + g."""
        return self.gain * (1 - self.decay)

    def decoupled_decay(self, learning_rate: float | None) -> float:
        """Decoupled weight decay per unit of the learning rate."""
        return self.shrink / learning_rate if self.shrink and learning_rate else 0.0

    def require_linear(
        self, *, l2: bool = False, decoupled: bool = False, maximize: bool = False, learning_rate: bool = True
    ) -> None:
        """Refuse a sign, and each of these that the form has and the dialect lacks."""
        if self.sign:
            raise NotExpressibleError("it takes no sign of the update")
        if (self.learning_rate is None) == learning_rate:
            raise NotExpressibleError("one of the two is a momentum without a learning rate")
        self._require_extras(l2=l2, decoupled=decoupled, maximize=maximize)

    def require_sign(self, *, l2: bool = False, decoupled: bool = False, maximize: bool = False) -> None:
        """Refuse a form without a sign, and each of these that the form has and the dialect lacks."""
        if not self.sign:
            raise NotExpressibleError("it takes the sign of the update")
        self._require_extras(l2=l2, decoupled=decoupled, maximize=maximize)

    def _require_extras(self, *, l2: bool, decoupled: bool, maximize: bool) -> None:
        if self.l2 and not l2:
            raise NotExpressibleError("it has no coupled weight decay")
        if self.shrink and not decoupled:
            raise NotExpressibleError("it has no decoupled weight decay")
        if self.l2 and self.shrink:
            raise NotExpressibleError("it has one kind of weight decay")
        if self.maximize and not maximize:
            raise NotExpressibleError("it cannot maximize")

    def require_heavy_ball(self) -> None:
        """Refuse all but v' = decay v + g, u = v'."""
        if not near(self.nu, 1.0):
            raise NotExpressibleError(f"its nu, {self.nu:.6g}, must be 1: a heavy ball")

    def require_inner_velocity(self) -> None:
        """Refuse a decay of 0 and a nu of 1, for dialects whose velocity mixes with the gradient."""
        if not (self.decay > 0 and self.nu < 1):
            raise NotExpressibleError(
                f"its decay, {self.decay:.6g}, must be above 0 and its nu, {self.nu:.6g}, below 1"
            )

    def is_nesterov(self) -> bool:
        """Whether nu is that of Nesterov's form; refuses all but this and the heavy ball."""
        if near(self.nu, 1.0):
            return False
        if not near(self.nu, self.decay):
            raise NotExpressibleError(
                f"its nu, {self.nu:.6g}, must be 1 (heavy ball) or the decay, {self.decay:.6g} (Nesterov)"
            )
        return True


def near(x: float, y: float) -> bool:
    """Whether two numbers are equal up to roundings."""
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y))
