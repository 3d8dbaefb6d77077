"""Momentum rules as data: coefficients, filters and their algebra."""

from .algebra import NormalForm as NormalForm
from .coefficients import PerLeafSchedule as PerLeafSchedule
from .equivalence import equivalent as equivalent
from .filter import BeforeSign as BeforeSign
from .filter import Filter as Filter
from .filter import before_sign as before_sign
from .realization import post_write_form as post_write_form
from .realization import velocity_only_readout as velocity_only_readout
