"""Other libraries' momentum optimizers by their own arguments, hyperparameters between them, and live states."""

from .apex import apex_sgd as apex_sgd
from .basis import change_basis as change_basis
from .caffe import caffe_sgd as caffe_sgd
from .equivalence import Equivalence as Equivalence
from .equivalence import equivalent_hyperparameters as equivalent_hyperparameters
from .flash import flash_sgd as flash_sgd
from .heavyball import heavyball_sgd as heavyball_sgd
from .keras import keras_sgd as keras_sgd
from .keras_state import from_keras as from_keras
from .keras_state import to_keras as to_keras
from .muon import muon_average as muon_average
from .muon import muon_sum as muon_sum
from .optax_state import from_optax as from_optax
from .optax_state import to_optax as to_optax
from .pytorch import timm_sgdw as timm_sgdw
from .pytorch import torch_sgd as torch_sgd
from .pytorch_state import from_torch as from_torch
from .pytorch_state import to_torch as to_torch
from .qhoptim import qhoptim_qhm as qhoptim_qhm
from .recipe import Recipe as Recipe
from .reference_code import accsgd as accsgd
from .reference_code import aggmo as aggmo
from .reference_code import mass as mass
from .sign_methods import lion as lion
from .sign_methods import signum as signum
from .tensorflow import tf1_momentum as tf1_momentum
