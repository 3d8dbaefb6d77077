"""Analysis of a rule before it runs: memory, gains, convergence, stability and noise, from its coefficients.

Everything is NumPy in float64 and takes any `Filter`. Arrays broadcast. Functions that need constant coefficients use
the limit of coefficients that depend on a leaf's age (special first steps, debiasing weights). Rules whose coefficients
repeat (`Filter.period`: outer steps, Lookahead, restarts, cyclical schedules) are analysed over a whole period by most
functions. For other rules that depend on the step, `step=` chooses the step whose coefficients are used.
"""

from .averages import PostHoc as PostHoc
from .averages import post_hoc_weights as post_hoc_weights
from .convergence import asymptotic_iterations as asymptotic_iterations
from .convergence import contraction as contraction
from .convergence import iterations as iterations
from .convergence import stability_limit as stability_limit
from .convergence import transient_growth as transient_growth
from .games import bilinear_game as bilinear_game
from .loop import closed_loop as closed_loop
from .loop import error_curve as error_curve
from .loop import monodromy as monodromy
from .loop import spectral_radius as spectral_radius
from .mechanics import energy as energy
from .mechanics import energy_limit as energy_limit
from .noise import stationary_variance as stationary_variance
from .noise import variance_over_a_period as variance_over_a_period
from .plots import plot as plot
from .response import bandwidth as bandwidth
from .response import dc_gain as dc_gain
from .response import effective_learning_rate as effective_learning_rate
from .response import frequency_response as frequency_response
from .response import half_life as half_life
from .response import impulse_response as impulse_response
from .response import mean_lag as mean_lag
from .response import memory as memory
from .response import noise_gain as noise_gain
from .response import poles as poles
from .response import step_response as step_response
from .rounding import Precision as Precision
from .rounding import precision as precision
from .summary import Report as Report
from .summary import report as report
