"""The table of dialects: a call of each, for every test that holds of all of them.

It follows from the records: a learning rate of 0.1 and a momentum of 0.9 where the library has no such default, and for
each argument another value of its kind. Only what a record cannot say is written here.
"""

import inspect

from momentum_optax.interop.dialect import DIALECTS

# Arguments without a default, and those without which another one changes nothing.
NEEDED = {
    "apex_sgd": {"weight_decay": 0.1},  # for `wd_after_momentum`
    "caffe_sgd": {"momentum": 0.9},  # a number there, as in Keras: no schedule may follow it
    "keras_sgd": {"momentum": 0.9},
    "qhoptim_qhm": {"nu": 0.7, "weight_decay": 0.1},  # for `weight_decay_type`
    "signum": {"weight_decay": 0.5},  # for `weight_decouple`
}
# The other value of an argument that has only some.
CHOICES = {("qhoptim_qhm", "weight_decay_type"): "direct"}
# One allowed value only: everything else is refused.
FIXED = {("caffe_sgd", "regularization_type")}
# How PyTorch computes: arguments that change no number, there or here.
IGNORED = {"foreach", "differentiable", "fused", "capturable"}


def _needed(record):
    usual = {record.learning_rate: 0.1, record.momentum: 0.9}
    lacking = {name: value for name, value in usual.items() if name and not record.defaults.get(name)}
    return lacking | NEEDED.get(record.name, {})


def _another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(0.9 * entry for entry in value)
    return 0.1 if value is None else 0.8 * value or 0.5


def _others(record, base):
    fixed = IGNORED | {"storage"} | {name for dialect, name in FIXED if dialect == record.name}
    names = [name for name in inspect.signature(record.describe).parameters if name not in fixed]
    values = {**record.defaults, **base}
    if missing := set(names) - set(values):
        raise LookupError(f"NEEDED in tests/dialects.py must have {sorted(missing)} of {record.name}")
    return {name: CHOICES.get((record.name, name)) or _another(values[name]) for name in names}


# A dialect that is called, and for each argument another value under which the steps must differ.
CALLS = {name: (_needed(record), _others(record, _needed(record))) for name, record in DIALECTS.items()}
