"""Momentum for JAX and Optax: every linear momentum rule as data, run by one gradient transformation."""

from . import schedules as schedules
from . import storage as storage
from .coefficients import ByAge as ByAge
from .compress import CompressedState as CompressedState
from .compress import compress as compress
from .convert import convert as convert
from .filters import Filter as Filter
from .filters import NormalForm as NormalForm
from .filters import equivalent as equivalent
from .optimizers import sgd as sgd
from .rules import accelerated as accelerated
from .rules import adan_mix as adan_mix
from .rules import aggregated as aggregated
from .rules import aggregated_exponential as aggregated_exponential
from .rules import chebyshev as chebyshev
from .rules import complex_heavy_ball as complex_heavy_ball
from .rules import double_ema as double_ema
from .rules import ema as ema
from .rules import grokfast as grokfast
from .rules import grokfast_average as grokfast_average
from .rules import heavy_ball as heavy_ball
from .rules import lion_mix as lion_mix
from .rules import mars as mars
from .rules import mass as mass
from .rules import muon_mix as muon_mix
from .rules import nadam_mix as nadam_mix
from .rules import nesterov as nesterov
from .rules import optimistic as optimistic
from .rules import pid as pid
from .rules import quasi_hyperbolic as quasi_hyperbolic
from .rules import recht_pid as recht_pid
from .rules import robust_momentum as robust_momentum
from .rules import schedule_free as schedule_free
from .rules import simplified_ademamix as simplified_ademamix
from .rules import synthesized_nesterov as synthesized_nesterov
from .rules import torch_nesterov as torch_nesterov
from .rules import triple_momentum as triple_momentum
from .transform import MomentumState as MomentumState
from .transform import apply_updates as apply_updates
from .transform import eval_params as eval_params
from .transform import scale_by_momentum as scale_by_momentum
from .transform import velocity as velocity
from .wrappers import GuardedState as GuardedState
from .wrappers import guarded as guarded

__version__ = "0.1.0"
