"""The protocol of storages: ways to keep the velocities of one leaf between two steps.

A storage never changes what a rule means. It sees one leaf at a time and knows nothing of trees: `scale_by_momentum`
lays the state out as one tree of the parameters' structure per part, so that shardings and `optax.tree.map_params`
apply.

Laws, each of them a test over every storage:

1. `decode(init(leaf, K))` is K arrays of zeros of the leaf's shape.
2. `encode` returns the dtypes and shapes of `init`, whatever it is given.
3. `decode(encode(v))` is finite where v is, keeps zeros and signs, and is within the storage's stated error of v.
4. What is decoded is encoded again without change, by a storage that reads no step.
5. `bytes_per_parameter` is what is held, to the scales.
6. NaN and infinity in one element of a velocity have a stated outcome and touch no other element, except that an
   infinite square in bytes leaves its row no codes for small ones (see `uint8`).
7. The first part holds the codes, of the leaf's shape. In the dtype of what `decode` gives it is the velocities
   themselves, and `encode` keeps them so.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._tree import path_name
from .._typing import AxisName, Count, DType, KeyPath, Leaf, Number, PyTree
from .noise import stamp_of
from .rounding import is_narrow

_FLOAT32 = np.dtype(np.float32)
SUPPORTED = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


class StoredVelocity(Protocol):
    """The stored form of the velocities: a NamedTuple class, each field a tuple with one array (or tree) per velocity.

    The class alone suffices to decode, so that velocities can be read from a state without its transformation.
    """

    @staticmethod
    def decode(state: Any) -> tuple[jax.Array, ...]:
        """The K velocities of one leaf, in the arithmetic's dtype: float32, or wider where stored so."""
        ...

    @staticmethod
    def rescale(state: Any, factor: Number) -> Any:
        """The state of `factor` times the velocities, a number; exact for powers of two within the dtypes' range."""
        ...


class EncodeContext(NamedTuple):
    """The inputs of `encode` besides the velocities.

    Attributes:
      stamp: uint32 that stands for the step and the leaf, or for the step alone where the storage `reads_numbers`;
        None unless it `reads_step`.
      relative_scales: K numbers or scalar arrays: about how large each velocity is relative to the others.
      entering: An array of the leaf's shape, a number that is not negative, and whether this is sure: in this step the
        velocities, each over its relative scale, become about as large as the array times the number, or larger. None
        if nothing is known.
      is_divided: Whether the optimizer divides the velocity elementwise by its size, as Adam does its first moment, or
        takes only signs, as Lion does. Then a value must not be rounded to far above itself, at the price of a mean
        that is too small.
      is_alone: Whether no other part of the optimizer's state is kept in few bits.
      numbers: Those of the leaf, for a storage that `reads_numbers`.
    """

    stamp: jax.Array | None
    relative_scales: tuple[Number, ...]
    entering: tuple[jax.Array, Number, bool] | None = None
    is_divided: bool = False
    is_alone: bool = True
    numbers: tuple[int, ...] = ()


class Storage(Protocol):
    """A way to keep velocities; see the module's text for the laws that it obeys.

    It may also have `nonnegative = True`: fit for second moments too, which are never negative and need relative
    accuracy; and `signed = False`: fit for nothing else. See `is_signed` and `compress`. And `largest_decay`, a number:
    beyond it the rounding feeds itself, and a rule that decays more slowly gets a warning.

    It may have two methods for a new state, the result of `init`. `numbered(parts, leaf, *numbers)` gives it the noise
    of the leaf of these numbers, which `init` does not know, as data; `reads_stamp = False` then says that `encode`
    needs no stamp. With `reads_numbers = True` it is told of the step and of the leaf apart. `fitted(parts,
    velocities, relative_scales)` gives it the scales of the first velocities. With `reads_entering = True` it is
    told of what enters in a step, see `EncodeContext`.
    """

    @property
    def state_type(self) -> Any:
        """The `StoredVelocity` class."""
        ...

    @property
    def reads_step(self) -> bool:
        """Whether `encode` needs a stamp, so that the state must count steps."""
        ...

    @property
    def bytes_per_parameter(self) -> float:
        """Of one velocity of a large float32 leaf; scales come on top, one for each row (see `rows.ROW_SIZE`)."""
        ...

    @property
    def step_size(self) -> float:
        """The distance of neighbouring values about v over v (floating point), or about its row's largest over that."""
        ...

    def init(self, leaf: Leaf, order: int) -> Any:
        """The stored form of `order` velocities of zero for `leaf`, an array or `ShapeDtypeStruct`."""
        ...

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any, context: EncodeContext) -> Any:
        """The stored form of `velocities`, with the dtypes of `previous`, the state that they replace."""
        ...


def new_state(storage: Storage, leaf: Leaf, order: int, *numbers: int) -> Any:
    """The stored form of `order` velocities of zero for `leaf`, whose noise is that of these numbers."""
    parts = storage.init(leaf, order)
    return storage.numbered(parts, leaf, *numbers) if hasattr(storage, "numbered") else parts


def checked_leaf(path: KeyPath, leaf: Leaf) -> Leaf:
    """`leaf` as something with a shape and a supported dtype.

    Raises:
      TypeError: If it can have no velocity, as a counter among the parameters, with its path.
    """
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        # A function or a string among the parameters cannot be converted, and is named below.
        with suppress(TypeError, ValueError):
            leaf = jnp.asarray(leaf)
    got = str(leaf.dtype) if hasattr(leaf, "dtype") else _checks.shown(leaf)
    if got not in SUPPORTED:
        raise TypeError(
            f"{path_name(path)} must have a dtype of {', '.join(SUPPORTED)}, got {got}: keep it from the "
            "optimizer with optax.masked, or None in its place as "
            "equinox.filter(params, equinox.is_inexact_array) gives"
        )
    return leaf


def check_leaves(tree: PyTree) -> None:
    """Raise `TypeError`, with the path, for a leaf of a bare tree that can have no velocity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        checked_leaf(path, leaf)


def arithmetic_dtype(*dtypes: DType) -> DType:
    """The dtype that arithmetic among `dtypes` runs in: their widest, and at least float32.

    Without 64-bit types NumPy's float64 is what JAX makes of it, float32.
    """
    # What nearly all leaves have, without the time that a trace spends below.
    if all(dtype == _FLOAT32 for dtype in dtypes):
        return _FLOAT32
    # Whatever promotion the user allows: what is narrower is converted, never promoted. One by one: of a dtype that it
    # is given, `result_type` warns that there is no such array. JAX promotes no float of 8 bits.
    wide = (dtype for dtype in map(jax.dtypes.canonicalize_dtype, dtypes) if not is_narrow(dtype))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *wide)


def in_dtype(x: jax.Array, dtype: DType) -> jax.Array:
    """`x.astype(dtype)`, at no cost where nothing changes: tracing `astype` takes a tenth of a leaf's time."""
    return x if x.dtype == dtype and not getattr(x, "weak_type", False) else x.astype(dtype)


def times(x: jax.Array, factor: Number) -> jax.Array:
    """`x` times a real number, rounded once from the arithmetic's dtype to that of `x`."""
    wide = x.astype(arithmetic_dtype(x.dtype))
    return (wide * jnp.asarray(factor, jnp.finfo(wide.dtype).dtype)).astype(x.dtype)


def is_signed(storage: Storage) -> bool:
    """Whether values of either sign can be kept."""
    return bool(getattr(storage, "signed", True))


def encode_context(
    storage: Storage, leaf: jax.Array, numbers: tuple[Count | None, ...], relative_scales: tuple[Number, ...]
) -> EncodeContext:
    """The `EncodeContext` in which `leaf` is written.

    `numbers` are the `stamp_of_step`, which all leaves share, and those of the leaf.

    Raises:
      ValueError: If the noise would depend on the mesh, since `leaf` is or may be one shard of an array under
        `shard_map` or `pmap`.
    """
    if not storage.reads_step:
        return EncodeContext(None, relative_scales)
    if getattr(storage, "axis_names", None) is None:
        check_whole(type(storage).__name__, leaf, "give the storage axis_names=()")
    if not getattr(storage, "reads_stamp", True):
        return EncodeContext(None, relative_scales)
    if getattr(storage, "reads_numbers", False):
        return EncodeContext(cast(jax.Array, numbers[0]), relative_scales, numbers=cast(tuple[int, ...], numbers[1:]))
    *before, last = cast(tuple[Count, ...], numbers)
    stamp = stamp_of(*before, leaf=last) if isinstance(last, int) else stamp_of(*before, last)
    return EncodeContext(stamp, relative_scales)


_WHOLE: ContextVar[frozenset[str]] = ContextVar("_WHOLE", default=frozenset())


@contextmanager
def whole_along(axis_names: AxisName) -> Iterator[None]:
    """Within it what is written is known to be the same on all devices along these axes, whatever its type says."""
    names = axis_names if isinstance(axis_names, tuple | list) else (axis_names,)
    token = _WHOLE.set(_WHOLE.get() | {name for name in names if name is not None})
    try:
        yield
    finally:
        _WHOLE.reset(token)


def check_whole(what: str, leaf: jax.Array, way_out: str) -> None:
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


def _varying(x: jax.Array) -> Collection[str]:
    """The axes of an enclosing `shard_map` along which `x` may differ, as far as its type knows."""
    kind = jax.typeof(x)
    # JAX 0.7.2 has the former, the newest versions the latter.
    varying: Collection[str] = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return varying


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(map(repr, names)))


def check_axis_names(axis_names: object) -> None:
    """Raise unless nothing is said of axes, or that leaves are split along none."""
    if axis_names is not None and axis_names != ():
        raise ValueError(
            "axis_names must be None or, for leaves that are whole on every device, (); splitting them by hand is not "
            f"supported, got {axis_names!r}"
        )
