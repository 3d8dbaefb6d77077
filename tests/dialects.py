"""The table of dialects: a call of each, for every test that holds of all of them.

A dialect without a row here is an error as soon as a test imports the table.
"""

from momentum_optax.interop.dialect import DIALECTS

# A dialect that is called, and for each argument another value under which the steps must differ.
CALLS = {
    "torch_sgd": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ),
    "timm_sgdw": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ),
    "apex_sgd": (
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {
            "lr": 0.2,
            "momentum": 0.8,
            "dampening": 0.5,
            "weight_decay": 0.2,
            "nesterov": True,
            "wd_after_momentum": True,
        },
    ),
    "flash_sgd": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True},
    ),
    "heavyball_sgd": ({}, {"lr": 0.2, "beta": 0.8, "weight_decay": 0.1}),
    "keras_sgd": (
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ),
    "tf1_momentum": (
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.2, "momentum": 0.8, "use_nesterov": True},
    ),
    "caffe_sgd": ({"base_lr": 0.1, "momentum": 0.9}, {"base_lr": 0.2, "momentum": 0.8, "weight_decay": 0.1}),
    "qhoptim_qhm": (
        {"lr": 0.1, "momentum": 0.9, "nu": 0.7, "weight_decay": 0.1},
        {"lr": 0.2, "momentum": 0.8, "nu": 0.6, "weight_decay": 0.2, "weight_decay_type": "direct"},
    ),
    "aggmo": ({"lr": 0.1}, {"lr": 0.2, "betas": (0.0, 0.9), "weight_decay": 0.1}),
    "accsgd": ({"lr": 0.1}, {"lr": 0.2, "kappa": 100.0, "xi": 5.0, "smallConst": 0.5, "weight_decay": 0.1}),
    "mass": ({}, {"lr": 0.2, "alpha": 0.1, "kappa_t": 5.0}),
    "lion": ({}, {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.1, "maximize": True}),
    "signum": (
        {"weight_decay": 0.5},
        {"lr": 0.2, "momentum": 0.3, "weight_decay": 0.1, "weight_decouple": False, "maximize": True},
    ),
    "muon_average": ({}, {"momentum": 0.8, "nesterov": False}),
    "muon_sum": ({}, {"momentum": 0.8, "nesterov": True}),
}

if missing := DIALECTS.keys() - CALLS.keys():
    raise LookupError(f"tests/dialects.py needs a row for {sorted(missing)}")
