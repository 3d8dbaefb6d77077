r"""The catalogue: every published linear momentum rule, as coefficients of one `Filter`.

Each function states the published form that it implements. In the formulas g_t is the gradient at the stored
parameters and u_t the update; the parameters then move by -learning_rate u_t. Velocities start at zero; primes mark the
value after the step. "Normal form" gives (scale, decay, nu) such that the rule is
`quasi_hyperbolic(decay, nu).scale(scale)`; `Filter.normal_form` computes it.

Every argument that appears in a formula may be a number, a scalar array (traced too) or a schedule of the step, unless
its description says otherwise. Numbers are range-checked, with `ValueError`; a value that is not a scalar raises
`TypeError`. Arrays and schedules are not checked. The decay of a sum, such as the heavy ball's, may be 1: nothing is
forgotten. The decay of an average may not: the gradient would have weight 0. Velocities have the parameters' shapes,
updates the gradients' dtypes; arithmetic is in float32, or wider where the leaf is (see `scale_by_momentum`).
"""

from .after_optimizer import *
from .games import *
from .look_ahead import *
from .mixes import *
from .several_velocities import *
from .sums_and_averages import *
from .tuned import *
