"""Published methods that few need. They are tested as strictly as the rest, but may change between minor versions.

* MARS, `mars_adamw` and `mars_lion`: momentum of a gradient that a second one of the same batch corrects.
* STORM, `storm`: momentum whose error does not lag behind the parameters, also with a second gradient of each batch.
* YellowFin, `yellowfin`: a heavy ball that tunes its learning rate and momentum from the gradients.
* `relativistic`: a heavy ball with a limit on the length of a step.
* `recht_pid` and `grokfast_average`: rules that other rules of the package supersede. `implicit_transport` and
  `optimized_gradient_norm`: rules of theory.
"""

from ._mars import MarsState as MarsState
from ._mars import mars_adamw as mars_adamw
from ._mars import mars_correction as mars_correction
from ._mars import mars_lion as mars_lion
from ._relativistic import relativistic as relativistic
from ._relativistic import saturate as saturate
from ._rules import grokfast_average as grokfast_average
from ._rules import implicit_transport as implicit_transport
from ._rules import optimized_gradient_norm as optimized_gradient_norm
from ._rules import recht_pid as recht_pid
from ._storm import StormState as StormState
from ._storm import scale_by_adaptive_storm as scale_by_adaptive_storm
from ._storm import scale_by_storm as scale_by_storm
from ._storm import storm as storm
from ._yellowfin import YellowFinState as YellowFinState
from ._yellowfin import scale_by_yellowfin as scale_by_yellowfin
from ._yellowfin import yellowfin as yellowfin
