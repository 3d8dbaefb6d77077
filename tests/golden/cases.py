"""Objective, events and options of the golden trajectories. NumPy alone, so that both sides agree.

Every operation is elementwise and correctly rounded, so that a gradient is the same to the bit on every machine.
"""

import dataclasses
from typing import Any

import numpy as np

STEPS = 100
HANDOVER = 50
# After how many steps the parameters are recorded: around every event, the hand-over and the end.
RECORDED = (1, 2, 8, 20, 26, 40, 50, 51, 61, 75, 100)

# Names and layouts are PyTorch's. The first two are a Linear, the third a Conv2d (out, in, height, width).
SHAPES = {"dense.weight": (3, 4), "dense.bias": (3,), "conv.weight": (2, 1, 2, 3), "scale": (2,), "head": (2,)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
# The number of each leaf's first element.
FIRST = dict(zip(SIZES, np.cumsum([0, *SIZES.values()]).tolist(), strict=False))
# Steps without a gradient (None): skipped ones, a late first one, and one whose first comes after the hand-over.
MISSING = {"dense.bias": {20, 21, 22, 23, 24, 61}, "conv.weight": set(range(7)), "head": set(range(60))}
# Steps with a gradient of zero, among them a first one.
ZERO = {"scale": {0, *range(30, 40)}}

_NOISE = np.array([0.31, -0.52, 0.17, 0.44, -0.23, -0.35, 0.18])


def start(dtype):
    """The initial parameters."""
    return unflatten(np.array([(0.5 + 0.03 * i) * (-1) ** i for i in range(sum(SIZES.values()))], dtype))


def gradient(params, step, ascend=False):
    """The gradient of a quartic with a coupling and noise of period 7, or of its negative; None where it is missing."""
    dtype = params["scale"].dtype
    coupling = params["dense.weight"][0, 0] * dtype.type(0.1)
    noise = dtype.type(_NOISE[step % 7])
    out = {}
    # JAX sorts the keys of dictionaries.
    for name in SHAPES:
        x = params[name]
        index = FIRST[name] + np.arange(x.size).reshape(x.shape)
        curvature = (0.4 + 0.1 * (index % 9)).astype(dtype)
        # Of the sign of the start: a relative tolerance wants values away from zero.
        target = ((1.5 + 0.1 * (index % 4)) * (-1.0) ** index).astype(dtype)
        g = curvature * (x - target) + dtype.type(0.05) * x * x * x + coupling * x + noise
        g = g * dtype.type(0) if step in ZERO.get(name, ()) else g
        out[name] = None if step in MISSING.get(name, ()) else -g if ascend else g
    return out


def flatten(params):
    """One vector of all parameters; NaN for None."""
    return np.concatenate([np.full(SIZES[n], np.nan) if params[n] is None else params[n].ravel() for n in SHAPES])


def unflatten(vector):
    """The parameters of a vector; None where it is NaN."""
    parts = np.split(vector, np.cumsum(list(SIZES.values()))[:-1])
    return {
        name: None if np.isnan(part).all() else np.array(part.reshape(shape))
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: `library`'s optimizer and `dialect` with the same `arguments`, some of them `scheduled` as tables."""

    name: str
    library: str
    dialect: str
    arguments: dict[str, Any]
    scheduled: dict[str, Any] = dataclasses.field(default_factory=dict)
    # What the library alone is told, since it must not change the numbers.
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float64", "float32")

    @property
    def ascends(self):
        return bool(self.arguments.get("maximize"))

    @property
    def hands_over(self):
        """Whether its state is handed over half-way, in both directions."""
        return self.library in ("torch", "keras") and not self.extra


_T = np.arange(STEPS)
# A warm-up and two drops; a ramp; one that is 0 for a while, twice.
_RATE = 0.05 * np.minimum(1, (_T + 1) / 10) * np.where(_T < 45, 1, np.where(_T < 70, 0.3, 0.6))
_MOMENTUM = 0.5 + 0.45 * _T / STEPS
_GAPPED = np.where((_T < 4) | ((_T > 30) & (_T < 35)), 0.0, 0.9)
_DAMPENING = 0.6 - 0.5 * _T / STEPS

_GRID = {
    # The option grid of PyTorch's own tests of SGD.
    "default": {"lr": 0.05},
    "decay": {"lr": 0.05, "weight_decay": 0.5},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "decay-maximize": {"lr": 0.05, "weight_decay": 0.5, "maximize": True},
    "dampening": {"lr": 0.05, "momentum": 0.9, "dampening": 0.5},
    "momentum-decay": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "nesterov-decay": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    # What that grid lacks.
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "momentum-maximize": {"lr": 0.05, "momentum": 0.9, "maximize": True},
    "nesterov-maximize": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True},
    "dampening-decay": {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "all": {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2, "maximize": True},
    "overdamped": {"lr": 0.05, "momentum": 0.9, "dampening": -0.4},
}


def _torch_cases():
    cases = [Case(f"torch-{name}", "torch", "torch_sgd", arguments) for name, arguments in _GRID.items()]
    rate, nesterov = {"lr": _RATE}, {"momentum": 0.9, "nesterov": True}
    return [
        *cases,
        Case("torch-rate", "torch", "torch_sgd", {"momentum": 0.9}, rate),
        Case("torch-rate-nesterov", "torch", "torch_sgd", {**nesterov, "weight_decay": 0.1}, rate),
        Case("torch-both", "torch", "torch_sgd", {"weight_decay": 0.1}, {**rate, "momentum": _MOMENTUM}),
        Case("torch-both-nesterov", "torch", "torch_sgd", {"nesterov": True}, {**rate, "momentum": _MOMENTUM}),
        Case(
            "torch-damped-schedules",
            "torch",
            "torch_sgd",
            {"lr": 0.05},
            {"momentum": _MOMENTUM, "dampening": _DAMPENING},
        ),
        Case("torch-gaps", "torch", "torch_sgd", {"lr": 0.05}, {"momentum": _GAPPED}),
        Case("torch-gaps-nesterov", "torch", "torch_sgd", {"lr": 0.05, "nesterov": True}, {"momentum": 0.9 - _GAPPED}),
        Case("torch-foreach", "torch", "torch_sgd", _GRID["all"], extra={"foreach": True}),
    ]


_HEAVY_BALL = {"lr": 0.05, "momentum": 0.9}


def _timm_cases():
    m, lion = _HEAVY_BALL, {"lr": 0.01, "betas": (0.9, 0.99)}
    return [
        Case("timm-nesterov", "timm", "timm_sgdw", {**m, "nesterov": True, "weight_decay": 0.1}),
        Case("timm-dampening", "timm", "timm_sgdw", {**m, "dampening": 0.5, "weight_decay": 0.1, "maximize": True}),
        Case("timm-rate", "timm", "timm_sgdw", {"momentum": 0.9, "weight_decay": 0.1}, {"lr": _RATE}),
        Case("timm-lion", "timm-lion", "lion", {**lion, "weight_decay": 0.1}),
        Case("timm-lion-maximize", "timm-lion", "lion", {**lion, "maximize": True}),
    ]


def _kozistr_cases():
    m = _HEAVY_BALL
    return [
        Case("kozistr-sgdw", "kozistr-SGDW", "timm_sgdw", {**m, "nesterov": True, "weight_decay": 0.1}),
        Case("kozistr-lion-rate", "kozistr-Lion", "lion", {"betas": (0.9, 0.99)}, {"lr": 0.2 * _RATE}),
        Case("kozistr-aggmo", "kozistr-AggMo", "aggmo", {"lr": 0.05}),
        Case(
            "kozistr-aggmo-decay", "kozistr-AggMo", "aggmo", {"betas": (0.5, 0.95), "weight_decay": 0.1}, {"lr": _RATE}
        ),
        Case("kozistr-accsgd", "kozistr-AccSGD", "accsgd", {"lr": 0.05}),
        Case(
            "kozistr-accsgd-decay",
            "kozistr-AccSGD",
            "accsgd",
            {"lr": 0.05, "kappa": 100.0, "xi": 5.0, "smallConst": 0.6, "weight_decay": 0.1},
        ),
        Case("kozistr-signum", "kozistr-SignSGD", "signum", {"lr": 0.01, "weight_decay": 0.1}),
        Case(
            "kozistr-signum-coupled",
            "kozistr-SignSGD",
            "signum",
            {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.1, "weight_decouple": False, "maximize": True},
        ),
        Case("kozistr-signum-gaps", "kozistr-SignSGD", "signum", {"lr": 0.01}, {"momentum": _GAPPED}),
    ]


def _qhoptim_cases():
    m = _HEAVY_BALL
    return [
        Case("qhoptim-grad", "qhoptim", "qhoptim_qhm", {**m, "nu": 0.7, "weight_decay": 0.1}),
        Case(
            "qhoptim-direct",
            "qhoptim",
            "qhoptim_qhm",
            {**m, "nu": 0.7, "weight_decay": 0.1, "weight_decay_type": "direct"},
        ),
        Case("qhoptim-schedules", "qhoptim", "qhoptim_qhm", {"nu": 0.7}, {"lr": _RATE, "momentum": _MOMENTUM}),
    ]


def _keras_cases():
    keras = {"learning_rate": 0.05, "momentum": 0.9}
    return [
        Case("keras-plain", "keras", "keras_sgd", {"learning_rate": 0.05}),
        Case("keras-momentum", "keras", "keras_sgd", keras),
        Case("keras-nesterov", "keras", "keras_sgd", {**keras, "nesterov": True}),
        Case("keras-decay", "keras", "keras_sgd", {**keras, "weight_decay": 0.1}),
        Case("keras-rate", "keras", "keras_sgd", {"momentum": 0.9}, {"learning_rate": _RATE}),
        Case(
            "keras-rate-nesterov",
            "keras",
            "keras_sgd",
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"learning_rate": _RATE},
        ),
    ]


def _float32_cases():
    """Of libraries that have no other type."""
    m, narrow = _HEAVY_BALL, ("float32",)
    return [
        Case("heavyball-default", "heavyball", "heavyball_sgd", {"lr": 0.05}, dtypes=narrow),
        Case(
            "heavyball-decay",
            "heavyball",
            "heavyball_sgd",
            {"beta": 0.8, "weight_decay": 0.1},
            {"lr": _RATE},
            dtypes=narrow,
        ),
        Case("flash-dampening", "flash", "flash_sgd", {**m, "dampening": 0.5, "weight_decay": 0.1}, dtypes=narrow),
        Case("flash-nesterov", "flash", "flash_sgd", {"momentum": 0.9, "nesterov": True}, {"lr": _RATE}, dtypes=narrow),
    ]


_FAMILIES = (_torch_cases, _timm_cases, _kozistr_cases, _qhoptim_cases, _keras_cases, _float32_cases)
CASES = {case.name: case for cases in _FAMILIES for case in cases()}
