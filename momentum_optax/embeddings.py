r"""Momentum for tables of which a step needs few rows: embeddings, equal to dense momentum.

A row without a gradient moves on under dense momentum, $\theta \leftarrow \theta - C v$, $v \leftarrow A v$, step after
step. Nothing else acts on it meanwhile, so that m such steps are one, in closed form,

$$ v \leftarrow A^m v, \qquad \theta \leftarrow \theta - C (I + A + \cdots + A^{m-1})\, v, $$

which is taken when the row is next read, and nothing is lost by waiting.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._export import serializable
from .filters import Filter
from .filters.coefficients import Scalar, value_at
from .storage.protocol import SUPPORTED, arithmetic_dtype

# Steps are counted in int32.
_BITS = 31


# More rows than this are taken in parts: the temporaries stay small, and rows that were given twice cost nothing.
_AT_ONCE = 4096


@serializable
class RowSparseState(NamedTuple):
    """What row-sparse momentum keeps.

    Attributes:
      step: int32 scalar, the number of updates made.
      velocity: A tuple with one array like the table per velocity, in float32 or wider; row i as of step `last[i]`.
      last: int32, one entry per row: the number of updates that the row, in table and velocity, has been through.
    """

    step: Any
    velocity: tuple[Any, ...]
    last: Any


class RowSparse(NamedTuple):
    """The functions of a row-sparse optimizer of one table of shape (rows, ...); all of them pure.

    Attributes:
      init: `init(table) -> state`.
      read: `read(table, state, rows) -> values`, of shape `rows.shape + table.shape[1:]`: these rows as dense momentum
        would have them now. The model must use these, not `table[rows]`. `rows` holds integers, any number of times
        each; those that are no rows of the table give NaN.
      update: `update(table, state, gradient, rows=None, *, mask=None, size=None) -> (table, state)`, one step. The
        gradient is (a) that of the values that `read` gave for `rows`, summed where a row occurs more than once; (b) a
        BCOO array of the table's shape with sparse rows, without `rows`; (c) an array of the table's shape with `mask`,
        bool for each row, and `size`: rows are taken so many at a time, so that it should be about what is usual. What
        lies outside the table, BCOO's padding say, is left out.
      flush: `flush(table, state) -> (table, state)` with every row as dense momentum has it now: before the table is
        evaluated, saved or used as a whole. It reads and writes all of it.
    """

    init: Callable[[Any], RowSparseState]
    read: Callable[[Any, RowSparseState, Any], Any]
    update: Callable[..., tuple[Any, RowSparseState]]
    flush: Callable[[Any, RowSparseState], tuple[Any, RowSparseState]]


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
        `update` if `rows` are no integers, or `mask` is not of bool.
      ValueError: If the rule has a coefficient that is not a number, or `learning_rate` is out of range; at `update` if
        shapes do not fit, or what says which rows there are is missing or too much.

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
    rule = rule.pruned()
    powers = _powers(rule)

    def init(table: Any) -> RowSparseState:
        _check_table(table)
        dtype = arithmetic_dtype(table.dtype)
        velocity = tuple(jnp.zeros_like(table, dtype=dtype) for _ in range(rule.order))
        return RowSparseState(jnp.zeros([], jnp.int32), velocity, jnp.zeros(table.shape[:1], jnp.int32))

    def moved(table: Any, velocity: tuple[Any, ...], missed: Any) -> tuple[Any, tuple[Any, ...]]:
        """Rows of the table, in the arithmetic's dtype, and of the velocities after so many steps of no gradient."""
        if not velocity:
            return table.astype(arithmetic_dtype(table.dtype)), ()
        dtype = velocity[0].dtype
        A, c = _after(powers, missed, jnp.finfo(dtype).dtype)
        column = (*missed.shape, *(1,) * (table.ndim - missed.ndim))
        A, c = A.reshape(*A.shape[:2], *column), c.reshape(len(c), *column)
        return table.astype(dtype) - _combined(c, velocity), tuple(_combined(row, velocity) for row in A)

    def read(table: Any, state: RowSparseState, rows: Any) -> Any:
        rows = _checked_rows(rows, table)
        missed = state.step - _take(state.last, rows)
        values, _ = moved(_take(table, rows), tuple(_take(v, rows) for v in state.velocity), missed)
        return values.astype(table.dtype)

    def step_rows(table: Any, state: RowSparseState, gradient: Any, rows: Any) -> tuple[Any, RowSparseState]:
        """One step of rows that are sorted and different, some beyond the end; `step` of the state stays."""
        missed = state.step + 1 - _take(state.last, rows)
        values, velocity = moved(_take(table, rows), tuple(_take(v, rows) for v in state.velocity), missed)
        rate = jnp.asarray(value_at(learning_rate, state.step), jnp.finfo(values.dtype).dtype)
        g = rate * gradient.astype(values.dtype)
        velocity = tuple(v + b * g for v, b in zip(velocity, rule.B, strict=True))
        return _put(table, rows, values - rule.D * g), RowSparseState(
            state.step,
            tuple(_put(old, rows, new) for old, new in zip(state.velocity, velocity, strict=True)),
            _put(state.last, rows, jnp.full(rows.shape, state.step + 1)),
        )

    def update(
        table: Any, state: RowSparseState, gradient: Any, rows: Any = None, *, mask: Any = None, size: Any = None
    ) -> tuple[Any, RowSparseState]:
        if mask is not None:
            if rows is not None:
                raise ValueError("rows must be None with a mask, got both")
            _check_mask(gradient, mask, size, table)
            table, state = _in_parts(step_rows, (table, state), *_in_mask(gradient, mask, int(size)))
        else:
            rows, gradient = _from_bcoo(gradient, rows, table) if hasattr(gradient, "n_sparse") else (rows, gradient)
            if rows is None:
                raise ValueError("rows or mask must say which rows the gradient is for, got neither")
            gradient, rows = _summed(gradient, _checked_rows(rows, table), table)
            if rows.size <= _AT_ONCE:
                table, state = step_rows(table, state, gradient, rows)
            else:
                table, state = _in_parts(step_rows, (table, state), *_in_list(rows, gradient, len(table)))
        return table, state._replace(step=optax.safe_increment(state.step))

    def flush(table: Any, state: RowSparseState) -> tuple[Any, RowSparseState]:
        values, velocity = moved(table, state.velocity, state.step - state.last)
        return values.astype(table.dtype), RowSparseState(state.step, velocity, jnp.full_like(state.last, state.step))

    return RowSparse(init, read, update, flush)


def _powers(rule: Filter) -> tuple[np.ndarray, np.ndarray]:
    """A^m and C (I + A + ... + A^(m-1)) for m = 1, 2, 4, ...; float64, shapes (31, K, K) and (31, K)."""
    A, _, C, _ = rule.matrices()
    turns, moves = [A], [C]
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(_BITS - 1):
            moves.append(moves[-1] + moves[-1] @ turns[-1])
            turns.append(turns[-1] @ turns[-1])
    return np.array(turns), np.array(moves)


def _after(powers: tuple[np.ndarray, np.ndarray], missed: Any, dtype: Any) -> tuple[Any, Any]:
    """A^m and C (I + ... + A^(m-1)) for an array of m, of shapes (K, K, ...) and (K, ...): one power for each bit."""
    turns, moves = (jnp.asarray(power, dtype) for power in powers)
    order = moves.shape[1]
    one = (..., *(None,) * missed.ndim)

    def take_bit(carry: Any) -> Any:
        bit, A, c = carry
        # First what has been taken so far, then these 2^bit steps. No dot products: they are not in float32 everywhere.
        turned = jnp.sum(turns[bit][one][:, :, None] * A[None], 1)
        went = c + jnp.sum(moves[bit][one][:, None] * A, 0)
        taken = (missed >> bit) & 1 == 1
        return bit + 1, jnp.where(taken, turned, A), jnp.where(taken, went, c)

    A = jnp.broadcast_to(jnp.eye(order, dtype=dtype)[one], (order, order, *missed.shape))
    start = (jnp.int32(0), A, jnp.zeros((order, *missed.shape), dtype))
    longest = jnp.max(missed, initial=0)
    _, A, c = jax.lax.while_loop(lambda carry: (longest >> carry[0]) > 0, take_bit, start)
    return A, c


def _combined(weights: Any, arrays: Any) -> Any:
    """The weighted sum."""
    terms = [w * x for w, x in zip(weights, arrays, strict=True)]
    return sum(terms[1:], terms[0])


def _take(array: Any, rows: Any) -> Any:
    return array.at[rows].get(mode="fill", fill_value=0 if array.dtype == jnp.int32 else np.nan)


def _put(array: Any, rows: Any, values: Any) -> Any:
    options = {"mode": "drop", "indices_are_sorted": True, "unique_indices": True}
    return array.at[rows].set(values.astype(array.dtype), **options)


def _summed(gradient: Any, rows: Any, table: Any) -> tuple[Any, Any]:
    """Gradients summed for each different row, and these rows in their order; places left over lie beyond the end."""
    gradient = jnp.asarray(gradient)
    shape = (*rows.shape, *table.shape[1:])
    if gradient.shape != shape:
        raise ValueError(f"the gradient for rows of shape {rows.shape} must have shape {shape}, got {gradient.shape}")
    rows, gradient = rows.reshape(-1), gradient.reshape(-1, *table.shape[1:])
    total, n = table.shape[0], rows.size
    different, place = jnp.unique(rows, return_inverse=True, size=n, fill_value=total)
    wide = gradient.astype(arithmetic_dtype(gradient.dtype))
    return jax.ops.segment_sum(wide, place.reshape(-1), n), _spread(different, total)


def _spread(rows: Any, total: int) -> Any:
    """Rows beyond the end made different from each other."""
    return jnp.where(rows >= total, total + jnp.arange(rows.size, dtype=rows.dtype), rows)


def _in_parts(step_rows: Callable[..., Any], carry: Any, count: Any, pick: Callable[[Any], Any]) -> Any:
    """The step of `count` rows, some at a time; `pick(done)` gives the next and their gradients, `carry` holds all."""

    def body(carry: Any) -> Any:
        done, table, state = carry
        rows, gradient = pick(done)
        return done + rows.size, *step_rows(table, state, gradient, _spread(rows, len(table)))

    return jax.lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), *carry))[1:]


def _in_mask(gradient: Any, mask: Any, size: int) -> tuple[Any, Callable[[Any], Any]]:
    """How many rows are in a mask, and what gives the next `size` of them."""
    count = jnp.cumsum(mask, dtype=jnp.int32)

    def pick(done: Any) -> Any:
        rows = jnp.searchsorted(count, done + 1 + jnp.arange(size, dtype=jnp.int32)).astype(jnp.int32)
        return rows, gradient.at[rows].get(mode="fill", fill_value=0)

    return jnp.sum(mask, dtype=jnp.int32), pick


def _in_list(rows: Any, gradient: Any, total: int) -> tuple[Any, Callable[[Any], Any]]:
    """The same for sorted rows, those beyond the end left out."""

    def pick(done: Any) -> Any:
        places = done + jnp.arange(_AT_ONCE, dtype=jnp.int32)
        return rows.at[places].get(mode="fill", fill_value=total), gradient.at[places].get(mode="fill", fill_value=0)

    return jnp.sum(rows < total, dtype=jnp.int32), pick


def _check_table(table: Any) -> None:
    if not hasattr(table, "dtype") or str(table.dtype) not in SUPPORTED:
        raise TypeError(f"table must be an array with a dtype of {', '.join(SUPPORTED)}, got {_checks.shown(table)}")
    if len(table.shape) == 0:
        raise TypeError("table must have an axis of rows, got a scalar")


def _checked_rows(rows: Any, table: Any) -> Any:
    """Rows as integers; negative ones, which are none, lie beyond the end."""
    rows = jnp.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.int32))
    return jnp.where(rows < 0, table.shape[0], rows)


def _check_mask(gradient: Any, mask: Any, size: Any, table: Any) -> None:
    if jnp.shape(gradient) != table.shape:
        raise ValueError(f"the gradient with a mask must have the table's shape {table.shape}, got {gradient.shape}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be of bool, got {mask.dtype}")
    if mask.shape != table.shape[:1]:
        raise ValueError(f"mask must have one entry for each row, {table.shape[:1]}, got {mask.shape}")
    if size is None:
        raise ValueError("size must be given with a mask: the usual number of rows in it")
    _checks.integer("size", size, 1)


def _from_bcoo(gradient: Any, rows: Any, table: Any) -> tuple[Any, Any]:
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
