"""The table of finished optimizers and dialects, for tests that hold of all of them; see `test_modes.py`.

`OPTIMIZERS[name](storage=...)` builds one, with schedules, arrays and options among the arguments of its rows.
"""

from functools import partial

import jax.numpy as jnp
import optax
from conformance import finished_optimizers
from dialects import CALLS

import momentum_optax as mo
from momentum_optax.interop.dialect import DIALECTS

FALLING = optax.linear_schedule(0.9, 0.5, 9)
COOLING = optax.linear_schedule(0.1, 0.01, 9)


def _adam(storage="float32"):
    """Optax's own moments: a storage does not apply."""
    del storage
    return mo.contrib.mars_adamw(0.1, weight_decay=0.1)


OPTIMIZERS = {
    "sgd": partial(mo.sgd, 0.1, 0.9),
    "sgd, every option": partial(mo.sgd, 0.1, 0.9, dampening=0.5, weight_decay=0.1, maximize=True),
    "sgd, nesterov": partial(mo.sgd, 0.1, 0.9, nesterov=True),
    "sgd, a rule": partial(mo.sgd, 0.1, mo.nesterov(mo.schedules.fista())),
    "sgd, schedules": partial(mo.sgd, COOLING, FALLING, dampening=COOLING, weight_decay=COOLING),
    "sgd, arrays": partial(mo.sgd, *map(jnp.float32, (0.1, 0.9)), dampening=jnp.float32(0.1)),
    "lion": partial(mo.lion, 0.1),
    "lion, schedules": partial(mo.lion, COOLING, FALLING, FALLING, weight_decay=COOLING),
    "signum": partial(mo.signum, 0.1),
    "muon": partial(mo.muon, 0.1, weight_decay=0.1),
    "normuon": partial(mo.normuon, 0.1, weight_decay=0.1),
    "normalized_sgd": partial(mo.normalized_sgd, 0.1),
    "normalized_sgd, by leaf": partial(mo.normalized_sgd, 0.1, scope="leaf"),
    "srsgd": partial(mo.srsgd, 0.1, 3),
    "srsgd, a list": partial(mo.srsgd, 0.1, [2, 5]),
    "relativistic": partial(mo.contrib.relativistic, 0.1),
    "yellowfin": partial(mo.contrib.yellowfin),
    "yellowfin, schedules": partial(mo.contrib.yellowfin, COOLING, decay=FALLING),
    "storm": partial(mo.contrib.storm, 1.0),
    "mars_adamw": _adam,
    "mars_lion": partial(mo.contrib.mars_lion, 0.1, weight_decay=0.1, gamma=COOLING),
    "torch_sgd": partial(mo.interop.torch_sgd, 0.1, 0.9, 0.3, 0.1),
    "torch_sgd, schedules": partial(mo.interop.torch_sgd, COOLING, FALLING, nesterov=True),
    "timm_sgdw": partial(mo.interop.timm_sgdw, 0.1, 0.9, weight_decay=0.1),
    "apex_sgd": partial(mo.interop.apex_sgd, 0.1, 0.9, 0.3),
    "flash_sgd": partial(mo.interop.flash_sgd, 0.1, 0.9, 0.3),
    "heavyball_sgd": partial(mo.interop.heavyball_sgd, weight_decay=0.1),
    "keras_sgd": partial(mo.interop.keras_sgd, COOLING, 0.9, True, 0.1),
    "tf1_momentum": partial(mo.interop.tf1_momentum, 0.1, FALLING, True),
    "caffe_sgd": partial(mo.interop.caffe_sgd, COOLING, 0.9, 0.1),
    "qhoptim_qhm": partial(mo.interop.qhoptim_qhm, 0.1, 0.9, 0.7),
    "aggmo": partial(mo.interop.aggmo, 0.1),
    "accsgd": partial(mo.interop.accsgd, 0.1),
    "mass": partial(mo.interop.mass, 0.1),
    "lion of PyTorch": partial(mo.interop.lion, 0.1, (FALLING, 0.99), 0.1),
    "signum of PyTorch": partial(mo.interop.signum, 0.1, FALLING, 0.1),
    "muon_average": partial(mo.interop.muon_average),
    "muon_sum": partial(mo.interop.muon_sum, FALLING, True),
}

# Dialects without a row above are called as in their own table.
OPTIMIZERS |= {
    name: partial(getattr(mo.interop, name), **CALLS[name][0])
    for name in DIALECTS
    if getattr(mo.interop, name) not in {getattr(row, "func", None) for row in OPTIMIZERS.values()}
}


def _function(row):
    return mo.contrib.mars_adamw if row is _adam else row.func


def without_a_row():
    """The finished optimizers and dialects that the table lacks."""
    finished = set(finished_optimizers().values())
    finished |= {getattr(mo.interop, name) for name in DIALECTS}
    return {f.__name__ for f in finished - {_function(row) for row in OPTIMIZERS.values()}}
