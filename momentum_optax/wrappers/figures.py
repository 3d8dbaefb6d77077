"""`Figures` of `monitor`, and how a step is measured: every array is read once, and summed in float32."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._export import serializable
from .._tree import Leaves, absent
from ..storage.protocol import arithmetic_dtype
from ..storage.rows import row_axes
from .observed import decoded_velocities, in_full_precision, stored_velocities

# At most twice this number of elements are summed one by one.
_LONGEST = 4096

Step = Callable[[optax.OptState, optax.Updates], tuple[optax.Updates, optax.OptState]]


@serializable
class Figures(NamedTuple):
    """The last measurement of `monitor`, in float32; see there. N entries are one for each velocity.

    Attributes:
      gradient_norm: Scalar.
      effective_learning_rate: Scalar.
      velocity_norm: N entries.
      cosine: N entries.
      quantization_error: N entries.
      stalled: N entries.
    """

    gradient_norm: jax.Array
    effective_learning_rate: jax.Array
    velocity_norm: jax.Array
    cosine: jax.Array
    quantization_error: jax.Array
    stalled: jax.Array


class _LeafVelocity(NamedTuple):
    """One velocity of one leaf, before and after a step; all None where the leaf has none."""

    before: jax.Array
    after: jax.Array
    exact: jax.Array
    code_before: jax.Array
    code_after: jax.Array


def no_figures(count: int) -> Figures:
    """The `Figures` of `count` velocities before the first measurement."""
    return Figures(zeros(), zeros(), *(zeros(count) for _ in range(4)))


def measure(step: Step, updates: optax.Updates, state: optax.OptState) -> tuple[Figures, jax.Array]:
    """The figures of a step from `state`, and whether all velocities were zero before it."""
    out, after = step(state, updates)
    _, exact = step(in_full_precision(state), updates)
    gradients = Leaves(updates)
    read = [decoded_velocities(x) for x in (state, after, exact)]
    *codes, wide = ([v.tree for v in stored_velocities(x)] for x in (state, after, exact))
    if [x.dtype for x in jax.tree.leaves(wide)] != [x.dtype for x in jax.tree.leaves(read[0])]:
        raise ValueError(
            "the storage must keep velocities in full where the first of the parts to replace holds them so"
        )
    # For each velocity the leaves of the five trees of `_LeafVelocity`.
    columns = [tuple(map(gradients.of, trees)) for trees in zip(*read, *codes, strict=True)]
    rows = []
    for i, (g, u) in enumerate(zip(gradients.values, gradients.of(out), strict=True)):
        if not absent(g):
            rows.append(_leaf_sums(g, u, [_LeafVelocity(*(column[i] for column in leaves)) for leaves in columns]))
    (gg, uu), *each = (sum(row[1:], row[0]) for row in zip(*rows, strict=True))
    return _from_sums(gg, uu, jnp.stack(each, axis=1) if each else zeros(8, 0))


def _from_sums(gg: jax.Array, uu: jax.Array, sums: jax.Array) -> tuple[Figures, jax.Array]:
    """The figures from the sums over all leaves, eight for each velocity."""
    n, vg, vv, dd, xx, ee, still, own = sums
    norm, before = jnp.sqrt(gg), jnp.sqrt(vv)
    figures = Figures(
        gradient_norm=norm,
        effective_learning_rate=quotient(jnp.sqrt(uu), norm),
        velocity_norm=jnp.sqrt(dd),
        cosine=quotient(vg, jnp.sqrt(own) * before),
        quantization_error=quotient(jnp.sqrt(ee), jnp.sqrt(xx)),
        stalled=quotient(still, n),
    )
    return figures, jnp.all(vv == 0)


def _leaf_sums(g: jax.Array, u: jax.Array, velocities: list[_LeafVelocity]) -> list[jax.Array]:
    """For one leaf, two sums of squares, then for each velocity eight numbers; all in float32.

    One reduction gives all of them, so that the arrays are read once.
    """
    g, present = jnp.asarray(g), [not absent(v.before) for v in velocities]
    terms = [_square(g), _square(jnp.asarray(u))]
    for v in (v for v, is_present in zip(velocities, present, strict=True) if is_present):
        stalled = (v.code_before == v.code_after) & (v.exact != v.before)
        squares = (_square(x) for x in (v.before, v.after, v.exact, v.after - v.exact))
        terms += [_product(g, v.before), *squares, stalled]
    gg, uu, *rest = _totals([jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in terms])
    rows, size = [jnp.stack([gg, uu])], jnp.float32(g.size)
    for is_present in present:
        rows.append(jnp.stack([size, *rest[:6], gg]) if is_present else zeros(8))
        rest = rest[6:] if is_present else rest
    return rows


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The real part of the product with the conjugate of `a`."""
    dtype = arithmetic_dtype(a.dtype, b.dtype)
    return jnp.real(jnp.conj(a.astype(dtype)) * b.astype(dtype))


def _square(x: jax.Array) -> jax.Array:
    wide = x.astype(arithmetic_dtype(x.dtype))
    return jnp.square(jnp.real(wide)) + jnp.square(jnp.imag(wide)) if jnp.iscomplexobj(wide) else jnp.square(wide)


def _totals(arrays: list[jax.Array]) -> list[jax.Array]:
    """The sums of arrays of one shape, each read once: of rows first, since a long sum in float32 loses small terms."""
    shape = arrays[0].shape
    if shape and shape[-1] > 2 * _LONGEST:
        whole = shape[-1] // _LONGEST * _LONGEST
        rows = [x[..., :whole].reshape(*shape[:-1], -1, _LONGEST) for x in arrays]
        return [a + b for a, b in zip(_totals(rows), _totals([x[..., whole:] for x in arrays]), strict=True)]
    starts = (jnp.float32(0),) * len(arrays)
    sums = jax.lax.reduce(
        tuple(arrays), starts, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), row_axes(shape)
    )
    return [jnp.sum(x) for x in sums]


def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def zeros(*shape: int) -> jax.Array:
    """Zeros in float32."""
    return jnp.zeros(shape, jnp.float32)
