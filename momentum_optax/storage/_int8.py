"""Velocities in one byte: the code of `companding`, written in one pass."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._export import serializable
from .._typing import DType, Number
from .companding import STEP_SIZE, decode, encode, level
from .compressed import is_compressed, rescaled
from .one_pass import Code, InOnePass, decoded


def _level(most: jax.Array) -> jax.Array:
    """The level of the largest code of each row; 0 for 0."""
    is_zero = jax.lax.le(most, np.float32(0))
    return jax.lax.select(is_zero, jax.lax.full_like(most, 0), level(most.astype(jnp.int32)))


_CODE = Code(
    encode=lambda v, inverse, noise, phase, row: (encode(v, inverse, noise, phase),) * 2,
    decode=lambda codes, unit, noise, row: decode(codes, unit, noise),
    level=lambda most, row: _level(most),
)


@serializable
class Int8Velocity(NamedTuple):
    """Velocities in one byte; each part a tuple of arrays, one per velocity or one that all velocities share.

    Attributes:
      codes: int8, of the leaf's shape; a leaf that is not compressed has its velocity here, in full. One per velocity.
      scale: float32, what the codes were written with, over 97^2; one entry per row. One per velocity.
      reach: float32, the least scale of the next write, one entry per row; 0 while it is not known.
      noise: uint32, odd, what the noise of the codes follows from; one entry per row.
    """

    codes: tuple[jax.Array, ...]
    scale: tuple[jax.Array, ...]
    reach: tuple[jax.Array, ...]
    noise: tuple[jax.Array, ...]

    @staticmethod
    def decode(state: "Int8Velocity") -> tuple[jax.Array, ...]:
        """The velocities, in float32 where they are compressed."""
        if not is_compressed(state.codes, jnp.int8):
            return state.codes
        velocities: tuple[jax.Array, ...] = decoded(_CODE, state.codes, state.scale, state.noise[0])
        return velocities

    @staticmethod
    def rescale(state: "Int8Velocity", factor: Number) -> "Int8Velocity":
        """The velocities times a number: the scales, a negative one too, and not the codes."""
        return rescaled(state, factor, jnp.int8)


@dataclasses.dataclass(frozen=True)
class Int8(InOnePass[Int8Velocity]):
    """See `int8`."""

    code: ClassVar[Code] = _CODE
    state_type: ClassVar[type[Int8Velocity]] = Int8Velocity
    code_dtype: ClassVar[DType] = jnp.int8
    bytes_per_parameter: ClassVar[float] = 1.0
    step_size: ClassVar[float] = STEP_SIZE


def int8(seed: int = 0, *, min_size: int = 4096, axis_names: tuple[str, ...] | None = None) -> Int8:
    r"""Velocities in one byte per parameter and velocity, plus 12 bytes per row (`storage.ROW_SIZE`).

    The rounding has no bias, at any size, but under `compress` and before a sign, as in `lion` and `signum`: there a
    value goes to zero rather than far above itself. It serves velocities that are added to the weights, as in SGD and
    Nesterov, and those that are divided by their size first, as in Adam:

    * relative to the row: on white noise the relative error of a stored velocity, in rows of 512, is below 0.03 for
      decay 0.9 and 0.08 for 0.99; it grows with the memory, and slowly with the row;
    * relative to the element: one rounding of a value is off by 0.6 % of it at its row's scale, 6 % at a hundredth and
      by up to 20 % from there down to 2e-7. Smaller ones are stored as zero or as that, at random. Under Adam columns
      whose gradients are 1e-5 of their row's largest keep their direction (cosine above 0.95). Below 1e-6 it is that of
      the gradient alone: keep such leaves in bfloat16.

    Under `compress` a field is taken to be divided elementwise by its size, as Adam's `mu` is, unless it is named
    "trace" or "ema". None of its values is rounded to more than 1.5 times itself: those below 1.5e-7 of their row's
    scale become zero, and those above the scale, as after a spike, may lose a part, up to nine tenths beyond twice the
    scale. So the steps stay below twice float32's longest, but for gradients that never change, where no step of
    float32 is longer than the learning rate: there up to 40 in a million are above twice that, and of 65 million none
    was above 2.9 times it; with `nu` in uint8 300 in a million, and the longest was 4.2 times.

    A row's scale is 1.35 times its largest value of the step before or, where that is more, that value and the largest
    in a 32nd of what enters together, or 2.5 times the latter less the scale otherwise, so that a step needs no second
    look at its data. The first step of a leaf, a spike of all of a row and a row that wakes up are within 0.05 in norm
    where gradients are about normal. What this does not see, such as a single element or the heavy tail of a
    distribution, is rounded for a step between levels of 1, 2, 32, 512, ... scales, and clipped beyond 3.4e7 times its
    row's scale. A first step of which that part is zero throughout is rounded as coarsely, between 3e-8 and 5e6;
    smaller values are stored as zero or 3e-8, larger ones clipped. Under `compress`, which does not know what enters a
    field, that part of the gradients gives the first scale alone: a 16th of them, or all in a field named "trace". A
    row that has grown has room there to grow by as much again, up to 1.5 times; a spike is rounded coarsely for a step.

    Scales lie between 2^-100 and 2^102: values far outside are coarser. A NaN or infinite velocity is stored as zero:
    its element starts anew.

    Args:
      seed: Of the noise, a whole number in [0, 2^32). The noise is a function of (seed, number of
        writes, leaf, velocity, element).
      min_size: Leaves with fewer elements, counted over all devices, are kept in full, as are complex ones; a whole
        number from 1.
      axis_names: None, or () to say that under `shard_map` or `pmap`, where JAX may not know, every device has whole
        leaves.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `seed` or `min_size` is not a whole number.

    Reference:
      Subtractive dither: Roberts, IRE Trans. Information Theory 1962; Gray and Stockham, IEEE Trans. Information Theory
      1993. Eight-bit optimizer states: Dettmers et al., ICLR 2022, arXiv:2110.02861.
    """
    return Int8.checked(seed, min_size, axis_names)
