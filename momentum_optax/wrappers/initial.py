"""`encode_initial`: values that a storage holds from the start, although it has not learned their scale yet."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._typing import Count, Number, PyTree
from ..storage import Storage
from ..storage.noise import stamp_of_step
from ..storage.protocol import encode_context, new_state

# A storage learns its scale from what it wrote before: it writes again at most `_SETTLING` times until the largest
# value is within reach, and then until it has written `_ROUNDS` times more.
_ROUNDS, _SETTLING = 3, 24


def encode_initial(storage: Storage, velocities: tuple[jax.Array, ...], *numbers: int) -> PyTree:
    """The parts of one leaf that hold `velocities`, written for the first time; `numbers` tell leaves apart.

    Of a `ShapeDtypeStruct`, where `init` is asked for shapes alone, they are those of zero.

    Before a storage knows a scale it writes coarsely, and in few bits too small by orders of magnitude where a leaf has
    few rows. So it writes until the largest value is within reach, again with the scale that this gives, and once more
    for what a storage derives from how well that one fitted. A storage with a method `fitted` is told instead.
    """
    fresh = new_state(storage, velocities[0], len(velocities), *numbers)
    if isinstance(velocities[0], jax.ShapeDtypeStruct) or not velocities[0].size:
        return fresh
    sizes = [jnp.max(jnp.abs(v)) for v in velocities]
    nonzero = jnp.any(jnp.stack([size != 0 for size in sizes]))
    if not isinstance(nonzero, jax.core.Tracer) and not nonzero:
        return fresh
    gains = _relative_sizes(sizes)
    fitted = getattr(storage, "fitted", None)
    if fitted is not None:
        fresh = fitted(fresh, velocities, gains)
    # Copies: a storage may keep its arguments, and the caller may donate them.
    copies = tuple(jnp.array(v, copy=True) for v in velocities)

    def write(i: Count, parts: PyTree) -> PyTree:
        context = encode_context(storage, copies[0], (stamp_of_step(-1 - i), *numbers), gains)
        # Nothing adds up over one write, and its reader may divide by sizes.
        return storage.encode(copies, parts, context._replace(is_divided=True))

    parts = write(0, fresh)
    if fitted is None:
        count, parts = _write_until_within_reach(write, parts, copies)
        for i in range(1, _ROUNDS):
            parts = write(count + i, parts)
    if not isinstance(nonzero, jax.core.Tracer):
        return parts
    # A velocity of zero has no scale yet: the next write must still be a first one.
    return jax.tree.map(lambda new, old: jnp.where(nonzero, new, old), parts, fresh)


def _write_until_within_reach(
    write: Callable[[Count, PyTree], PyTree], parts: PyTree, velocities: tuple[jax.Array, ...]
) -> tuple[Count, PyTree]:
    """Write again until the largest decoded value is at least half as large as it should be.

    Returns:
      The number of writes, and the parts after them.
    """
    sizes = [jnp.max(jnp.where(jnp.isfinite(v), jnp.abs(v), 0)) for v in velocities]

    def is_short(carry: tuple[Count, PyTree]) -> jax.Array:
        count, parts = carry
        decoded = [jnp.max(jnp.abs(v)) for v in parts.decode(parts)]
        short = [2 * value < size for value, size in zip(decoded, sizes, strict=True)]
        return (count < _SETTLING) & jnp.stack(short).any()

    def again(carry: tuple[Count, PyTree]) -> tuple[Count, PyTree]:
        count, parts = carry
        return count + 1, write(count + 1, parts)

    carry: tuple[Count, PyTree] = (jnp.int32(0), parts)
    if isinstance(is_short(carry), jax.core.Tracer):
        return jax.lax.while_loop(is_short, again, carry)
    while is_short(carry):
        carry = again(carry)
    return int(carry[0]), carry[1]


def _relative_sizes(sizes: list[jax.Array]) -> tuple[Number, ...]:
    """The size of each velocity over that of the smallest one that is not zero; 1 where it is zero or not finite."""
    if len(sizes) == 1:
        return (1.0,)
    known = [(size > 0) & jnp.isfinite(size) for size in sizes]
    least = jnp.min(jnp.stack([jnp.where(ok, size, jnp.inf) for ok, size in zip(known, sizes, strict=True)]))
    return tuple(jnp.where(ok, size / least, 1.0) for ok, size in zip(known, sizes, strict=True))
