"""What hyperparameters of each dialect give a filter's steps, as formulas; and why none do."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Numbers(NamedTuple):
    """A dialect at constant hyperparameters: all that its steps depend on, past the first."""

    rate: float | None
    gain: float  # of a constant gradient, rate included; without a sign
    decay: float
    nu: float
    first: float  # how many times as much the first gradient counts
    l2: float
    shrink: float  # per step, by decoupled weight decay
    maximize: bool
    sign: bool

    @property
    def plain(self) -> float:
        """The learning rate of the form v' = decay v + g."""
        return self.gain * (1 - self.decay)


def _refuse(target: str, reason: str) -> None:
    raise ValueError(f"{target} has no such steps: {reason}")


def _linear(
    target: str, n: Numbers, *, l2: bool = False, decoupled: bool = False, maximize: bool = False, rate: bool = True
) -> None:
    """Raise unless the target can have what is not the filter."""
    if n.sign:
        _refuse(target, "it takes no sign of the update")
    if (n.rate is None) == rate:
        _refuse(target, "one of the two is a momentum without a learning rate")
    _extras(target, n, l2=l2, decoupled=decoupled, maximize=maximize)


def _extras(target: str, n: Numbers, *, l2: bool, decoupled: bool, maximize: bool) -> None:
    if n.l2 and not l2:
        _refuse(target, "it has no coupled weight decay")
    if n.shrink and not decoupled:
        _refuse(target, "it has no decoupled weight decay")
    if n.l2 and n.shrink:
        _refuse(target, "it has one kind of weight decay")
    if n.maximize and not maximize:
        _refuse(target, "it cannot maximize")


def _is_nesterov(target: str, n: Numbers) -> bool:
    """Whether nu is that of Nesterov's form; refuses all but this and the heavy ball."""
    if _near(n.nu, 1.0):
        return False
    if not _near(n.nu, n.decay):
        _refuse(target, f"its nu, {n.nu:.6g}, must be 1 (heavy ball) or the decay, {n.decay:.6g} (Nesterov)")
    return True


def _heavy_ball(target: str, n: Numbers) -> None:
    if not _near(n.nu, 1.0):
        _refuse(target, f"its nu, {n.nu:.6g}, must be 1: a heavy ball")


def _torch(n: Numbers, target: str = "torch_sgd", maximize: bool = True, decoupled: bool = False) -> dict[str, Any]:
    _linear(target, n, l2=not decoupled, decoupled=decoupled, maximize=maximize)
    out = _undampened(n) if target != "flash_sgd" else {"lr": n.plain}
    decay = _per(n.shrink, out["lr"]) if decoupled else n.l2
    out = {**out, "momentum": n.decay, "nesterov": _is_nesterov(target, n), "weight_decay": decay}
    return {**out, **({"maximize": n.maximize} if maximize else {})}


def _apex(n: Numbers) -> dict[str, Any]:
    _linear("apex_sgd", n, l2=True, decoupled=True)
    out = {**_undampened(n), "momentum": n.decay, "nesterov": _is_nesterov("apex_sgd", n)}
    return {**out, "weight_decay": n.l2 or _per(n.shrink, out["lr"]), "wd_after_momentum": n.shrink > 0}


def _undampened(n: Numbers) -> dict[str, Any]:
    """Rate and dampening where the first gradient enters in full."""
    return {"lr": n.plain * n.first, "dampening": 1 - 1 / n.first}


def _heavyball(n: Numbers) -> dict[str, Any]:
    _linear("heavyball_sgd", n, decoupled=True)
    _heavy_ball("heavyball_sgd", n)
    return {"lr": n.plain, "beta": n.decay, "weight_decay": _per(n.shrink, n.plain)}


def _keras(n: Numbers) -> dict[str, Any]:
    _linear("keras_sgd", n, decoupled=True)
    nesterov = _is_nesterov("keras_sgd", n)
    decay = _per(n.shrink, n.plain)
    return {"learning_rate": n.plain, "momentum": n.decay, "nesterov": nesterov, "weight_decay": decay}


def _tf1(n: Numbers) -> dict[str, Any]:
    _linear("tf1_momentum", n)
    return {"learning_rate": n.plain, "momentum": n.decay, "use_nesterov": _is_nesterov("tf1_momentum", n)}


def _caffe(n: Numbers) -> dict[str, Any]:
    _linear("caffe_sgd", n, l2=True)
    _heavy_ball("caffe_sgd", n)
    return {"base_lr": n.plain, "momentum": n.decay, "weight_decay": n.l2}


def _qhm(n: Numbers) -> dict[str, Any]:
    _linear("qhoptim_qhm", n, l2=True, decoupled=True)
    kind = "direct" if n.shrink else "grad"
    decay = _per(n.shrink, n.gain) if n.shrink else n.l2
    return {"lr": n.gain, "momentum": n.decay, "nu": n.nu, "weight_decay": decay, "weight_decay_type": kind}


def _aggmo(n: Numbers) -> dict[str, Any]:
    _linear("aggmo", n, l2=True)
    if n.decay == 0 or _near(n.nu, 1.0):
        return {"lr": n.plain, "betas": (n.decay,), "weight_decay": n.l2}
    # The mean of the gradient and a heavy ball.
    if not _near(n.nu, 1 / (2 - n.decay)):
        _refuse("aggmo", f"its nu, {n.nu:.6g}, must be 1 or, for two velocities, 1/(2 - decay)")
    return {"lr": n.plain * 2 / (2 - n.decay), "betas": (0.0, n.decay), "weight_decay": n.l2}


def _accsgd(n: Numbers) -> dict[str, Any]:
    _linear("accsgd", n, l2=True)
    e = 0.7
    if not (n.decay > 0 and n.nu < 1):
        _refuse("accsgd", f"its decay, {n.decay:.6g}, must be above 0 and its nu, {n.nu:.6g}, below 1")
    xi = (1 + n.nu * e) / (e * (1 - n.nu))
    kappa = xi * (n.decay * e + e**2) / (1 - n.decay)
    if xi < 1 or kappa < 1:
        _refuse("accsgd", f"it would need xi {xi:.6g} and kappa {kappa:.6g}, which must be at least 1")
    return {"lr": n.gain * (1 + e) / (e * (1 + xi)), "kappa": kappa, "xi": xi, "weight_decay": n.l2}


def _mass(n: Numbers) -> dict[str, Any]:
    _linear("mass", n)
    if not (n.decay > 0 and n.nu < 1):
        _refuse("mass", f"its decay, {n.decay:.6g}, must be above 0 and its nu, {n.nu:.6g}, below 1")
    alpha, ratio = (1 - n.decay) / (1 + n.decay), 1 / (1 - n.nu)
    inverse = alpha * (2 * ratio - 1)
    if not 0 < inverse <= 1 + 1e-12:
        _refuse(
            "mass", f"it would need kappa_t {1 / inverse if inverse else float('inf'):.6g}, which must be at least 1"
        )
    return {"lr": n.gain / ratio, "alpha": alpha, "kappa_t": max(1 / inverse, 1.0)}


def _lion(n: Numbers) -> dict[str, Any]:
    if not n.sign:
        _refuse("lion", "it takes the sign of the update")
    _extras("lion", n, l2=False, decoupled=True, maximize=True)
    first = n.nu * n.decay
    if not 0 <= first < 1:
        _refuse("lion", f"its nu times its decay, {first:.6g}, must be in [0, 1)")
    return {"lr": n.rate, "betas": (first, n.decay), "weight_decay": _per(n.shrink, n.rate), "maximize": n.maximize}


def _signum(n: Numbers) -> dict[str, Any]:
    if not n.sign:
        _refuse("signum", "it takes the sign of the update")
    _extras("signum", n, l2=True, decoupled=True, maximize=True)
    _heavy_ball("signum", n)
    decay = n.l2 or _per(n.shrink, n.rate)
    coupled = {"weight_decouple": False} if n.l2 else {}
    return {"lr": n.rate, "momentum": n.decay, "weight_decay": decay, **coupled, "maximize": n.maximize}


def _muon(n: Numbers, target: str) -> dict[str, Any]:
    # Their sizes differ by 1 - decay, which the orthogonalisation takes out.
    _linear(target, n, rate=False)
    return {"momentum": n.decay, "nesterov": _is_nesterov(target, n)}


TARGETS: dict[str, Callable[[Numbers], dict[str, Any]]] = {
    "torch_sgd": _torch,
    "timm_sgdw": lambda n: _torch(n, "timm_sgdw", decoupled=True),
    "flash_sgd": lambda n: _torch(n, "flash_sgd", maximize=False),
    "apex_sgd": _apex,
    "heavyball_sgd": _heavyball,
    "keras_sgd": _keras,
    "tf1_momentum": _tf1,
    "caffe_sgd": _caffe,
    "qhoptim_qhm": _qhm,
    "aggmo": _aggmo,
    "accsgd": _accsgd,
    "mass": _mass,
    "lion": _lion,
    "signum": _signum,
    "muon_average": lambda n: _muon(n, "muon_average"),
    "muon_sum": lambda n: _muon(n, "muon_sum"),
}


def _per(shrink: float, rate: float | None) -> float:
    """Decoupled weight decay per unit of the learning rate."""
    return shrink / rate if shrink and rate else 0.0


def _near(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y))
