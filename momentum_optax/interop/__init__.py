"""Other libraries' momentum optimizers by their own arguments, hyperparameters between them, and live states."""

from .basis import change_basis as change_basis
from .equivalence import Equivalence as Equivalence
from .equivalence import Recipe as Recipe
from .equivalence import equivalent_hyperparameters as equivalent_hyperparameters
from .keras_like import caffe_sgd as caffe_sgd
from .keras_like import keras_sgd as keras_sgd
from .keras_like import tf1_momentum as tf1_momentum
from .keras_state import from_keras as from_keras
from .keras_state import to_keras as to_keras
from .optax_state import from_optax as from_optax
from .optax_state import to_optax as to_optax
from .research import accsgd as accsgd
from .research import aggmo as aggmo
from .research import lion as lion
from .research import mass as mass
from .research import muon_average as muon_average
from .research import muon_sum as muon_sum
from .research import qhoptim_qhm as qhoptim_qhm
from .research import signum as signum
from .torch_like import apex_sgd as apex_sgd
from .torch_like import flash_sgd as flash_sgd
from .torch_like import heavyball_sgd as heavyball_sgd
from .torch_like import timm_sgdw as timm_sgdw
from .torch_like import torch_sgd as torch_sgd
from .torch_state import from_torch as from_torch
from .torch_state import to_torch as to_torch
