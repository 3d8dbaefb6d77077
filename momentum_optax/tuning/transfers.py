"""`transfer`: settings for another batch size or length of a run, by published rules, with what each fails to keep."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks, analysis
from ..analysis.arguments import reals
from ..filters import Filter

BASES = ("sgd", "adam", "norm")


@dataclasses.dataclass(frozen=True, eq=False)
class Defects:
    """Relative changes that a transfer makes on quadratics; 0 where nothing changes.

    Attributes:
      curvatures: The curvatures asked for, shape (n,); those of the normalised loss for Adam and norms.
      variance: Of the stationary variance at each curvature; infinite where the new settings diverge.
      contraction: Of the rate of convergence per example at each curvature, `-log(spectral_radius)` over the batch.
      lag: Of the mean lag of the update in examples; a float, NaN where the gain is 0 or a coefficient changes.
    """

    curvatures: np.ndarray
    variance: np.ndarray
    contraction: np.ndarray
    lag: float


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """Settings for the new batch size and length of the run.

    Attributes:
      rule: The rule; its gain at zero frequency is that of the old one.
      learning_rate: The learning rate that follows it.
      weight_decay: The decoupled weight decay, which the learning rate multiplies.
      invariant: What is kept, one sentence.
      source: Where the rule was published.
      defects: What is not kept.
    """

    rule: Filter
    learning_rate: float
    weight_decay: float
    invariant: str
    source: str
    defects: Defects

    def __str__(self) -> str:
        d = self.defects
        rows = zip(d.curvatures, d.variance, d.contraction, strict=True)
        lines = [f"curvature {c:.4g}: variance {v:+.2%}, convergence per example {r:+.2%}" for c, v, r in rows]
        head = f"learning rate {self.learning_rate:.6g}, weight decay {self.weight_decay:.6g}"
        return "\n  - ".join([head, self.invariant, self.source, f"lag in examples {d.lag:+.2%}", *lines])


class _Choice(NamedTuple):
    """One published rule.

    Attributes:
      bases: The bases that it is for.
      rate: The factor of the learning rate, from the base, k and s.
      decays: From the same the new decays: ("power", p) for decay^p, ("share", r) for 1 - r (1 - decay).
      invariant: What it keeps.
      source: Where it was published.
    """

    bases: tuple[str, ...]
    rate: Callable[[str, float, float], float]
    decays: Callable[[str, float, float], tuple[str, float]]
    invariant: str
    source: str


def _linear_or_root(base: str, k: float, s: float) -> float:
    del s
    return k if base == "sgd" else math.sqrt(k)


_FIXED = ("power", 1.0)
_CHOICES = {
    "trajectory": _Choice(
        ("sgd", "adam"),
        _linear_or_root,
        lambda base, k, s: ("power", k),
        "the path of the weights as a function of the examples seen, to first order in the learning rate",
        "Busbridge et al., 2023, arXiv:2307.13813; learning rates: Goyal et al., 2017, arXiv:1706.02677 (SGD), "
        "Malladi et al., 2022, arXiv:2205.10287 (Adam)",
    ),
    "half_life_tokens": _Choice(
        BASES,
        lambda base, k, s: 1.0,
        lambda base, k, s: ("power", k),
        "the half-life of every memory in examples; the learning rate is left to be tuned",
        "Marek et al., 2025, arXiv:2507.07101 (for the second moment of Adam)",
    ),
    "linear_rate": _Choice(
        ("sgd",),
        lambda base, k, s: k,
        lambda base, k, s: _FIXED,
        "the distance per example along a lasting gradient",
        "Goyal et al., 2017, arXiv:1706.02677",
    ),
    "square_root_rate": _Choice(
        ("sgd", "adam"),
        lambda base, k, s: math.sqrt(k),
        lambda base, k, s: _FIXED if base == "sgd" else ("share", k),
        "SGD: the variance that gradient noise adds in one step; Adam: the stochastic differential equation",
        "SGD: Krizhevsky, 2014, arXiv:1404.5997; Adam: Malladi et al., 2022, arXiv:2205.10287",
    ),
    "bound": _Choice(
        ("norm",),
        lambda base, k, s: k**0.25 * s**-0.75,
        lambda base, k, s: ("share", math.sqrt(k / s)),
        "the minimum of a convergence bound, over learning rate and decay",
        "Shulgin et al., 2026, arXiv:2603.15958",
    ),
    "bound_fixed_decay": _Choice(
        ("norm",),
        lambda base, k, s: s**-0.5,
        lambda base, k, s: _FIXED,
        "the minimum of a convergence bound over the learning rate, at the old decay",
        "Shulgin et al., 2026, arXiv:2603.15958",
    ),
}


def transfer(
    rule: Filter,
    learning_rate: float,
    *,
    base: str = "sgd",
    keep: str = "trajectory",
    batch: float = 1.0,
    steps: float | None = None,
    weight_decay: float = 0.0,
    curvatures: ArrayLike = (),
) -> Transfer:
    r"""Settings for a batch k times as large, or for s times as many steps.

    | `keep` | `base` | learning rate times | decay $\beta$ becomes |
    |---|---|---|---|
    | `"trajectory"` | sgd; adam | k; $\sqrt k$ | $\beta^k$ |
    | `"half_life_tokens"` | any | 1 | $\beta^k$ |
    | `"linear_rate"` | sgd | k | $\beta$ |
    | `"square_root_rate"` | sgd; adam | $\sqrt k$ | $\beta$; $1 - k(1-\beta)$ |
    | `"bound"` | norm | $k^{1/4} s^{-3/4}$ | $1 - \sqrt{k/s}\,(1-\beta)$ |
    | `"bound_fixed_decay"` | norm | $s^{-1/2}$ | $\beta$ |

    The last two minimise $\frac{\Delta}{\eta K} + \frac{L\eta}{1-\beta} + \sigma\sqrt{\frac{1-\beta}{B}}$ for K steps
    of batch B, the terms that matter in long runs of the bounds for norm-constrained methods.

    Of a rule with several memories every decay p, an eigenvalue of A, becomes p', and every memory keeps its share of
    the update, so that the gain at zero frequency stays:

    $$ A' = f(A), \quad B' = (I - A')(I - A)^{-1} B, \quad C' = C A^{-1} A', \quad
       D' = D + C A^{-1}(A - A')(I - A)^{-1} B $$

    `heavy_ball(b)` becomes `heavy_ball(b**k)` times $(1-\beta^k)/(1-\beta)$, `quasi_hyperbolic(b, nu)` becomes
    `quasi_hyperbolic(b**k, nu)`, `primal_averaging(mu_x, mu_y)` `primal_averaging(mu_x**k, mu_y)`. The velocity is
    another one, so a run starts anew. Decays outside the rule, of second moments or averages of the weights, are for
    you to change in the way of the table: for `"square_root_rate"` Adam's b2 becomes 1 - k (1 - b2).

    Decoupled weight decay is an average of the updates with decay $1 - \eta\lambda$; its memory stays the same share of
    the run, $1 - \eta'\lambda' = (1 - \eta\lambda)^{1/s}$.

    Defects compare the two stationary loops with gradient noise of variance 1 and 1/k. In the model "adam" divides by
    the size of a gradient's noise, so that $\sqrt k$ times the learning rate counts, and "norm" by that of the noise in
    the update, the root of `analysis.noise_gain` over k. Where noise does not dominate that does not hold.

    Args:
      rule: The old rule; where decays change, its coefficients must be constant and its poles in (0, 1).
      learning_rate: The old learning rate, in (0, inf).
      base: What moves the weights: "sgd", "adam", or "norm" for sign and orthogonal methods.
      keep: The rule of transfer, see the table.
      batch: k, the new batch size over the old, in (0, inf).
      steps: s, the new number of steps over the old, in (0, inf); None for 1/k, the same number of examples.
      weight_decay: The old decoupled weight decay, with a product with the learning rate in [0, 1).
      curvatures: Those of the quadratics for the defects, in (0, inf), shape (n,); none by default.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, `keep` is not for this `base`, the rule has no such transfer, or the old
        settings diverge at a curvature, or `curvatures` come with a rule whose coefficients change.

    Reference:
      Busbridge et al., "How to scale your EMA", NeurIPS 2023, arXiv:2307.13813. Marek et al., "Small batch size
      training for language models", 2025, arXiv:2507.07101. Goyal et al., 2017, arXiv:1706.02677. Krizhevsky, 2014,
      arXiv:1404.5997. Malladi et al., NeurIPS 2022, arXiv:2205.10287. Shulgin et al., "Deriving hyperparameter scaling
      laws via modern optimization theory", 2026, arXiv:2603.15958. Weight decay: Wang and Aitchison, ICML 2025,
      arXiv:2405.13698.
    """
    if not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    _checks.number("learning_rate", learning_rate, "(0, inf)")
    _checks.number("batch", batch, "(0, inf)")
    k = float(batch)
    if steps is not None:
        _checks.number("steps", steps, "(0, inf)")
    s = 1 / k if steps is None else float(steps)
    _checks.number("weight_decay", weight_decay, f"[0, {1 / float(learning_rate)!r})")
    _checks.choice("base", base, BASES)
    _checks.choice("keep", keep, tuple(_CHOICES))
    choice = _CHOICES[keep]
    if base not in choice.bases:
        allowed = ", ".join(repr(name) for name, one in _CHOICES.items() if base in one.bases)
        raise ValueError(f"keep must be one of {allowed} for base {base!r}, got {keep!r}")
    new = _with_decays(rule, *choice.decays(base, k, s))
    rate = float(learning_rate) * choice.rate(base, k, s)
    kept = math.log1p(-float(learning_rate) * float(weight_decay)) / s
    spectrum = reals("curvatures", curvatures, "(0, inf)").ravel()
    defects = _defects((rule, float(learning_rate)), (new, rate), base, k, spectrum)
    return Transfer(new, rate, -math.expm1(kept) / rate, choice.invariant, choice.source, defects)


def _with_decays(rule: Filter, kind: str, amount: float) -> Filter:
    """The rule with other decays, every memory with its share of the update."""
    if amount == 1:
        return rule
    if not rule.is_constant:
        raise ValueError(
            "rule must have constant coefficients, got some that depend on the step or the age of a leaf: "
            "build it anew with decays from the formula of transfer's table"
        )
    rule = rule.pruned()
    if not rule.order:
        return rule
    A, B, C, D = rule.matrices()
    old = np.linalg.eigvals(A)
    # Equal poles are found to the root of the rounding, as a conjugate pair for example.
    if np.any(abs(old.imag) > 1e-6) or np.any(old.real < 1e-12) or np.any(old.real >= 1):
        raise ValueError(
            f"rule must have poles in (0, 1), the decays of averages, got {_checks.shown(old.round(6).tolist())}: "
            "a delay, an alternation or a sum that never forgets has no half-life to keep"
        )
    eye = np.eye(len(B))
    if kind == "share" and amount * (1 - old.real.min()) >= 1:
        raise ValueError(
            f"rule must have decays above {1 - 1 / amount:.6g} to become 1 - {amount:.6g} (1 - decay), "
            f"got {old.real.min():.6g}: keep='half_life_tokens' gives its decays for any batch"
        )
    later = _power(A, amount) if kind == "power" else eye - amount * (eye - A)
    ahead = np.linalg.solve(A.T, C)  # C A^-1
    rest = np.linalg.solve(eye - A, B)  # (I - A)^-1 B, which stays
    # The evaluated point keeps its distance from the stored one under a lasting gradient, as in `primal_averaging`.
    look = np.linalg.solve(A.T, np.asarray(rule.lookahead, np.float64)) @ later
    look = np.linalg.solve((eye - later).T, look @ (eye - A))
    return Filter(later.tolist(), (eye - later) @ rest, ahead @ later, D + float(ahead @ (A - later) @ rest), look)


def _power(A: np.ndarray, k: float) -> np.ndarray:
    """A^k for a matrix with eigenvalues in (0, 1)."""
    if k.is_integer():
        return np.linalg.matrix_power(A, int(k))
    values, vectors = np.linalg.eig(A)
    if np.linalg.cond(vectors) > 1e8:
        raise ValueError(f"batch must be a whole number for a rule with equal decays in a row, got {k!r}")
    return np.linalg.solve(vectors.T, (vectors * values**k).T).T.real


def _defects(
    before: tuple[Filter, float], after: tuple[Filter, float], base: str, k: float, curvatures: np.ndarray
) -> Defects:
    """The relative changes from one rule and its learning rate to another."""
    (old, rate), (new, new_rate) = before, after
    lag = _lag_defect(old, new, k)
    if not len(curvatures):
        return Defects(curvatures, np.empty(0), np.empty(0), lag)
    if not old.is_constant:
        raise ValueError("curvatures must be left out for a rule whose coefficients depend on the step or an age")
    radii = analysis.spectral_radius(old, rate, curvatures)
    if np.any(radii >= 1):
        bad = curvatures[radii >= 1][0]
        raise ValueError(f"curvatures must be such that the old settings converge, got {bad} where they do not")
    # In units of the old size of the noise that the base divides by.
    if base != "sgd":
        new_rate *= math.sqrt(k)
    if base == "norm":
        new_rate *= math.sqrt(analysis.noise_gain(old) / analysis.noise_gain(new))
    new_radii = analysis.spectral_radius(new, new_rate, curvatures)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where both are 0, each converges in a few steps.
        contraction = np.where((radii == 0) & (new_radii == 0), 0.0, np.log(new_radii) / (k * np.log(radii)) - 1)
    variance = analysis.stationary_variance(new, new_rate, curvatures, 1 / k)
    variance = variance / analysis.stationary_variance(old, rate, curvatures) - 1
    return Defects(curvatures, variance, contraction, lag)


def _lag_defect(old: Filter, new: Filter, k: float) -> float:
    """The relative change of the mean lag in examples."""
    if not old.is_constant:
        return math.nan
    before, after = analysis.mean_lag(old), k * analysis.mean_lag(new)
    return 0.0 if before == after else (after - before) / before if before else math.nan
