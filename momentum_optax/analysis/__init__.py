"""What a rule will do, before it runs: memory, gains, rates, stability and noise, from its coefficients alone.

Everything is NumPy in float64 and takes any `Filter`. Arrays broadcast. Functions that need constant coefficients use,
for coefficients that follow a leaf's age (special first steps, debiasing weights), the values that they settle at; for
rules that follow the step they want to be told which: `step=`.
"""

from .games import bilinear_game as bilinear_game
from .loop import closed_loop as closed_loop
from .loop import error_curve as error_curve
from .loop import spectral_radius as spectral_radius
from .mechanics import energy as energy
from .mechanics import energy_limit as energy_limit
from .noise import stationary_variance as stationary_variance
from .plots import plot as plot
from .rates import asymptotic_iterations as asymptotic_iterations
from .rates import convergence_rate as convergence_rate
from .rates import iterations as iterations
from .rates import stability_limit as stability_limit
from .rates import transient_growth as transient_growth
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
