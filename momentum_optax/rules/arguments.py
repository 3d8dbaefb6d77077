r"""The catalogue: every published linear momentum rule, as coefficients of one `Filter`.

Each function names the published form that it is. In the formulas g_t is the gradient at the stored parameters and
u_t the update; the parameters then move by -learning_rate u_t. Velocities start at zero; primes mark the value after
the step. "Normal form" gives (scale, decay, nu) such that the rule is `quasi_hyperbolic(decay, nu).scale(scale)`;
`Filter.normal_form` computes it, and `quasi_hyperbolic(decay, nu).scale(scale)` goes back.

Every argument that is named in a formula may be a number, a scalar array (traced too) or a schedule of the step,
unless its own text says otherwise. Numbers are range-checked here, with `ValueError`; what is no scalar at all raises
`TypeError`. Arrays and schedules are not checked. The decay of a sum, such as the heavy ball's, may be 1: nothing is
forgotten. That of an average may not: the gradient would have weight 0. Velocities have the parameters' shapes, updates
the gradients' dtypes; accumulation is in float32, or wider where the leaf is (see `scale_by_momentum`).
"""

from typing import Any

from .. import _checks
from ..filters.coefficients import Coefficient, PerLeafSchedule, Scalar

AGE = PerLeafSchedule(lambda step, age: age)


def step_number(step: Any) -> Any:
    return step


def checked_decay(name: str, decay: Scalar) -> Scalar:
    """The range of an average's decay: at 1 the gradient would have no weight, and below 0 the memory alternates."""
    _checks.within(name, decay, "[0, 1)")
    return decay


def diagonal(*entries: Coefficient) -> tuple[tuple[Coefficient, ...], ...]:
    return tuple(tuple(x if i == j else 0.0 for j in range(len(entries))) for i, x in enumerate(entries))
