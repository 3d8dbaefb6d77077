"""Coefficients and learning rates: from targets, from curvatures, or measured on a loss."""

from .curvature import Curvature as Curvature
from .curvature import estimate_curvature as estimate_curvature
from .decays import decay_from_half_life as decay_from_half_life
from .decays import decay_from_mean_lag as decay_from_mean_lag
from .decays import decay_from_noise_gain as decay_from_noise_gain
from .decays import match_learning_rate as match_learning_rate
from .quadratics import Tuning as Tuning
from .quadratics import gradient_descent as gradient_descent
from .quadratics import optimal_chebyshev as optimal_chebyshev
from .quadratics import optimal_heavy_ball as optimal_heavy_ball
from .quadratics import optimal_triple_momentum as optimal_triple_momentum
from .quadratics import quadratic_nesterov as quadratic_nesterov
from .quadratics import smooth_nesterov as smooth_nesterov
from .suggestion import suggest as suggest
from .transfers import Defects as Defects
from .transfers import Transfer as Transfer
from .transfers import transfer as transfer
