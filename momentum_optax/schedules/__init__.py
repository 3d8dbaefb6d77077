"""Schedules for momentum coefficients: Optax schedules, functions of the step counted from 0.

They take Python integers, for which they give Python floats, and traced ones. Any coefficient of any rule accepts them,
and any Optax schedule.
"""

from .derived import *
from .rising import *
from .runs import *
