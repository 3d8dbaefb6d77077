"""What is around a rule: accumulation, guards, restarts, cautious masks, directions, tuners, second gradients.

None of it is a linear filter, so none of it is an option of `scale_by_momentum`: each is a wrapper around a
transformation, or a transformation of its own to put into a chain.
"""

from .accumulated import AccumulatedState as AccumulatedState
from .accumulated import accumulated as accumulated
from .cautious import CautiousDecayState as CautiousDecayState
from .cautious import add_cautious_weight_decay as add_cautious_weight_decay
from .cautious import cautious as cautious
from .directions import orthogonalize as orthogonalize
from .directions import saturate as saturate
from .directions import scale_to_unit_norm as scale_to_unit_norm
from .guarded import GuardedState as GuardedState
from .guarded import SpikeGuardedState as SpikeGuardedState
from .guarded import Spikes as Spikes
from .guarded import guarded as guarded
from .restarts import RestartState as RestartState
from .restarts import adaptive_restart as adaptive_restart
from .restarts import scheduled_restart as scheduled_restart
from .variance_reduced import MarsState as MarsState
from .variance_reduced import StormState as StormState
from .variance_reduced import mars_correction as mars_correction
from .variance_reduced import scale_by_adaptive_storm as scale_by_adaptive_storm
from .variance_reduced import scale_by_storm as scale_by_storm
from .yellowfin import YellowFinState as YellowFinState
from .yellowfin import scale_by_yellowfin as scale_by_yellowfin
