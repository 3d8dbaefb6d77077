r"""Coefficients and learning rates from targets: curvatures, a length of memory, a noise gain, a loss to train.

The functions that take L and mu, the largest and smallest curvature of a loss, are theorems with their numbers put in.
`suggest` measures the curvature first. Nothing here replaces a search where a search can be paid for.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from . import analysis, checks, rules
from .analysis.arguments import reals
from .filters import Filter

# Without a smallest curvature there is no theory to take a decay from; this one is the usual default.
_DEFAULT_DECAY = 0.9
# How often `suggest` halves and doubles a rate at most.
_HALVINGS, _DOUBLINGS = 10, 4


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A rule with the learning rate to follow it in the chain.

    Attributes:
      rule: The rule.
      learning_rate: The constant rate for it; 1 for rules that have their step size inside.
      decay: The decay of the rule's velocity, or what it tends to.
      rate: Predicted contraction of the error per step for curvatures in [mu, L]; None where mu is not known.
      reasons: Why, one sentence each.
    """

    rule: Filter
    learning_rate: float
    decay: float
    rate: float | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        rate = "unknown" if self.rate is None else f"{self.rate:.6g}"
        head = f"learning rate {self.learning_rate:.4g}, decay {self.decay:.6g}, contraction per step {rate}"
        return "\n".join([head, *(f"  - {reason}" for reason in self.reasons)])


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What Lanczos found of a Hessian's spectrum.

    Attributes:
      L: Largest eigenvalue found. The true one is not smaller.
      L_error: An eigenvalue lies within this distance of `L`.
      lowest: Smallest eigenvalue found; negative where the loss is not convex. The true one is not larger.
      lowest_error: An eigenvalue lies within this distance of `lowest`.
      mu: `lowest`, where it is positive, above rounding and known to a tenth; None otherwise.
      exact: Whether the whole spectrum was seen, so that only rounding is left.
      products: Hessian-vector products spent.
    """

    L: float
    L_error: float
    lowest: float
    lowest_error: float
    mu: float | None
    exact: bool
    products: int


def gradient_descent(L: float, mu: float) -> Tuning:
    r"""Plain descent at its best rate for curvatures in [mu, L]: $2/(L+\mu)$, contraction $(\kappa-1)/(\kappa+1)$.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Polyak, "Introduction to optimization", 1987; Nesterov, "Introductory lectures on convex optimization", 2004.
    """
    kappa = _condition(L, mu)
    return Tuning(
        rules.heavy_ball(0.0),
        2 / (L + mu),
        0.0,
        (kappa - 1) / (kappa + 1),
        (
            f"2/(L + mu): curvatures {mu:.4g} and {L:.4g} contract equally",
            "holds for every smooth strongly convex loss",
        ),
    )


def optimal_heavy_ball(L: float, mu: float) -> Tuning:
    r"""Polyak's heavy ball for quadratics with curvatures in [mu, L]: the fastest constant rule of two points.

    $$ \beta = \left(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\right)^2, \qquad
       \eta = \frac{4}{(\sqrt L + \sqrt\mu)^2}, \qquad \rho = \sqrt\beta $$

    For quadratics only: at these numbers it cycles for ever on some smooth strongly convex losses. From rest the error
    is $(1 + Bt)\rho^t$, with B up to 2.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Polyak, 1964. The cycle: Lessard, Recht and Packard, 2016, arXiv:1408.3595.
    """
    root = math.sqrt(_condition(L, mu))
    rate = (root - 1) / (root + 1)
    return Tuning(
        rules.heavy_ball(rate**2),
        4 / (math.sqrt(L) + math.sqrt(mu)) ** 2,
        rate**2,
        rate,
        ("critically damped at both ends of the spectrum", "quadratics only: elsewhere it may cycle"),
    )


def smooth_nesterov(L: float, mu: float) -> Tuning:
    r"""Nesterov's constants for every smooth strongly convex loss.

    $$ \eta = \frac1L, \qquad \beta = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1} $$

    The error contracts by at most $1 - 1/\sqrt\kappa$ per step on quadratics.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Nesterov, "Introductory lectures on convex optimization", 2004, section 2.2.
    """
    root = math.sqrt(_condition(L, mu))
    decay = (root - 1) / (root + 1)
    return Tuning(
        rules.nesterov(decay),
        1 / L,
        decay,
        1 - 1 / root,
        ("1/L: a step that no curvature up to L makes overshoot", "holds for every smooth strongly convex loss"),
    )


def quadratic_nesterov(L: float, mu: float) -> Tuning:
    r"""Nesterov's rule at its best for quadratics with curvatures in [mu, L].

    $$ \eta = \frac{4}{3L + \mu}, \qquad \beta = \frac{\sqrt{3\kappa+1} - 2}{\sqrt{3\kappa+1} + 2}, \qquad
       \rho = 1 - \frac{2}{\sqrt{3\kappa+1}} $$

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Lessard, Recht and Packard, 2016, arXiv:1408.3595, proposition 1.
    """
    root = math.sqrt(3 * _condition(L, mu) + 1)
    decay = (root - 2) / (root + 2)
    return Tuning(
        rules.nesterov(decay),
        4 / (3 * L + mu),
        decay,
        1 - 2 / root,
        ("the least contraction of Nesterov's rule over the spectrum", "quadratics only"),
    )


def optimal_triple_momentum(L: float, mu: float) -> Tuning:
    r"""The triple momentum method, $\rho = 1 - 1/\sqrt\kappa$ on every smooth strongly convex loss; learning rate 1.

    The point that contracts so is the one of `eval_params`.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Van Scoy, Freeman and Lynch, IEEE Control Systems Letters 2018.
    """
    kappa = _condition(L, mu)
    rule = rules.triple_momentum(L, mu)
    return Tuning(
        rule,
        1.0,
        float(analysis.poles(rule)[0].real),
        1 - 1 / math.sqrt(kappa),
        ("the fastest constant rule known for every smooth strongly convex loss", "its step size is inside"),
    )


def optimal_chebyshev(L: float, mu: float) -> Tuning:
    r"""Chebyshev's semi-iteration: no method does better on quadratics with curvatures in [mu, L]; learning rate 1.

    After T steps the error is at most $2q^T/(1 + q^{2T})$ of the start, $q = (\sqrt\kappa-1)/(\sqrt\kappa+1)$.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Golub and Varga, Numerische Mathematik 1961; d'Aspremont, Scieur and Taylor, 2021, arXiv:2101.09545.
    """
    root = math.sqrt(_condition(L, mu))
    rate = (root - 1) / (root + 1)
    return Tuning(
        rules.chebyshev(L, mu),
        1.0,
        rate**2,
        rate,
        ("the least worst error after any number of steps", "quadratics only; its step sizes are inside"),
    )


def decay_from_half_life(steps: Any) -> Any:
    r"""The decay whose memory halves in `steps` steps: $2^{-1/s}$.

    Args:
      steps: s, in (0, inf); any shape.

    Returns:
      float64 of the shape of `steps`, in (0, 1).

    Raises:
      TypeError: If `steps` is no number.
      ValueError: If it is out of range.
    """
    return (0.5 ** (1 / reals("steps", steps, "(0, inf)")))[()]


def decay_from_mean_lag(steps: Any) -> Any:
    r"""The decay of a heavy ball or average whose gradients are `steps` steps old in the mean: $s/(1+s)$.

    Args:
      steps: s, in (0, inf); any shape.

    Returns:
      float64 of the shape of `steps`, in (0, 1).

    Raises:
      TypeError: If `steps` is no number.
      ValueError: If it is out of range.
    """
    steps = reals("steps", steps, "(0, inf)")
    return (steps / (1 + steps))[()]


def decay_from_noise_gain(gain: Any) -> Any:
    r"""The decay of an average that passes this share of the variance of gradient noise: $(1-g)/(1+g)$.

    A heavy ball at the same effective learning rate passes the same.

    Args:
      gain: g, in (0, 1); any shape.

    Returns:
      float64 of the shape of `gain`, in (0, 1).

    Raises:
      TypeError: If `gain` is no number.
      ValueError: If it is out of range.
    """
    gain = reals("gain", gain, "(0, 1)")
    return ((1 - gain) / (1 + gain))[()]


def match_learning_rate(learning_rate: Any, old: Filter, new: Filter) -> Any:
    r"""The rate for `new` that goes as far along a lasting gradient as `learning_rate` does for `old`.

    $\eta_\mathrm{new} = \eta\,H_\mathrm{old}(1)/H_\mathrm{new}(1)$: a tenth of the rate from heavy ball 0.9 to 0.99.

    Args:
      learning_rate: The rate that serves `old`, in [0, inf); any shape.
      old: A rule; its coefficients must be constant.
      new: Another.

    Returns:
      float64 of the shape of `learning_rate`.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a rate is out of range, a coefficient follows the step, or the gain of a rule is 0 or infinite.
    """
    for name, rule in (("old", old), ("new", new)):
        if not isinstance(rule, Filter):
            raise TypeError(f"{name} must be a Filter such as heavy_ball(0.9), got {checks.shown(rule)}")
    rate = analysis.effective_learning_rate(old, learning_rate)
    gains = {"old": analysis.dc_gain(old), "new": analysis.dc_gain(new)}
    for name, gain in gains.items():
        if gain == 0 or math.isinf(gain):
            raise ValueError(f"{name} must have a finite gain other than 0 at zero frequency, got {gain}")
    if gains["old"] * gains["new"] < 0:
        raise ValueError(f"old and new must have gains of one sign, got {gains['old']} and {gains['new']}")
    return rate / gains["new"]


def estimate_curvature(
    loss: Callable[[Any, Any], Any], params: Any, batch: Any = None, *, iterations: int = 40, seed: int = 0
) -> Curvature:
    r"""The ends of the spectrum of the loss's Hessian at `params`, by Lanczos with Hessian-vector products.

    Each product costs about two gradients. The largest eigenvalue is found in a few dozen; the smallest positive one
    only if it stands apart or the spectrum is exhausted, and `mu` is None when it was not. Lanczos keeps `iterations`
    vectors of the size of the parameters in float64, and makes each orthogonal to all before it.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays; used in float32 at least.
      batch: Whatever `loss` takes: a tree of arrays and of anything else.
      iterations: Products at most, at least 2.
      seed: Of the random vector to start from.

    Returns:
      A `Curvature`.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, a leaf of `params` is not real floating
        point, or a value is traced.
      ValueError: If `params` has no elements or is not finite, `loss` is no scalar, or a derivative is not finite.

    Reference:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994. Golub and Van Loan, "Matrix
      computations", 2013, chapter 10.
    """
    problem = _Problem(loss, params, batch)
    return _lanczos(problem, problem.start, iterations, seed)


def _lanczos(problem: "_Problem", point: jax.Array, iterations: int, seed: int) -> Curvature:
    """The ends of the Hessian's spectrum at a point."""
    checks.integer("iterations", iterations, 2)
    checks.integer("seed", seed, 0)
    precision = float(jnp.finfo(point.dtype).eps)
    count = min(int(iterations), point.size)
    q = np.random.default_rng(int(seed)).standard_normal(point.size)
    basis = np.empty((count, point.size))
    diagonal, beside = np.empty(count), np.empty(count)
    exhausted = False
    # A package for this would be one more that every user installs; it is these ten lines.
    for k in range(count):
        basis[k] = q / np.linalg.norm(q)
        q = problem.product(point, basis[k])
        if not np.all(np.isfinite(q)):
            raise ValueError("loss must have finite derivatives, got a product with its Hessian that is not finite")
        diagonal[k] = q @ basis[k]
        for _ in range(2):  # once leaves what rounding put there
            q = q - basis[: k + 1].T @ (basis[: k + 1] @ q)
        beside[k] = np.linalg.norm(q)
        scale = max(abs(diagonal[: k + 1]).max(), beside[:k].max(initial=0.0))
        exhausted = bool(beside[k] <= 100 * precision * scale)
        if exhausted:
            count = k + 1
            break
    T = np.diag(diagonal[:count]) + np.diag(beside[: count - 1], 1) + np.diag(beside[: count - 1], -1)
    values, vectors = np.linalg.eigh(T)
    errors = np.zeros(count) if exhausted else beside[count - 1] * abs(vectors[-1])
    L, lowest = float(values[-1]), float(values[0])
    known = lowest > 100 * precision * max(abs(values)) and errors[0] <= 0.1 * lowest
    return Curvature(L, float(errors[-1]), lowest, float(errors[0]), lowest if known else None, exhausted, count)


def suggest(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any = None,
    *,
    iterations: int = 40,
    steps: int = 100,
    seed: int = 0,
) -> Tuning:
    r"""A learning rate and a decay to start from, for Nesterov's rule, with the reasons.

    The rate is 1/L, L the largest curvature. The decay is the one of `smooth_nesterov` where the smallest curvature can
    be known, and 0.9 where it cannot: in a network it is negative or zero, and no estimate of it says anything about
    training. Curvature at the start need not be that on the way, so both are measured again, half way and at the end of
    a trial of `steps` steps from `params` with what was found there; a second trial decides. Where curvature gives way
    to larger steps, as it does in networks, no measurement tells how far: the rate is then doubled for as long as
    another trial ends clearly lower. Where it grows so fast that the first trial fails, the rate is halved.

    It looks at one batch: gradient noise may want a smaller rate. It costs up to 3 times `iterations` Hessian-vector
    products and 6 times `steps` gradients.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays, where training starts.
      batch: Whatever `loss` takes, as large as can be.
      iterations: Hessian-vector products per estimate at most, at least 2.
      steps: Length of a trial, at least 2.
      seed: Of the estimates.

    Returns:
      A `Tuning`; its `rate` is None where the smallest curvature is not known.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, a leaf of `params` is not real floating
        point, or a value is traced.
      ValueError: If the loss does not curve upwards at `params`, no rate tried lowers it, or for the reasons of
        `estimate_curvature`.

    Reference:
      See `smooth_nesterov` and `estimate_curvature`.
    """
    checks.integer("steps", steps, 2)
    problem = _Problem(loss, params, batch)
    here = _lanczos(problem, problem.start, iterations, seed)
    if not here.L > 0:
        raise ValueError(f"loss must curve upwards somewhere at params, got a largest curvature of {here.L}")
    start_loss = problem.loss(problem.start)
    first = _from_curvature(here.L + here.L_error, here, "at params")
    half, end, first_loss = _trial(problem, first, int(steps))
    for _ in range(_HALVINGS):
        if first_loss < start_loss:
            break
        first = dataclasses.replace(first, learning_rate=first.learning_rate / 2, rate=None)
        first = _because(first, f"halved, as {steps} steps at twice the rate did not lower the loss")
        half, end, first_loss = _trial(problem, first, int(steps))
    else:
        raise ValueError(f"{steps} steps must lower the loss, even at rate {first.learning_rate:.4g} they did not")
    way = [_lanczos(problem, point, iterations, seed) for point in (half, end)]
    best, loss_there = first, first_loss
    L = max(found.L + found.L_error for found in way)
    # Less is no difference: two runs that have converged differ in rounding.
    clear = 1e-3 * (start_loss - first_loss)
    if L > 0:
        second = _from_curvature(L, way[1], f"within {steps} steps of params")
        _, _, second_loss = _trial(problem, second, int(steps))
        # What serves where the run arrives is better from there on, so a draw is in its favour.
        if second_loss < first_loss + clear:
            best, loss_there = second, second_loss
        tried = [f"{other.learning_rate:.4g} with decay {other.decay:.4g}" for other in (first, second)]
        verdict = f"after {steps} steps from params the loss is {first_loss:.4g} at rate {tried[0]}, "
        best = _because(best, verdict + f"{second_loss:.4g} at {tried[1]}")
    for _ in range(_DOUBLINGS):
        doubled = dataclasses.replace(best, learning_rate=2 * best.learning_rate, rate=None)
        _, _, doubled_loss = _trial(problem, doubled, int(steps))
        if not doubled_loss < loss_there - clear:
            return _because(best, f"twice the rate is no better: {doubled_loss:.4g}")
        best, loss_there = _because(doubled, f"twice the rate is better: {doubled_loss:.4g}"), doubled_loss
    return best


def _because(tuning: Tuning, reason: str) -> Tuning:
    """The same with one reason more."""
    return dataclasses.replace(tuning, reasons=(*tuning.reasons, reason))


def _from_curvature(L: float, found: Curvature, where: str) -> Tuning:
    """Nesterov's rule for a largest curvature of L, and the smallest one found, if that is known."""
    measured = f"largest curvature {where} {L:.4g}, so the rate is its inverse"
    if found.mu is None:
        why = "negative" if found.lowest < 0 else "not settled, or too small for rounding"
        reasons = (
            measured,
            f"smallest curvature {where} {found.lowest:.4g}: {why}, so no decay follows from it",
            f"decay {_DEFAULT_DECAY}, the usual default: a memory of ten gradients",
        )
        return Tuning(rules.nesterov(_DEFAULT_DECAY), 1 / L, _DEFAULT_DECAY, None, reasons)
    tuned = smooth_nesterov(L, min(found.mu, L))
    seen = "the whole spectrum was seen" if found.exact else "settled, but a smaller one may be hidden"
    reasons = (
        measured,
        f"smallest curvature {where} {found.mu:.4g} ({seen}), so the condition number is {L / found.mu:.4g}",
        f"decay {tuned.decay:.4g} = (sqrt(kappa) - 1)/(sqrt(kappa) + 1), for smooth strongly convex losses",
    )
    return dataclasses.replace(tuned, reasons=reasons)


def _trial(problem: "_Problem", tuning: Tuning, steps: int) -> tuple[jax.Array, jax.Array, float]:
    """The points half way and at the end of a run from the start, and the loss there; infinite if it diverged."""
    half, v = problem.descend(problem.start, jnp.zeros_like(problem.start), tuning, steps // 2)
    end, _ = problem.descend(half, v, tuning, steps - steps // 2)
    loss = problem.loss(end)
    return half, end, loss if math.isfinite(loss) else math.inf


def _condition(L: float, mu: float) -> float:
    checks.number("L", L, "(0, inf)")
    checks.number("mu", mu, f"(0, {L}]")
    return L / mu


class _Problem:
    """A loss of one vector: its value, compiled products with its Hessian, and compiled runs of Nesterov's rule."""

    def __init__(self, loss: Any, params: Any, batch: Any) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function of params and batch, got {checks.shown(loss)}")
        flattened: tuple[list[Any], Any] = jax.tree.flatten(batch)
        leaves, treedef = flattened
        if any(isinstance(x, jax.core.Tracer) for x in (*jax.tree.leaves(params), *leaves)):
            raise TypeError("params and batch must have values that are known now, got traced ones")
        self.start, unravel = ravel_pytree(jax.tree_util.tree_map_with_path(_wide, params))
        if self.start.size == 0:
            raise ValueError("params must have at least one element, got none")
        if not np.all(np.isfinite(self.start)):
            raise ValueError("params must be finite, got a NaN or an infinity")
        # Numbers and words may say what the loss is, so only arrays become arguments of the compiled program.
        self._arrays = [x if isinstance(x, np.ndarray | jax.Array) else None for x in leaves]

        def flat(x: jax.Array, arrays: Any) -> Any:
            filled = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
            return loss(unravel(x), treedef.unflatten(filled))

        out = jax.eval_shape(flat, self.start, self._arrays)
        if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"loss must give a real floating-point scalar, got {out}")
        if out.shape != ():
            raise ValueError(f"loss must give a scalar, got shape {out.shape}")

        def run(x: jax.Array, v: jax.Array, arrays: Any, numbers: tuple[Any, Any], steps: Any) -> Any:
            rate, decay = numbers

            def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                x, v = state
                g = jax.grad(flat)(x, arrays)
                v = decay * (v + g)
                return x - rate * (v + g), v

            return jax.lax.fori_loop(0, steps, step, (x, v))

        self._flat, self._run = jax.jit(flat), jax.jit(run)
        self._product = jax.jit(lambda x, q, arrays: jax.jvp(lambda y: jax.grad(flat)(y, arrays), (x,), (q,))[1])

    def loss(self, x: jax.Array) -> float:
        """The loss at x."""
        return float(self._flat(x, self._arrays))

    def product(self, x: jax.Array, q: np.ndarray) -> np.ndarray:
        """The Hessian at x times q."""
        return np.asarray(self._product(x, jnp.asarray(q, x.dtype), self._arrays), np.float64)

    def descend(self, x: jax.Array, v: jax.Array, tuning: Tuning, steps: int) -> tuple[jax.Array, jax.Array]:
        """Parameters and velocity of `rules.nesterov` after so many steps."""
        numbers = (jnp.asarray(tuning.learning_rate, x.dtype), jnp.asarray(tuning.decay, x.dtype))
        new: tuple[jax.Array, jax.Array] = self._run(x, v, self._arrays, numbers, steps)
        return new


def _wide(path: Any, leaf: Any) -> jax.Array:
    """A leaf in float32 or wider."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"params{jax.tree_util.keystr(path)} must be real floating point, got {leaf.dtype}")
    wide: jax.Array = leaf.astype(jnp.promote_types(jnp.float32, leaf.dtype))
    return wide
