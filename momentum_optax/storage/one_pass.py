"""Velocities in few bits, written and read elementwise so that XLA keeps the whole optimizer step in one pass.

A storage of this kind has a `Code`; the scale of a row comes from `guard`. The form of both follows from XLA's
fusion: a handful of operations, or one more array or number that a step reads besides its large ones, decide whether
it is compiled into one pass. A step is three programs on a GPU: the window's maximum, the pass, and what becomes of
the small parts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import Number, jitted
from .compressed import Compressed, Part, S, is_compressed
from .guard import inverse_scales, next_reach
from .protocol import EncodeContext
from .rows import (
    GROWTH,
    RowNumbers,
    as_part,
    element_noise,
    element_phase,
    in_rows,
    over_rows,
    row_axes,
    row_largest,
)
from .slopes import marked, unmarked


@dataclasses.dataclass(frozen=True)
class Code:
    """A code of velocities at the scale of their row, which comes as `inverse`, see `guard.inverse_scales`.

    Attributes:
      encode: The codes of values, and the same as int8; from values, `inverse`, noise and phase as in `companding`, and
        the state's `noise` before the write.
      decode: The values of codes, from these, their units, the noise of `encode` and the state's `noise`.
      level: What is read, times `inverse`, from the largest size of a code in each row and the state's `noise` before
        the write; 0 for 0.
      unit: The unit times `inverse`.
      share: The largest value that square roots stand for, in scales.
    """

    encode: Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, jax.Array]]
    decode: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    level: Callable[[jax.Array, jax.Array], jax.Array]
    unit: float = 1.0
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class InOnePass(Compressed[S]):
    """Velocities in a `code`, which a step writes without a second look at its data."""

    code: ClassVar[Code]
    beside_codes: ClassVar[dict[str, Part]] = {
        "scale": Part("row", jnp.float32, shared=False),
        "reach": Part("row", jnp.float32),
        "noise": Part("row", jnp.uint32),
    }
    reads_stamp: ClassVar[bool] = False
    reads_entering: ClassVar[bool] = True

    def compress(self, velocities: tuple[jax.Array, ...], previous: S, context: EncodeContext) -> S:
        """The codes of the velocities, at a scale that follows from the last codes and from what enters."""
        # Relative to each other only: a single velocity has none.
        factors = context.relative_scales if len(velocities) > 1 else (None,)
        *entering, is_sure = context.entering or (None, 1.0, True)
        before = previous.reach[0], previous.noise[0]
        how = {"is_sure": is_sure, "is_divided": context.is_divided}
        parts = _encoded(self.code, velocities, factors, tuple(entering), before, **how)
        written: S = self.state_type(*parts)
        return written

    def fitted(self, parts: S, velocities: tuple[jax.Array, ...], gains: tuple[Number, ...]) -> S:
        """The parts of a new state with the scales that these velocities need."""
        if not is_compressed(parts.codes, self.code_dtype):
            return parts
        return parts._replace(reach=(largest(velocities, gains) * np.float32(1 / self.code.share),))


@functools.partial(jax.jit, static_argnums=0)
def decoded(
    code: Code, codes: tuple[jax.Array, ...], scales: tuple[jax.Array, ...], noise: jax.Array
) -> tuple[jax.Array, ...]:
    """The velocities of one leaf."""
    numbers = RowNumbers.of(noise, codes[0], len(codes))
    return tuple(
        code.decode(c, over_rows(in_rows(unmarked(scale), c), c), element_noise(numbers, c, k), numbers.rows)
        for k, (c, scale) in enumerate(zip(codes, scales, strict=True))
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("is_sure", "is_divided"))
def _encoded(
    code: Code,
    velocities: tuple[jax.Array, ...],
    factors: tuple[Number | None, ...],
    entering: tuple[jax.Array | None, Number],
    before: tuple[jax.Array, jax.Array],
    *,
    is_sure: bool,
    is_divided: bool,
) -> tuple[tuple[jax.Array, ...], ...]:
    """The codes of the velocities of one leaf and the parts beside them, after `before`, the last reach and noise."""
    leaf, (reach, noise) = velocities[0], before
    rows = in_rows(reach, leaf)
    alike = tuple(_over(v.astype(jnp.float32), factor) for v, factor in zip(velocities, factors, strict=True))
    array, share = entering
    inverse = inverse_scales(_largest_of(alike) if array is None else array, share, is_sure, rows)
    over, numbers = over_rows(inverse, leaf), RowNumbers.of(noise, leaf, len(alike))
    phases = [element_phase(numbers, v, k) if is_divided else None for k, v in enumerate(alike)]
    written = [
        code.encode(v, over, element_noise(numbers, v, k, 1), phase, numbers.rows)
        for k, (v, phase) in enumerate(zip(alike, phases, strict=True))
    ]
    codes, same = zip(*written, strict=True)
    most = row_largest(same)
    # Never true: the small parts follow from the codes. XLA knows them to be read no more then, and writes over them.
    is_last = jax.lax.gt(most, np.float32(127))
    # As parts from their last operation on, or XLA's CPU backend would copy them there.
    is_last_part = as_part(is_last, leaf)
    unit = as_part(jax.lax.div(np.float32(code.unit), jax.lax.abs(inverse)), leaf)
    unit = jax.lax.select(is_last_part, jax.lax.full_like(unit, 1), unit)
    scale = tuple(marked(_times(unit, factor), v) for v, factor in zip(velocities, factors, strict=True))
    inverse = jax.lax.select(is_last, jax.lax.full_like(inverse, 1), inverse)
    is_seen, following = next_reach(inverse, code.level(most, in_rows(noise, leaf)), rows, is_sure)
    reach = jax.lax.select(as_part(is_seen, leaf), as_part(following, leaf), reach)
    grown = jax.lax.mul(noise, np.uint32(GROWTH))
    noise = jax.lax.select(is_last_part, jax.lax.full_like(noise, 1), grown)
    return codes, scale, (reach,), (noise,)


@jitted
def largest(velocities: tuple[jax.Array, ...], gains: tuple[Number, ...]) -> jax.Array:
    """The largest size in each row of what is finite, each velocity over its gain."""
    inner = row_axes(velocities[0].shape)
    pairs = zip(velocities, gains, strict=True)
    sizes = [jnp.abs(v.astype(jnp.float32)) / jnp.asarray(gain, jnp.float32) for v, gain in pairs]
    finite = [jnp.where(size <= np.finfo(np.float32).max, size, 0) for size in sizes]
    return jnp.max(jnp.stack([jnp.max(size, inner, keepdims=True) for size in finite]), 0)


def _largest_of(velocities: tuple[jax.Array, ...]) -> jax.Array:
    return functools.reduce(jax.lax.max, map(jax.lax.abs, velocities)) if len(velocities) > 1 else velocities[0]


def _over(x: jax.Array, gain: Number | None) -> jax.Array:
    return x if gain is None else x / jnp.asarray(gain, x.dtype)


def _times(x: jax.Array, gain: Number | None) -> jax.Array:
    return x if gain is None else x * jnp.asarray(gain, x.dtype)
