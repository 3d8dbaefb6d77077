"""Momentum for JAX and Optax: every linear momentum rule as data, run by one gradient transformation."""

from . import analysis as analysis
from . import contrib as contrib
from . import interop as interop
from . import matrices as matrices
from . import schedules as schedules
from . import storage as storage
from . import tuning as tuning
from .apply import apply_updates as apply_updates
from .distributed import outer as outer
from .distributed import sharding as sharding
from .embeddings import row_sparse as row_sparse
from .filters import Filter as Filter
from .filters import equivalent as equivalent
from .matrices.direction import orthogonalize as orthogonalize
from .optimizers.muon import muon as muon
from .optimizers.muon import normuon as normuon
from .optimizers.normalized import normalized_sgd as normalized_sgd
from .optimizers.sgd import sgd as sgd
from .optimizers.sgd import srsgd as srsgd
from .optimizers.sign import lion as lion
from .optimizers.sign import signum as signum
from .rules.after_optimizer import *
from .rules.games import *
from .rules.look_ahead import *
from .rules.mixes import *
from .rules.several_velocities import *
from .rules.sums_and_averages import *
from .rules.tuned import *
from .state import checkpoint as checkpoint
from .state.convert import convert as convert
from .state.edit import rescale as rescale
from .state.edit import reset as reset
from .state.evaluation import eval_params as eval_params
from .state.memory import state_bytes as state_bytes
from .state.velocity import velocity as velocity
from .transform import scale_by_momentum as scale_by_momentum
from .wrappers.accumulated import accumulated as accumulated
from .wrappers.average_params import average_params as average_params
from .wrappers.average_params import averaged_params as averaged_params
from .wrappers.by_path import by_path as by_path
from .wrappers.cautious import add_cautious_weight_decay as add_cautious_weight_decay
from .wrappers.cautious import cautious as cautious
from .wrappers.compress import compress as compress
from .wrappers.directions import scale_to_unit_norm as scale_to_unit_norm
from .wrappers.guarded import guarded as guarded
from .wrappers.monitor import monitor as monitor
from .wrappers.restarts import adaptive_restart as adaptive_restart
from .wrappers.restarts import scheduled_restart as scheduled_restart
from .wrappers.telemetry import telemetry as telemetry
from .wrappers.with_momentum import with_momentum as with_momentum

__version__ = "0.2.0"
