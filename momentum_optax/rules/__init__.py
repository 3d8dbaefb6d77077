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

from .after_optimizer import ema_nesterov as ema_nesterov
from .after_optimizer import lookahead as lookahead
from .after_optimizer import outer_nesterov as outer_nesterov
from .after_optimizer import primal_averaging as primal_averaging
from .games import complex_heavy_ball as complex_heavy_ball
from .games import optimistic as optimistic
from .look_ahead import nadam_mix as nadam_mix
from .look_ahead import nesterov as nesterov
from .look_ahead import optimized_gradient as optimized_gradient
from .look_ahead import overshoot as overshoot
from .look_ahead import schedule_free as schedule_free
from .look_ahead import torch_nesterov as torch_nesterov
from .mixes import grokfast as grokfast
from .mixes import lion_mix as lion_mix
from .mixes import mars_mix as mars_mix
from .mixes import muon_mix as muon_mix
from .several_velocities import adan_mix as adan_mix
from .several_velocities import ademamix_mix as ademamix_mix
from .several_velocities import aggregated as aggregated
from .several_velocities import aggregated_exponential as aggregated_exponential
from .several_velocities import pid as pid
from .several_velocities import positive_negative as positive_negative
from .sums_and_averages import ema as ema
from .sums_and_averages import heavy_ball as heavy_ball
from .sums_and_averages import quasi_hyperbolic as quasi_hyperbolic
from .sums_and_averages import simplified_ademamix as simplified_ademamix
from .tuned import accelerated as accelerated
from .tuned import chebyshev as chebyshev
from .tuned import mass as mass
from .tuned import robust_momentum as robust_momentum
from .tuned import synthesized_nesterov as synthesized_nesterov
from .tuned import triple_momentum as triple_momentum
