r"""Outer momentum: workers that train independently for many steps, and momentum on their averaged progress.

Every few steps the workers synchronize. The distance that a worker has covered, $\Delta_i = x - x_i$, is a
pseudo-gradient at the common point x from which all workers started; the mean of these goes through any optimizer, and
all workers continue from the new x. The state is the same on every worker. Exchanges are JAX's collectives over a named
axis: that of `shard_map` on a mesh, over all its processes, or that of `vmap` for workers on one device.
"""

from .methods import bmuf as bmuf
from .methods import diloco as diloco
from .methods import local_sgd as local_sgd
from .methods import slowmo as slowmo
from .momentum import OuterMomentum as OuterMomentum
from .momentum import OuterState as OuterState
from .momentum import outer_momentum as outer_momentum
