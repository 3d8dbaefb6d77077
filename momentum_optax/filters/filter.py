r"""`Filter`: a momentum rule as data, a linear filter in state space.

A rule with K velocities per parameter reads its state, then writes it:

    u_t = C v_t + D g_t        v_{t+1} = A v_t + B g_t        v_0 = 0

Trees, dtypes and JAX belong to the transformation that runs a rule; the algebra here is NumPy's, in float64.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeGuard, cast

import numpy as np

from .. import _checks
from . import algebra
from .coefficients import Coefficient, PerLeafSchedule, common_period, is_zero, lift, value_at

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .._typing import Count

# What the constructor takes: entries, or a scalar for one velocity.
Vector: TypeAlias = "Coefficient | Sequence[Coefficient]"
Matrix: TypeAlias = "Coefficient | Sequence[Sequence[Coefficient]]"


@dataclasses.dataclass(frozen=True, eq=False, init=False)
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
      TypeError: If an entry is not a number, a scalar array, a schedule or a `PerLeafSchedule`.

    Reference:
      Lessard, Recht and Packard, "Analysis and design of optimization algorithms via integral quadratic
      constraints", SIAM J. Optim. 2016, arXiv:1408.3595 (optimizers as linear systems in feedback).
    """

    A: tuple[tuple[Coefficient, ...], ...]
    B: tuple[Coefficient, ...]
    C: tuple[Coefficient, ...]
    D: Coefficient
    lookahead: tuple[Coefficient, ...]

    def __init__(self, A: Matrix, B: Vector, C: Vector, D: Coefficient, lookahead: Vector = 0.0) -> None:
        rows = _rows(A)
        K = len(rows)
        fields = {
            "A": tuple(tuple(_entry(f"A[{i}][{j}]", x) for j, x in enumerate(row)) for i, row in enumerate(rows)),
            "B": _vector("B", B, K),
            "C": _vector("C", C, K),
            "D": _entry("D", D),
            "lookahead": _vector("lookahead", (0.0,) * K if is_zero(lookahead) else lookahead, K),
        }
        if any(len(row) != K for row in rows):
            raise ValueError(f"A must be square, got rows of length {[len(row) for row in rows]} for {K} rows")
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> NoReturn:
        """Explain how to run a rule where Optax asks for a transformation: in `chain`, `masked`, `MultiSteps`, ...

        The error is an `AttributeError`, so that `hasattr` works.
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
        """Whether every coefficient is a plain number, those of `lookahead` included."""
        return all(_checks.is_number(c) for c in (*self.coefficients(), *self.lookahead))

    @property
    def reads_step(self) -> bool:
        """Whether a coefficient depends on the step, one of `lookahead` perhaps."""
        each = (*self.coefficients(), *self.lookahead)
        return any(c.reads_step if isinstance(c, PerLeafSchedule) else callable(c) for c in each)

    @property
    def period(self) -> int | None:
        """The steps after which all coefficients repeat, `lookahead` included, in a leaf that is past its first steps.

        1 if none depends on the step. None if one does that is not known to repeat: schedules with a period, such as
        `schedules.restarted(schedule, 10)`, say so, any other function does not.
        """
        return common_period((*self.coefficients(), *self.lookahead))

    @property
    def reads_age(self) -> bool:
        """Whether a coefficient depends on the number of gradients that a leaf has received."""
        return any(isinstance(c, PerLeafSchedule) for c in self.coefficients())

    def coefficients(self) -> list[Coefficient]:
        """The entries of A, B, C and D in one list."""
        return [c for row in self.A for c in row] + [*self.B, *self.C, self.D]

    def at(self, step: "Count | None", age: "Count | None" = None) -> "Filter":
        """The rule with the values of its coefficients at `step`: Python floats for an int, JAX values for a tracer.

        Args:
          step: The number of updates made before this one; None if no coefficient reads it.
          age: The number of gradients that the leaf received before this one; `step` if None.
        """
        return self._map(lambda c: value_at(c, step, age))

    def scale(self, gain: Coefficient) -> "Filter":
        """The rule with its update multiplied by `gain`: `scale(a)` at learning rate `r` is the rule at `a r`.

        Args:
          gain: A coefficient; a number must be finite.
        """
        gain = _entry("gain", gain)
        times = [lift(lambda x, y: x * y, c, gain) for c in (*self.C, self.D, *self.lookahead)]
        K = self.order
        return type(self)(self.A, self.B, tuple(times[:K]), times[K], tuple(times[K + 1 :]))

    def scale_gradient(self, gain: Coefficient) -> "Filter":
        """The rule with each gradient multiplied by the `gain` of its step.

        For methods whose learning rate multiplies the gradient before it enters the velocity.

        Args:
          gain: A coefficient; a number must be finite.
        """
        gain = _entry("gain", gain)
        B = tuple(lift(lambda b, x: b * x, b, gain) for b in self.B)
        return type(self)(self.A, B, self.C, lift(lambda d, x: d * x, self.D, gain), self.lookahead)

    def change_basis(self, T: "ArrayLike") -> "Filter":
        """The same rule in other velocities w, where v = T w: $T^{-1} A T$, $T^{-1} B$, $C T$ and D.

        Args:
          T: Invertible, K rows of K numbers; a scalar for K = 1.

        Raises:
          ValueError: If T has another shape, entries that are no numbers, or no inverse.
        """
        K = self.order
        try:
            basis = np.asarray(T, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"T must be {K} rows of {K} numbers, got {_checks.shown(T)}") from error
        if basis.ndim == 0 or basis.size == 0:
            basis = basis.reshape(basis.size, basis.size)
        if basis.shape != (K, K):
            raise ValueError(f"T must be {K} rows of {K} numbers, got shape {basis.shape}")
        if K and not (np.all(np.isfinite(basis)) and np.linalg.cond(basis) < 1e15):
            raise ValueError(f"T must be invertible, got {_checks.shown(T)}")
        inverse = np.linalg.inv(basis)
        AT = [_combine(basis.T, row) for row in self.A]
        columns = [_combine(inverse, [row[j] for row in AT]) for j in range(self.order)]
        return type(self)(
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
        return type(self)(
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
        unknown = [c for c in self.coefficients() if not _checks.is_number(c)]
        if unknown:
            raise ValueError(
                f"the coefficients must be numbers here, got {_checks.shown(unknown[0])}; take rule.at(step) of a "
                "scheduled rule"
            )
        A = np.asarray(self.A, np.float64).reshape(self.order, self.order)
        D = float(np.asarray(self.D, np.float64))
        return A, np.asarray(self.B, np.float64), np.asarray(self.C, np.float64), D

    def response(self, signal: "ArrayLike") -> np.ndarray:
        """The updates u_0, u_1, ... for the gradients `signal`, starting from velocity zero; float64.

        Args:
          signal: Real, of shape (n,) or (n, ...), one gradient per step from step 0.

        Returns:
          An array of the shape of `signal`.

        Raises:
          ValueError: If `signal` has no axis of steps.
          TypeError: If it is complex.
        """
        if np.iscomplexobj(signal):
            raise TypeError(f"signal must be real, got {_checks.shown(signal)}")
        signal = np.asarray(signal, np.float64)
        if signal.ndim == 0:
            raise ValueError(f"signal must have an axis of steps, such as [1.0, 0.0], got {signal}")
        v = np.zeros((self.order, *signal.shape[1:]))
        out = np.zeros(signal.shape)
        for t, g in enumerate(signal):
            A, B, C, D = self._map(partial(_float_at, step=t)).matrices()
            out[t] = np.tensordot(C, v, 1) + D * g
            v = np.tensordot(A, v, 1) + np.multiply.outer(B, g)
        return out

    def impulse_response(self, n: int, start: int = 0) -> np.ndarray:
        """The `n` updates from step `start` on for a gradient that is 1 at that step and 0 elsewhere; float64.

        For constant coefficients this is D, C B, C A B, C A^2 B, ... for any `start`.
        """
        _checks.integer("n", n, 0)
        _checks.integer("start", start, 0)
        impulse = np.zeros(start + n)
        impulse[start : start + 1] = 1.0
        return self.response(impulse)[start:]

    def dc_gain(self) -> float:
        """The limit of the update for a constant gradient of 1, C (I - A)^-1 B + D.

        Infinite for a pole at 1 or outside the unit circle. With other poles on the circle it is what the update swings
        about.
        """
        A, B, C, D = self.pruned().matrices()
        if algebra.grows(A):
            return float("inf")
        try:
            return float(C @ np.linalg.solve(np.eye(len(B)) - A, B) + D)
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
        r"""A rule of order one as `scale` times a quasi-hyperbolic rule with the same updates, the first included.

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

    def _map(self, function: Callable[[Coefficient], Coefficient]) -> "Filter":
        """The filter with `function` of each entry; the results are not checked, since they may be traced."""
        # One that stands in several places is computed once, and stays one object.
        different = {id(c): c for c in (*self.coefficients(), *self.lookahead)}
        once = {key: function(c) for key, c in different.items()}
        new = object.__new__(type(self))
        object.__setattr__(new, "A", tuple(tuple(once[id(c)] for c in row) for row in self.A))
        for name in ("B", "C", "lookahead"):
            object.__setattr__(new, name, tuple(once[id(c)] for c in getattr(self, name)))
        object.__setattr__(new, "D", once[id(self.D)])
        return new


class BeforeSign(Filter):
    """A rule whose update only the sign is taken of, so that storages round velocities relative to themselves.

    So are those that its methods make of it, such as `scale`: no gain changes what a sign needs of a velocity.
    """


def before_sign(rule: Filter) -> BeforeSign:
    """The same rule, followed by a sign."""
    return BeforeSign(rule.A, rule.B, rule.C, rule.D, rule.lookahead)


def _float_at(coefficient: Coefficient, step: int) -> float:
    return float(value_at(coefficient, step))


def _combine(matrix: np.ndarray, entries: Sequence[Coefficient]) -> list[Coefficient]:
    """`matrix` times a vector of coefficients, without the terms that are 0, so that a number stays a number."""
    out: list[Coefficient] = []
    for row in matrix:
        terms = [(float(m), c) for m, c in zip(row, entries, strict=True) if m != 0 and not is_zero(c)]
        out.append(lift(partial(_weighted_sum, [m for m, _ in terms]), *(c for _, c in terms)))
    return out


def _weighted_sum(weights: list[float], *terms: Any) -> Any:
    return sum((w * term for w, term in zip(weights, terms, strict=True)), 0.0)


def _is_sequence(value: object) -> TypeGuard[Iterable[Any]]:
    return isinstance(value, tuple | list) or getattr(value, "ndim", 0) > 0


def _rows(A: object) -> tuple[tuple[Any, ...], ...]:
    if not _is_sequence(A):
        return ((A,),)
    if not all(_is_sequence(row) for row in A):
        raise ValueError(f"A must be a scalar or rows of scalars, got {_checks.shown(A)}")
    return tuple(tuple(row) for row in A)


def _vector(name: str, value: object, length: int) -> tuple[Coefficient, ...]:
    entries = tuple(value) if _is_sequence(value) else (value,)
    if len(entries) != length:
        raise ValueError(f"{name} must have {length} entries, one for each row of A, got {len(entries)}")
    return tuple(_entry(f"{name}[{i}]", x) for i, x in enumerate(entries))


def _entry(name: str, value: object) -> Coefficient:
    """A checked coefficient; numbers become Python floats, which do not widen the dtype that they multiply."""
    if isinstance(value, PerLeafSchedule):
        return value
    _checks.finite(name, value)
    return float(value) if _checks.is_number(value) else cast("Coefficient", value)
