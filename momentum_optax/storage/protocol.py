"""What a storage is: a way to keep the velocities of one leaf between two steps.

A storage never changes what a rule means. It sees one leaf at a time and knows nothing of trees: `scale_by_momentum`
lays the parts out as one tree of the parameters' structure per part, so that shardings and `optax.tree.map_params`
apply.

Laws, each of them a test over every storage:

1. `decode(init(leaf, K))` is K arrays of zeros of the leaf's shape.
2. `encode` returns the dtypes and shapes of `init`, whatever it is given.
3. `decode(encode(v))` is finite where v is, keeps zeros and signs, and is within the storage's stated error of v.
4. What is decoded is encoded again without change, by a storage that reads no step.
5. `bytes_per_parameter` is what is held, to the scales.
6. NaN and infinity in one element of a velocity have a stated outcome and touch no other element.
7. The first part holds the codes, of the leaf's shape. In the dtype of what `decode` gives it is the velocities
   themselves, and `encode` keeps them so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from .noise import stamp_of

SUPPORTED = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


class Parts(Protocol):
    """The stored form of the velocities: a NamedTuple class, each field a tuple with one array (or tree) per velocity.

    The class alone suffices to decode, so that velocities can be read from a state without its transformation.
    """

    @staticmethod
    def decode(parts: Any) -> tuple[jax.Array, ...]:
        """The K velocities of one leaf, in the arithmetic's dtype: float32, or wider where stored so."""
        ...

    @staticmethod
    def rescale(parts: Any, factor: Any) -> Any:
        """The parts of `factor` times the velocities, a number; exact for powers of two within the dtypes' range."""
        ...


class Write(NamedTuple):
    """What `encode` may look at besides the velocities.

    Attributes:
      stamp: uint32 that stands for the step and the leaf; None unless the storage `reads_step`.
      gains: K numbers or scalar arrays: about how large each velocity is relative to the others.
    """

    stamp: Any
    gains: tuple[Any, ...]


class Storage(Protocol):
    """A way to keep velocities; see the module's text for the laws that it obeys.

    It may also have `nonnegative = True`: fit for second moments too, which are never negative and need relative
    accuracy; and `signed = False`: fit for nothing else. See `is_signed` and `compress`. And `largest_decay`, a number:
    beyond it the rounding feeds itself, and a rule that decays more slowly gets a warning.
    """

    @property
    def parts(self) -> Any:
        """The `Parts` class."""
        ...

    @property
    def reads_step(self) -> bool:
        """Whether `encode` needs a stamp, so that the state must count steps."""
        ...

    @property
    def bytes_per_parameter(self) -> float:
        """Of one velocity of a large float32 leaf; scales, which serve at least 512 elements each, come on top."""
        ...

    @property
    def step_size(self) -> float:
        """The distance of neighbouring values about v over v (floating point), or about its row's largest over that."""
        ...

    def init(self, leaf: Any, order: int) -> Any:
        """The stored form of `order` velocities of zero for `leaf`, an array or `ShapeDtypeStruct`."""
        ...

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any, write: Write) -> Any:
        """The stored form of `velocities`, with the dtypes of `previous`, the parts that they replace."""
        ...


def unsupported(name: str, dtype: Any) -> str:
    """What to say of a leaf without a velocity, such as a counter among the parameters."""
    return (
        f"{name} must have a dtype of {', '.join(SUPPORTED)}, got {dtype}: keep it from the optimizer with "
        "optax.masked, or None in its place as equinox.filter(params, equinox.is_inexact_array) gives"
    )


def arithmetic_dtype(*dtypes: Any) -> Any:
    """The dtype that arithmetic among `dtypes` runs in: their widest, and at least float32.

    Without 64-bit types NumPy's float64 is what JAX makes of it, float32.
    """
    # Whatever promotion the user allows: what is narrower is converted, never promoted. One by one: of a dtype that it
    # is given, `result_type` warns that there is no such array.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *map(jax.dtypes.canonicalize_dtype, dtypes))


def times(x: jax.Array, factor: Any) -> jax.Array:
    """`x` times a real number, rounded once from the arithmetic's dtype to that of `x`."""
    wide = x.astype(arithmetic_dtype(x.dtype))
    return (wide * jnp.asarray(factor, jnp.finfo(wide.dtype).dtype)).astype(x.dtype)


def is_signed(storage: Any) -> bool:
    """Whether values of either sign can be kept."""
    return bool(getattr(storage, "signed", True))


def write_for(storage: Any, leaf: Any, numbers: tuple[Any, ...], gains: tuple[Any, ...]) -> Write:
    """What `encode` may look at when `leaf` is written; `numbers` stand for the step and the leaf.

    Raises:
      ValueError: If the noise would depend on the mesh, since `leaf` is or may be one shard of an array under
        `shard_map` or `pmap`.
    """
    if not storage.reads_step:
        return Write(None, gains)
    if getattr(storage, "axis_names", None) is None:
        check_whole(type(storage).__name__, leaf, "give the storage axis_names=()")
    return Write(stamp_of(*numbers), gains)


_WHOLE: ContextVar[frozenset[Any]] = ContextVar("_WHOLE", default=frozenset())


@contextmanager
def whole_along(axis_names: Any) -> Iterator[None]:
    """Within it what is written is known to be the same on all devices along these axes, whatever its type says."""
    names = axis_names if isinstance(axis_names, tuple | list) else (axis_names,)
    token = _WHOLE.set(_WHOLE.get() | set(names))
    try:
        yield
    finally:
        _WHOLE.reset(token)


def check_whole(what: str, leaf: Any, way_out: str) -> None:
    """Raise if `leaf` is one shard of an array, or may be; `way_out` is for devices that have whole leaves."""
    manual = [a for a in jax.sharding.get_abstract_mesh().manual_axes if a not in _WHOLE.get()]
    if not manual:
        return
    # The index of a device along an axis varies along it wherever JAX keeps track of what does.
    if not _varying(jax.lax.axis_index(manual[0])):
        raise ValueError(
            f"under pmap or shard_map(check_vma=False) {what} cannot know if leaves are split along "
            f"{_listed(manual)}, where its noise would depend on the mesh: leave check_vma=True, use jit with "
            f"shardings, or, if every device has whole leaves, {way_out}"
        )
    axes = [a for a in manual if a in _varying(leaf)]
    if axes:
        raise ValueError(
            f"under shard_map an array for {what} must be the same on every device, got one that varies along "
            f"{_listed(axes)}, where noise and scales would depend on the mesh: use jit with shardings, or storage "
            f"'float32' or bfloat16('nearest'); if every device has whole leaves, {way_out}"
        )


def _varying(x: Any) -> Any:
    """The axes of an enclosing `shard_map` along which `x` may differ, as far as its type knows."""
    kind: Any = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names)))


def check_axis_names(axis_names: Any) -> None:
    """Raise unless nothing is said of axes, or that leaves are split along none."""
    if axis_names is not None and axis_names != ():
        raise ValueError(
            "axis_names must be None or, for leaves that are whole on every device, (); splitting them by hand is not "
            f"supported, got {axis_names!r}"
        )
