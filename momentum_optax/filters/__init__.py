"""Momentum rules as data: coefficients, filters and their algebra."""

from .algebra import equivalent as equivalent
from .coefficients import PerLeafSchedule as PerLeafSchedule
from .filter import Filter as Filter
from .filter import NormalForm as NormalForm
