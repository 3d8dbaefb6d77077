r"""Squares in one byte: floats of few bits around what their row needs, for second moments.

The codes from 1 up stand for the float32 whose bits are `base` plus the code in quarters of an octave, $2^e (1 + m/4)$;
from code 193 up in strides of two octaves; and while a leaf has no base at all in octaves. Values are rounded at random
between the levels around them, so that the mean over the noise is the value.

The levels lie on one grid whatever the base is. A value that hardly changes therefore mostly keeps its code, and the
error does not grow with the memory of an average: the rounding of a step adds the variance of that step's change, not
that of a whole distance between levels. Small values are never rounded to zero: a division by their root follows.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from .._export import serializable
from .._typing import DType, Number, jitted
from .compressed import Compressed, Part, is_compressed
from .noise import column_numbers, element_bits, stamp_of
from .protocol import EncodeContext, times
from .rows import row_axes

# In the bits of a float32, of which a quarter of an octave is 2^`_QUARTER`. A stride is 2^`_STRIDE` quarters.
_OCTAVE, _ONE = 1 << 23, 0x3F800000
_QUARTER, _STRIDE = 21, 3


# How many codes go up by quarters, and how many octaves of them lie below the row's largest value.
_FINE, _BELOW, _LAST = 192, 32, 255


# The `fine` of a leaf without a base: beyond all codes, and the quarters of octaves that these go up by are shifted by
# its upper bits, to octaves.
_COARSE = 2 << 8


# No row's range lies more octaves than this below that of the leaf's largest row: few enough to hold a row that wakes
# up, enough not to lift rows above their values where one element is infinite.
_WAKE = 130


@serializable
class Uint8Velocity(NamedTuple):
    """Squares in one byte; each part a tuple with one array per velocity.

    Attributes:
      codes: uint8, of the leaf's shape; a leaf that is not compressed has its values here, in full.
      base: uint32, the bits of the float32 at code 1; one entry per row.
      fine: uint32, one entry: how many codes go up by quarters of an octave; 512 if all go up by octaves.
      following: uint32, what the base of the next step is at least; one entry per row. Zero in a row of zeros.
    """

    codes: tuple[jax.Array, ...]
    base: tuple[jax.Array, ...]
    fine: tuple[jax.Array, ...]
    following: tuple[jax.Array, ...]

    @staticmethod
    def decode(state: "Uint8Velocity") -> tuple[jax.Array, ...]:
        """The values, in float32 where they are compressed."""
        return _decoded(state) if is_compressed(state.codes, jnp.uint8) else state.codes

    @staticmethod
    def rescale(state: "Uint8Velocity", factor: Number) -> "Uint8Velocity":
        """The squares times a number: by powers of two the bases move; what is left is rounded at random once more."""
        if not is_compressed(state.codes, jnp.uint8):
            return state._replace(codes=tuple(times(x, factor) for x in state.codes))
        factor = jnp.asarray(factor, jnp.float32)
        octaves = (jax.lax.bitcast_convert_type(factor, jnp.int32) >> 23) - 127
        stamp = stamp_of(jax.lax.bitcast_convert_type(factor, jnp.uint32))
        shape = state.codes[0].shape
        values = Uint8Velocity.decode(state)
        rows = zip(values, state.base, state.fine, state.following, strict=True)
        written = []
        for k, (v, old, fine, following) in enumerate(rows):
            # Codes in octaves cover all floats from their base: they move themselves.
            base = _moved(old, jnp.where(fine == _FINE, octaves, 0))
            noise = element_bits(shape, stamp, column_numbers(shape[-1], k))
            codes = _encode(v * factor, base, fine.reshape(()), noise)
            written.append((codes, base, fine, _moved(following, octaves)))
        return Uint8Velocity(*zip(*written, strict=True))


@dataclasses.dataclass(frozen=True)
class Uint8(Compressed[Uint8Velocity]):
    """See `uint8`."""

    state_type: ClassVar[type[Uint8Velocity]] = Uint8Velocity
    code_dtype: ClassVar[DType] = jnp.uint8
    beside_codes: ClassVar[dict[str, Part]] = {
        "base": Part("row", jnp.uint32, shared=False),
        "fine": Part("leaf", jnp.uint32, shared=False),
        "following": Part("row", jnp.uint32, shared=False),
    }
    bytes_per_parameter: ClassVar[float] = 1.0
    step_size: ClassVar[float] = 0.25
    nonnegative: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    reads_numbers: ClassVar[bool] = True

    def compress(
        self, velocities: tuple[jax.Array, ...], previous: Uint8Velocity, context: EncodeContext
    ) -> Uint8Velocity:
        """The codes of the squares, from bases that follow from the steps before."""
        last = velocities[0].shape[-1]
        columns = tuple(column_numbers(last, self.seed, *context.numbers, k) for k in range(len(velocities)))
        stamp = cast(jax.Array, context.stamp)
        written: Uint8Velocity = _encoded(velocities, previous.following, stamp, columns, is_alone=context.is_alone)
        return written


def uint8(seed: int = 0, *, min_size: int = 4096, axis_names: tuple[str, ...] | None = None) -> Uint8:
    r"""Squares, such as Adam's `nu`, in one byte per parameter, plus 8 bytes per row (`storage.ROW_SIZE`).

        mo.compress(optax.adamw(1e-3), {"mu": "int8", "nu": "uint8"})

    Not for velocities: a negative value is stored as zero. The rounding has no bias, and the relative error of a square
    of a slowly changing average is about a third; the root, by which steps are divided, has a relative error of about
    17 %, whatever the decay. Within a row values between 2^-32 and 2^16 times the largest one of the step before are
    that exact; larger ones, up to 2^142 times, are rounded between powers of 4 for one step, and smaller ones become
    the smallest. The first step of a leaf is rounded between powers of 2 throughout. A row of zeros has room for values
    up to 2^12 times the largest one of its leaf, or up to 2^48 if that is more.

    NaN is stored as zero, infinity and what is beyond the range as the largest value that a row has a code for.

    Args:
      seed: Of the noise, a whole number in [0, 2^32). The noise is a function of (seed, step, leaf, velocity, element).
      min_size: Leaves with fewer elements, counted over all devices, are kept in full, as are complex ones; a whole
        number from 1.
      axis_names: None, or () to say that under `shard_map` or `pmap`, where JAX may not know, every device has whole
        leaves.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `seed` or `min_size` is not a whole number.

    Reference:
      Counting with random increments: Morris, Communications of the ACM 1978. Eight-bit optimizer states: Dettmers et
      al., ICLR 2022, arXiv:2110.02861.
    """
    return Uint8.checked(seed, min_size, axis_names)


@jitted
def _decoded(state: Uint8Velocity) -> tuple[jax.Array, ...]:
    """The squares of one leaf in bytes."""
    rows = zip(state.codes, jax.lax.optimization_barrier(state.base), state.fine, strict=True)
    return tuple(
        jnp.where(codes > 0, _float(_bits(codes.astype(jnp.uint32), base, fine.reshape(()))), 0.0)
        for codes, base, fine in rows
    )


@functools.partial(jax.jit, static_argnames="is_alone")
def _encoded(
    squares: tuple[jax.Array, ...],
    followings: tuple[jax.Array, ...],
    stamp: jax.Array,
    columns: tuple[jax.Array, ...],
    *,
    is_alone: bool,
) -> Uint8Velocity:
    """The squares of one leaf in bytes, from bases that follow from the steps before."""
    written = []
    for v, following, numbers in zip(squares, followings, columns, strict=True):
        most = jnp.max(following)
        fine = jnp.where(most > 0, np.uint32(_FINE), np.uint32(_COARSE))
        # A row that looks silent may yet wake up: keep what the leaf's other rows hold within its range.
        least = jnp.maximum(most, np.uint32((_WAKE + 1) * _OCTAVE)) - np.uint32(_WAKE * _OCTAVE)
        base = jax.lax.optimization_barrier(jnp.maximum(following, least))
        codes = _encode(v.astype(jnp.float32), base, fine, element_bits(v.shape, stamp, numbers))
        # As for int8's largest codes.
        largest = jax.lax.optimization_barrier(_largest(codes if is_alone else _read_again(codes)))
        # Never true: then XLA knows the last base to be read no more, and writes over it.
        kept = jnp.where(largest > _LAST, np.uint32(_OCTAVE), base)
        written.append((codes, kept, fine.reshape((1,) * v.ndim), _following(largest, base, fine)))
    return Uint8Velocity(*zip(*written, strict=True))


def _read_again(codes: jax.Array) -> jax.Array:
    """The codes as they have been written.

    Of the reductions of a kernel XLA's GPU backend lets the first alone share the kernel with codes that are written
    over those of the step before. With another field's maximum there it would write these beside the old ones and copy
    them afterwards: twice as many bytes as to read them again, and a byte of temporaries.
    """
    again: jax.Array = jax.lax.platform_dependent(codes, cuda=jax.lax.optimization_barrier, default=lambda x: x)
    return again


def _moved(base: jax.Array, octaves: jax.Array) -> jax.Array:
    """A base moved up by `octaves`; zero stays zero."""
    octave = jnp.clip((base // np.uint32(_OCTAVE)).astype(jnp.int32) + octaves, 1, 254 - _BELOW)
    return jnp.where(base > 0, octave.astype(jnp.uint32) * np.uint32(_OCTAVE), np.uint32(0))


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _shift(fine: jax.Array) -> jax.Array:
    """The logarithm of the distance, in the bits of a float, of codes up to `fine`."""
    return (fine >> 8) + np.uint32(_QUARTER)


def _bits(code: jax.Array, base: jax.Array, fine: jax.Array) -> jax.Array:
    """The bits of the float32 that a code above zero stands for."""
    above = code - 1
    near = jnp.minimum(above, fine)
    return base + ((near + ((above - near) << _STRIDE)) << _shift(fine))


def _encode(v: jax.Array, base: jax.Array, fine: jax.Array, noise: jax.Array) -> jax.Array:
    # No finite value is rounded up to infinity either: the chance of a level there is none.
    v = jnp.minimum(v, np.finfo(np.float32).max)
    shift = _shift(fine)
    steps = (jnp.maximum(jax.lax.bitcast_convert_type(v, jnp.uint32), base) - base) >> shift
    near = jnp.minimum(steps, fine)
    far = (steps - near) >> _STRIDE
    bits = base + ((near + (far << _STRIDE)) << shift)
    # One more number that does not depend on the element, and XLA's TPU backend takes two passes.
    distance = jnp.where(steps < fine, np.uint32(1), np.uint32(1 << _STRIDE)) << shift
    low, high = _float(bits), _float(bits + distance)
    # Uniform from 0 to 1, without a factor: XLA would move it over to the small difference, and that to zero.
    chance = _float((noise >> 9) | np.uint32(_ONE)) - 1
    # By way of int32: XLA's CPU backend converts unsigned numbers slowly.
    up = (chance * (high - low) < v - low).astype(jnp.int32)
    code = jnp.minimum((near + far).astype(jnp.int32) + 1 + up, _LAST)
    # The comparison is false for NaN.
    return jnp.where(v > 0, code, 0).astype(jnp.uint8)


def _largest(codes: jax.Array) -> jax.Array:
    return jnp.max(codes.astype(jnp.float32), row_axes(codes.shape), keepdims=True)


def _following(largest: jax.Array, base: jax.Array, fine: jax.Array) -> jax.Array:
    """What the base of the next step is at least, from the largest code of each row."""
    octave = _bits(largest.astype(jnp.uint32), base, fine) & np.uint32(2**32 - _OCTAVE)
    below = jnp.maximum(octave, np.uint32((_BELOW + 1) * _OCTAVE)) - np.uint32(_BELOW * _OCTAVE)
    return jnp.where(largest > 0, below, np.uint32(0))
