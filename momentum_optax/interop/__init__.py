"""Other libraries' momentum optimizers by their own arguments, hyperparameters between them, and live states."""

from .apex import *
from .basis import *
from .caffe import *
from .equivalence import *
from .flash import *
from .heavyball import *
from .keras import *
from .keras_state import *
from .muon import *
from .optax_state import *
from .pytorch import *
from .pytorch_state import *
from .qhoptim import *
from .recipe import *
from .reference_code import *
from .sign_methods import *
from .tensorflow import *
