"""Matrices among the parameters: which they are, and directions for whole ones, wherever their parts are."""

from .by_layer import excluding as excluding
from .by_layer import of_model as of_model
from .direction import on_matrices as on_matrices
from .scales import scale_by_neuron as scale_by_neuron
from .scales import scale_by_shape as scale_by_shape
