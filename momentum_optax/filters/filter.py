r"""`Filter`: a momentum rule as data, a linear filter in state space.

A rule with K velocities per parameter reads its state, then writes it:

    u_t = C v_t + D g_t        v_{t+1} = A v_t + B g_t        v_0 = 0

Nothing here touches trees, dtypes or JAX; the algebra is NumPy's, in float64.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import _checks
from . import algebra
from .coefficients import Coefficient, PerLeafSchedule, is_zero, lift, value_at


@dataclasses.dataclass(frozen=True, eq=False)
class Filter:
    r"""A linear momentum rule: $u_t = C v_t + D g_t$, $v_{t+1} = A v_t + B g_t$, $v_0 = 0$.

    Every coefficient is a number, a scalar array (traced or not), a schedule of the step, or a `PerLeafSchedule`.

    Attributes:
      A: How velocities carry over, K rows of K; a scalar for K = 1.
      B: How the gradient enters each velocity, K entries; a scalar for K = 1.
      C: How each velocity enters the update, K entries; a scalar for K = 1.
      D: How the gradient enters the update, a scalar.
      lookahead: For rules whose stored parameters are a look-ahead point: the point to evaluate at is
        `params + learning_rate * lookahead . v`. K entries; a scalar for K = 1 or to mean zero.

    Raises:
      ValueError: If the shapes disagree, or a number is not finite.
      TypeError: If an entry is no number, scalar array, schedule or `PerLeafSchedule`.

    Reference:
      Lessard, Recht and Packard, "Analysis and design of optimization algorithms via integral quadratic
      constraints", SIAM J. Optim. 2016, arXiv:1408.3595 (optimizers as linear systems in feedback).
    """

    A: Any
    B: Any
    C: Any
    D: Any
    lookahead: Any = 0.0

    def __post_init__(self) -> None:
        A = _rows(self.A)
        fields = {
            "A": tuple(tuple(_entry(f"A[{i}][{j}]", x) for j, x in enumerate(row)) for i, row in enumerate(A)),
            "B": _vector("B", self.B, len(A)),
            "C": _vector("C", self.C, len(A)),
            "D": _entry("D", self.D),
            "lookahead": _vector("lookahead", (0.0,) * len(A) if is_zero(self.lookahead) else self.lookahead, len(A)),
        }
        if any(len(row) != len(A) for row in A):
            raise ValueError(f"A must be square, got rows of length {[len(row) for row in A]} for {len(A)} rows")
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Say how to run a rule where Optax asks for a transformation: in `chain`, `masked`, `MultiSteps` and the like.

        An `AttributeError`, so that `hasattr` finds what is there.
        """
        if name in ("init", "update"):
            raise AttributeError(
                f"a Filter has no {name}: it is a rule, and mo.scale_by_momentum(rule) makes a transformation of it"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def order(self) -> int:
        """K, the number of velocities per parameter."""
        return len(self.B)

    @property
    def is_constant(self) -> bool:
        """Whether every coefficient is a plain number."""
        return all(_checks.is_number(c) for c in self.coefficients())

    @property
    def reads_step(self) -> bool:
        """Whether a coefficient depends on the step."""
        return any(c.reads_step if isinstance(c, PerLeafSchedule) else callable(c) for c in self.coefficients())

    @property
    def reads_age(self) -> bool:
        """Whether a coefficient depends on the number of gradients that a leaf has received."""
        return any(isinstance(c, PerLeafSchedule) for c in self.coefficients())

    def coefficients(self) -> list[Coefficient]:
        """The entries of A, B, C and D in one list."""
        return [c for row in self.A for c in row] + [*self.B, *self.C, self.D]

    def at(self, step: Any, age: Any = None) -> "Filter":
        """The rule with its coefficients at `step` put in: Python floats for an int, JAX values for a tracer.

        Args:
          step: The number of updates made before this one.
          age: The number of gradients that the leaf received before this one; `step` if None.
        """
        return self._map(lambda c: value_at(c, step, age))

    def scale(self, gain: Coefficient) -> "Filter":
        """The rule with its update multiplied by `gain`; `scale(a)` at rate `r` is the rule at rate `a r`."""
        times = [lift(lambda x, y: x * y, c, gain) for c in (*self.C, self.D, *self.lookahead)]
        K = self.order
        return Filter(self.A, self.B, tuple(times[:K]), times[K], tuple(times[K + 1 :]))

    def change_basis(self, T: Any) -> "Filter":
        """The same rule for other velocities w, where v = T w: A becomes T^-1 A T, B T^-1 B, and C C T.

        Args:
          T: Invertible, K rows of K numbers; a scalar for K = 1.

        Raises:
          ValueError: If T has another shape or no inverse.
        """
        basis = np.asarray(_rows(T), np.float64).reshape(len(_rows(T)), -1)
        if basis.shape != (self.order, self.order):
            raise ValueError(f"T must be {self.order} rows of {self.order} numbers, got shape {basis.shape}")
        if self.order and not (np.all(np.isfinite(basis)) and np.linalg.cond(basis) < 1e15):
            raise ValueError(f"T must be invertible, got {_checks.shown(T)}")
        inverse = np.linalg.inv(basis)
        AT = [_combine(basis.T, row) for row in self.A]
        columns = [_combine(inverse, [row[j] for row in AT]) for j in range(self.order)]
        return Filter(
            A=tuple(zip(*columns, strict=True)),
            B=tuple(_combine(inverse, self.B)),
            C=tuple(_combine(basis.T, self.C)),
            D=self.D,
            lookahead=tuple(_combine(basis.T, self.lookahead)),
        )

    def pruned(self) -> "Filter":
        """The rule without the velocities that are never read or always zero, as far as its numbers tell."""
        size = range(self.order)
        read = [i for i in size if not (is_zero(self.C[i]) and is_zero(self.lookahead[i]))]
        fed = [i for i in size if not is_zero(self.B[i])]
        for _ in size:
            read = [i for i in size if i in read or any(not is_zero(self.A[j][i]) for j in read if j != i)]
            fed = [i for i in size if i in fed or any(not is_zero(self.A[i][j]) for j in fed if j != i)]
        kept = [i for i in size if i in read and i in fed]
        return Filter(
            A=tuple(tuple(self.A[i][j] for j in kept) for i in kept),
            B=tuple(self.B[i] for i in kept),
            C=tuple(self.C[i] for i in kept),
            D=self.D,
            lookahead=tuple(self.lookahead[i] for i in kept),
        )

    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """A, B, C and D as NumPy float64, of shapes (K, K), (K,), (K,) and ().

        Raises:
          ValueError: If a coefficient is not a number.
        """
        if not self.is_constant:
            raise ValueError("the coefficients must be numbers here; take rule.at(step) of a scheduled rule")
        A = np.asarray(self.A, np.float64).reshape(self.order, self.order)
        return A, np.asarray(self.B, np.float64), np.asarray(self.C, np.float64), float(self.D)

    def response(self, signal: Any) -> np.ndarray:
        """The updates u_0, u_1, ... for the gradients `signal`, in float64, from velocity zero.

        Args:
          signal: Shape (n,) or (n, ...), one gradient per step from step 0.

        Returns:
          An array of the shape of `signal`.
        """
        signal = np.asarray(signal, np.float64)
        v = np.zeros((self.order, *signal.shape[1:]))
        out = np.zeros(signal.shape)
        for t, g in enumerate(signal):
            A, B, C, D = self._map(lambda c, t=t: float(value_at(c, t))).matrices()  # type: ignore[misc]
            out[t] = np.tensordot(C, v, 1) + D * g
            v = np.tensordot(A, v, 1) + np.multiply.outer(B, g)
        return out

    def impulse_response(self, n: int, start: int = 0) -> np.ndarray:
        """The updates of `n` steps after a unit gradient at step `start` alone; shape (n,), float64.

        For constant coefficients this is D, C B, C A B, C A^2 B, ... whatever `start` is.
        """
        _checks.integer("n", n, 0)
        _checks.integer("start", start, 0)
        impulse = np.zeros(start + n)
        impulse[start : start + 1] = 1.0
        return self.response(impulse)[start:]

    def dc_gain(self) -> float:
        """The update that a constant gradient of 1 settles at, C (I - A)^-1 B + D; infinite for a pole at 1."""
        A, B, C, D = self.matrices()
        try:
            return float(C @ np.linalg.solve(np.eye(self.order) - A, B) + D)
        except np.linalg.LinAlgError:
            return float("inf")

    def transfer_function(self) -> tuple[np.ndarray, np.ndarray]:
        """Numerator and denominator of H(z) = C (zI - A)^-1 B + D in powers 1, z^-1, ..., z^-K; float64."""
        A, _, _, _ = self.matrices()
        return algebra.transfer_function(A, self.impulse_response(self.order + 1))

    def is_minimal(self) -> bool:
        """Whether no rule with fewer velocities has the same updates."""
        self.matrices()
        return algebra.is_minimal(self.impulse_response(2 * self.order + 1), self.order)

    def normal_form(self) -> algebra.NormalForm:
        r"""The rule of order one as `scale` times a quasi-hyperbolic rule: same updates, from the first on.

        With $H(z) = (h_0 + h_1 z^{-1})/(1 - a z^{-1})$: decay $= a$, scale $= (h_0 + h_1)/(1 - a)$,
        $\nu = 1 + h_1/(a\,\mathrm{scale})$. Its inverse is `quasi_hyperbolic(decay, nu).scale(scale)`.

        Raises:
          ValueError: If the order is not one, the pole is 0, or the gain at zero frequency is 0 or infinite.

        Reference:
          Ma and Yarats, ICLR 2019, arXiv:1810.06801, give the conversions for named methods.
        """
        rule = self.pruned()
        if rule.order != 1:
            raise ValueError(f"only a rule of order 1 has a quasi-hyperbolic form, got order {rule.order}")
        (h0, h1), (_, minus_a) = rule.transfer_function()
        a = -minus_a
        if a in (0, 1) or h0 + h1 == 0:
            raise ValueError(f"no quasi-hyperbolic form: pole {a} and gain {rule.dc_gain()} must not be 0 or infinite")
        scale = (h0 + h1) / (1 - a)
        return algebra.NormalForm(scale=float(scale), decay=float(a), nu=float(1 + h1 / (a * scale)))

    def _map(self, function: Callable[[Any], Any]) -> "Filter":
        """The filter with `function` of each entry; entries are not checked, they may be traced arrays."""
        new = object.__new__(Filter)
        object.__setattr__(new, "A", tuple(tuple(map(function, row)) for row in self.A))
        for name in ("B", "C", "lookahead"):
            object.__setattr__(new, name, tuple(map(function, getattr(self, name))))
        object.__setattr__(new, "D", function(self.D))
        return new


def _combine(matrix: np.ndarray, entries: Any) -> list[Coefficient]:
    """`matrix` times a vector of coefficients; zeros stay out, so that what is known stays known."""
    out: list[Coefficient] = []
    for row in matrix:
        terms = [(float(m), c) for m, c in zip(row, entries, strict=True) if m != 0 and not is_zero(c)]
        out.append(lift(partial(_weighted_sum, [m for m, _ in terms]), *(c for _, c in terms)))
    return out


def _weighted_sum(weights: list[float], *terms: Any) -> Any:
    return sum((w * term for w, term in zip(weights, terms, strict=True)), 0.0)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list) or getattr(value, "ndim", 0) > 0


def _rows(A: Any) -> tuple[tuple[Any, ...], ...]:
    if not _is_sequence(A):
        return ((A,),)
    if not all(_is_sequence(row) for row in A):
        raise ValueError(f"A must be a scalar or rows of scalars, got {_checks.shown(A)}")
    return tuple(tuple(row) for row in A)


def _vector(name: str, value: Any, length: int) -> tuple[Any, ...]:
    entries = tuple(value) if _is_sequence(value) else (value,)
    if len(entries) != length:
        raise ValueError(f"{name} must have {length} entries, one for each row of A, got {len(entries)}")
    return tuple(_entry(f"{name}[{i}]", x) for i, x in enumerate(entries))


def _entry(name: str, value: Any) -> Any:
    """A checked coefficient; numbers become Python floats, which take the precision of what they meet."""
    if isinstance(value, PerLeafSchedule):
        return value
    _checks.finite(name, value)
    return float(value) if _checks.is_number(value) else value
