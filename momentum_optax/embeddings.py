r"""Momentum for tables of which a step needs few rows: embeddings, equal to dense momentum.

A row without a gradient moves on under dense momentum, $\theta \leftarrow \theta - C v$, $v \leftarrow A v$, step after
step. Nothing else acts on it meanwhile, so that m such steps are one, in closed form,

$$ v \leftarrow A^m v, \qquad \theta \leftarrow \theta - C (I + A + \cdots + A^{m-1})\, v, $$

which is taken when the row is next read, and nothing is lost by waiting.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._export import serializable
from ._typing import DType
from .filters import Filter
from .filters.coefficients import Scalar, value_at
from .state.mismatch import ANYTHING, StateMismatchError, check_state
from .storage.protocol import SUPPORTED, arithmetic_dtype

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

_Bits: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]

# Steps are counted in int32.
_BITS = 31
_REMEDY = (
    "after flush of the old one, begin with init(table); a state restored without its class comes back by "
    "mo.checkpoint.from_fields(mo.checkpoint.fields(state), init(table))"
)

# More rows than this are taken in parts: the temporaries stay small, and rows that were given twice cost nothing.
_AT_ONCE = 4096


@serializable
class RowSparseState(NamedTuple):
    """The state of row-sparse momentum.

    Attributes:
      step: int32 scalar, the number of updates made.
      velocity: A tuple with one array like the table per velocity, in float32 or wider; row i as of step `last[i]`.
      last: int32, one entry per row: the number of updates that the row, in table and velocity, has been through.
    """

    step: jax.Array
    velocity: tuple[jax.Array, ...]
    last: jax.Array


_Kept: TypeAlias = tuple[jax.Array, RowSparseState]
_Carry: TypeAlias = tuple[jax.Array, jax.Array, RowSparseState]
# For the number of rows done: the next ones and their gradients.
_Pick: TypeAlias = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class RowSparse(NamedTuple):
    """The functions of a row-sparse optimizer of one table of shape (rows, ...); all of them pure.

    Attributes:
      init: `init(table) -> state`.
      read: `read(table, state, rows) -> values`, of shape `rows.shape + table.shape[1:]`: these rows as dense momentum
        would have them now. The model must use these, not `table[rows]`. `rows` holds integers, any number of times
        each; those outside the table give NaN.
      update: `update(table, state, gradient, rows=None, *, mask=None, size=None) -> (table, state)`, one step. The
        gradient is (a) that of the values that `read` gave for `rows`, summed where a row occurs more than once; (b) a
        BCOO array of the table's shape with sparse rows, without `rows`; (c) an array of the table's shape with `mask`,
        bool for each row, and `size`: rows are taken in parts of this size, which should be about the usual
        number. Rows outside the table, such as BCOO's padding, are left out.
      flush: `flush(table, state) -> (table, state)` with every row as dense momentum has it now: before the table is
        evaluated, saved or used as a whole. It reads and writes all of it.
    """

    init: Callable[[jax.Array], RowSparseState]
    read: Callable[[jax.Array, RowSparseState, jax.Array], jax.Array]
    update: Callable[..., tuple[jax.Array, RowSparseState]]
    flush: Callable[[jax.Array, RowSparseState], tuple[jax.Array, RowSparseState]]


def row_sparse(rule: Filter, learning_rate: Scalar) -> RowSparse:
    r"""Momentum of a table whose steps touch only the rows that they need, equal to dense momentum.

        table_momentum = mo.row_sparse(mo.heavy_ball(0.9), 0.1)
        state = table_momentum.init(table)
        ...
        values = table_momentum.read(table, state, tokens)          # (batch, length, width)
        gradient = jax.grad(loss)(values)                           # of the same shape: no gradient of the whole table
        table, state = table_momentum.update(table, state, gradient, tokens)
        ...
        table, state = table_momentum.flush(table, state)           # before the table is used as a whole

    With rows it has not touched caught up, the table is that of `chain(scale_by_learning_rate(rate),
    scale_by_momentum(rule))` for dense gradients, to rounding; at a constant rate that is `optax.sgd`. The rate enters
    with the gradient, so that a schedule needs no memory of the steps that a row missed. This is not what optimizers
    called lazy or sparse do elsewhere (TensorFlow's LazyAdam, PyTorch's SparseAdam): there a row without a gradient
    stands still, and its momentum with it, which is another method.

    Catching up multiplies powers of A for the bits of m, each computed in float64: m may be anything up to 2^31, and
    the error is a few units of rounding whatever it is. Give the table and the state to `jit` as donated arguments:
    else every step copies them whole.

    It does not pay where more than about a tenth of the rows have gradients at each step. Weight decay acts on every
    row at every step, and is not for these tables.

    Args:
      rule: A `Filter` whose coefficients are numbers, such as `heavy_ball(0.9)`.
      learning_rate: In [0, inf), a number, a scalar array or a schedule of the step.

    Returns:
      A `RowSparse`. Tables are of a float or complex dtype, and keep it.

    Raises:
      TypeError: If an argument has the wrong type; at `init` if the table has no rows axis or another dtype; at
        `update` if `rows` are not integers, `mask` is not of bool, or a real table gets a complex gradient.
      StateMismatchError: At `read`, `update` and `flush`, a `ValueError`, if the state is of another optimizer or rule,
        or of a table of another shape.
      ValueError: If the rule has a coefficient that is not a number, or `learning_rate` is out of range; at `init` if
        the table has no rows; at `update` if shapes do not fit, or what says which rows there are is missing or too
        much.

    Reference:
      Deferred updates: Carpenter, "Lazy sparse stochastic gradient descent for regularized multinomial logistic
      regression", 2008; Langford, Li and Zhang, JMLR 2009, arXiv:0806.4686; Duchi and Singer, JMLR 2009.
    """
    if not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    if not rule.is_constant:
        raise ValueError(
            f"rule must have numbers as coefficients, for closed forms of missed steps, got {_checks.shown(rule)}"
        )
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    table_momentum = _TableMomentum(rule.pruned(), learning_rate)
    return RowSparse(table_momentum.init, table_momentum.read, table_momentum.update, table_momentum.flush)


class _TableMomentum:
    """The functions of a `RowSparse`."""

    def __init__(self, rule: Filter, learning_rate: Scalar) -> None:
        self.rule, self.learning_rate, self.powers = rule, learning_rate, _powers(rule)

    def init(self, table: jax.Array) -> RowSparseState:
        """See `RowSparse`."""
        _check_table(table)
        dtype = arithmetic_dtype(table.dtype)
        velocity = tuple(jnp.zeros_like(table, dtype=dtype) for _ in range(self.rule.order))
        return RowSparseState(jnp.zeros([], jnp.int32), velocity, jnp.zeros(table.shape[:1], jnp.int32))

    def moved(
        self, table: jax.Array, velocity: tuple[jax.Array, ...], missed: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Rows of the table, in the arithmetic's dtype, and of the velocities, `missed` idle steps later."""
        if not velocity:
            return table.astype(arithmetic_dtype(table.dtype)), ()
        dtype = velocity[0].dtype
        A, c = _after(self.powers, missed, jnp.finfo(dtype).dtype)
        column = (*missed.shape, *(1,) * (table.ndim - missed.ndim))
        A, c = A.reshape(*A.shape[:2], *column), c.reshape(len(c), *column)
        return table.astype(dtype) - _combined(c, velocity), tuple(_combined(row, velocity) for row in A)

    def read(self, table: jax.Array, state: RowSparseState, rows: jax.Array) -> jax.Array:
        """See `RowSparse`."""
        table, state = _fitted(table, state, self.rule)
        rows = _checked_rows(rows, table)
        missed = state.step - _take(state.last, rows)
        values, _ = self.moved(_take(table, rows), tuple(_take(v, rows) for v in state.velocity), missed)
        return values.astype(table.dtype)

    def step_rows(
        self, table: jax.Array, state: RowSparseState, gradient: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, RowSparseState]:
        """One step of rows that are sorted and different, some beyond the end; `step` of the state stays."""
        missed = state.step + 1 - _take(state.last, rows)
        values, velocity = self.moved(_take(table, rows), tuple(_take(v, rows) for v in state.velocity), missed)
        rate = jnp.asarray(value_at(self.learning_rate, state.step), jnp.finfo(values.dtype).dtype)
        g = rate * gradient.astype(values.dtype)
        B, D = cast("tuple[float, ...]", self.rule.B), cast(float, self.rule.D)
        velocity = tuple(v + b * g for v, b in zip(velocity, B, strict=True))
        return _put(table, rows, values - D * g), RowSparseState(
            state.step,
            tuple(_put(old, rows, new) for old, new in zip(state.velocity, velocity, strict=True)),
            _put(state.last, rows, jnp.full(rows.shape, state.step + 1)),
        )

    def update(
        self,
        table: jax.Array,
        state: RowSparseState,
        gradient: "jax.Array | BCOO",
        rows: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        size: int | None = None,
    ) -> tuple[jax.Array, RowSparseState]:
        """See `RowSparse`."""
        table, state = _fitted(table, state, self.rule)
        if mask is not None:
            if rows is not None:
                raise ValueError("rows must be None with a mask, got both")
            gradient, mask = _checked_gradient(gradient, table), jnp.asarray(mask)
            parts = _in_mask(gradient, mask, _checked_size(gradient, mask, size, table))
            table, state = _in_parts(self.step_rows, (table, state), *parts)
        else:
            if size is not None:
                raise ValueError(f"size is the number of rows of a mask, got {_checks.shown(size)} without one")
            if not isinstance(gradient, jax.Array) and hasattr(gradient, "n_sparse"):
                rows, gradient = _from_bcoo(gradient, rows, table)
            if rows is None:
                raise ValueError("rows or mask must say which rows the gradient is for, got neither")
            gradient, rows = _summed(_checked_gradient(gradient, table), _checked_rows(rows, table), table)
            if rows.size <= _AT_ONCE:
                table, state = self.step_rows(table, state, gradient, rows)
            else:
                table, state = _in_parts(self.step_rows, (table, state), *_in_list(rows, gradient, len(table)))
        return table, state._replace(step=optax.safe_increment(state.step))

    def flush(self, table: jax.Array, state: RowSparseState) -> tuple[jax.Array, RowSparseState]:
        """See `RowSparse`."""
        table, state = _fitted(table, state, self.rule)
        values, velocity = self.moved(table, state.velocity, state.step - state.last)
        return values.astype(table.dtype), RowSparseState(state.step, velocity, jnp.full_like(state.last, state.step))


def _fitted(table: jax.Array, state: RowSparseState, rule: Filter) -> tuple[jax.Array, RowSparseState]:
    """Table and state as arrays of JAX; raises unless the state is of such a table, and of a rule of this order."""
    _check_table(table)
    check_state(state, RowSparseState(ANYTHING, (ANYTHING,) * rule.order, ANYTHING), _REMEDY)
    # Restored from a file they may be NumPy's, which have no `at`.
    table, state = jax.tree.map(jnp.asarray, (table, state))
    kept = [x.shape for x in (state.last, *state.velocity)]
    if kept != [table.shape[:1], *[table.shape] * rule.order]:
        raise StateMismatchError(f"the state must be of a table of shape {table.shape}, got arrays of shapes {kept}")
    return table, state


def _powers(rule: Filter) -> tuple[np.ndarray, np.ndarray]:
    """A^m and C (I + A + ... + A^(m-1)) for m = 1, 2, 4, ...; float64, shapes (31, K, K) and (31, K)."""
    A, _, C, _ = rule.matrices()
    turns, moves = [A], [C]
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(_BITS - 1):
            moves.append(moves[-1] + moves[-1] @ turns[-1])
            turns.append(turns[-1] @ turns[-1])
    return np.array(turns), np.array(moves)


def _after(powers: tuple[np.ndarray, np.ndarray], missed: jax.Array, dtype: DType) -> tuple[jax.Array, jax.Array]:
    """A^m and C (I + ... + A^(m-1)) for an array of m, of shapes (K, K, ...) and (K, ...): one power for each bit."""
    turns, moves = (jnp.asarray(power, dtype) for power in powers)
    order = moves.shape[1]
    one = (..., *(None,) * missed.ndim)

    def take_bit(carry: _Bits) -> _Bits:
        bit, A, c = carry
        # First what has been taken so far, then these 2^bit steps. No dot products: they are not in float32 everywhere.
        turned = jnp.sum(turns[bit][one][:, :, None] * A[None], 1)
        went = c + jnp.sum(moves[bit][one][:, None] * A, 0)
        taken = (missed >> bit) & 1 == 1
        return bit + 1, jnp.where(taken, turned, A), jnp.where(taken, went, c)

    # Of a type that the loop keeps: under `shard_map` constants have another.
    zero = (missed - missed).astype(dtype)[None]
    start = (jnp.int32(0), jnp.eye(order, dtype=dtype)[one] + zero[None], jnp.zeros(order, dtype)[one] + zero)
    longest = jnp.max(missed, initial=0)
    _, A, c = jax.lax.while_loop(lambda carry: (longest >> carry[0]) > 0, take_bit, start)
    return A, c


def _combined(weights: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
    """The weighted sum."""
    terms: list[jax.Array] = [w * x for w, x in zip(weights, arrays, strict=True)]
    return functools.reduce(operator.add, terms)


def _take(array: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[rows].get(mode="fill", fill_value=0 if array.dtype == jnp.int32 else np.nan)


def _put(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    values = values.astype(array.dtype)
    return array.at[rows].set(values, mode="drop", indices_are_sorted=True, unique_indices=True)


def _summed(gradient: jax.Array, rows: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients summed for each different row, and these rows in their order; places left over lie beyond the end."""
    shape = (*rows.shape, *table.shape[1:])
    if gradient.shape != shape:
        raise ValueError(f"the gradient for rows of shape {rows.shape} must have shape {shape}, got {gradient.shape}")
    rows, gradient = rows.reshape(-1), gradient.reshape(-1, *table.shape[1:])
    total, n = table.shape[0], rows.size
    different, place = jnp.unique(rows, return_inverse=True, size=n, fill_value=total)
    wide = gradient.astype(arithmetic_dtype(gradient.dtype))
    return jax.ops.segment_sum(wide, place.reshape(-1), n), _spread(different, total)


def _spread(rows: jax.Array, total: int) -> jax.Array:
    """Rows beyond the end made different from each other."""
    return jnp.where(rows >= total, total + jnp.arange(rows.size, dtype=rows.dtype), rows)


def _in_parts(
    step_rows: Callable[[jax.Array, RowSparseState, jax.Array, jax.Array], _Kept],
    kept: _Kept,
    count: jax.Array,
    pick: _Pick,
) -> _Kept:
    """The step of `count` rows, some at a time, in `kept`, the whole table and state."""

    def body(carry: _Carry) -> _Carry:
        done, table, state = carry
        rows, gradient = pick(done)
        return done + rows.size, *step_rows(table, state, gradient, _spread(rows, len(table)))

    _, table, state = jax.lax.while_loop(lambda carry: carry[0] < count, body, (jnp.zeros_like(count), *kept))
    return table, state


def _in_mask(gradient: jax.Array, mask: jax.Array, size: int) -> tuple[jax.Array, _Pick]:
    """The number of rows in a mask, and the function that gives the next `size` of them."""
    count = jnp.cumsum(mask, dtype=jnp.int32)

    def pick(done: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.searchsorted(count, done + 1 + jnp.arange(size, dtype=jnp.int32)).astype(jnp.int32)
        return rows, gradient.at[rows].get(mode="fill", fill_value=0)

    return jnp.sum(mask, dtype=jnp.int32), pick


def _in_list(rows: jax.Array, gradient: jax.Array, total: int) -> tuple[jax.Array, _Pick]:
    """The same for sorted rows, those beyond the end left out."""

    def pick(done: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = done + jnp.arange(_AT_ONCE, dtype=jnp.int32)
        return rows.at[places].get(mode="fill", fill_value=total), gradient.at[places].get(mode="fill", fill_value=0)

    return jnp.sum(rows < total, dtype=jnp.int32), pick


def _check_table(table: jax.Array) -> None:
    if not hasattr(table, "dtype") or str(table.dtype) not in SUPPORTED:
        raise TypeError(f"table must be an array with a dtype of {', '.join(SUPPORTED)}, got {_checks.shown(table)}")
    if len(table.shape) == 0:
        raise TypeError("table must have an axis of rows, got a scalar")
    if table.shape[0] == 0:
        raise ValueError(f"table must have at least one row, got shape {table.shape}")


def _checked_gradient(gradient: "jax.Array | BCOO", table: jax.Array) -> jax.Array:
    """The gradient as an array, real for a real table."""
    if gradient is None:
        raise TypeError("gradient must be an array or a BCOO array, got None: without one leave the update out")
    gradient = jnp.asarray(gradient)
    if jnp.iscomplexobj(gradient) and not jnp.iscomplexobj(table):
        raise TypeError(f"the gradient of a real table must be real, got {gradient.dtype}")
    return gradient


def _checked_rows(rows: jax.Array, table: jax.Array) -> jax.Array:
    """Rows as integers; negative ones are moved beyond the end, where they are left out."""
    rows = jnp.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.int32))
    return jnp.where(rows < 0, table.shape[0], rows)


def _checked_size(gradient: jax.Array, mask: jax.Array, size: int | None, table: jax.Array) -> int:
    """The number of rows to take at a time from a mask that fits its table."""
    if jnp.shape(gradient) != table.shape:
        raise ValueError(f"the gradient with a mask must have the table's shape {table.shape}, got {gradient.shape}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be of bool, got {mask.dtype}")
    if mask.shape != table.shape[:1]:
        raise ValueError(f"mask must have one entry for each row, {table.shape[:1]}, got {mask.shape}")
    if size is None:
        raise ValueError("size must be given with a mask: the usual number of rows in it")
    _checks.integer("size", size, 1)
    return int(size)


def _from_bcoo(gradient: "BCOO", rows: jax.Array | None, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows and their gradients of a BCOO array."""
    if rows is not None:
        raise ValueError("rows must be None for a BCOO gradient, which has its own")
    if gradient.shape != table.shape or (gradient.n_batch, gradient.n_sparse) != (0, 1):
        raise ValueError(
            f"a BCOO gradient must have the table's shape {table.shape} and sparse rows alone (n_batch=0, "
            f"n_dense={len(table.shape) - 1}), got {gradient.shape}, n_batch={gradient.n_batch}, "
            f"n_dense={gradient.n_dense}"
        )
    return gradient.indices[:, 0], gradient.data
