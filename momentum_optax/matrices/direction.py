"""Directions of matrices: any function of whole ones as a transformation, and the nearest semi-orthogonal matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from .. import _checks, _tree
from .._typing import DType, Number, PyTree, jitted
from ..storage.directions import OrthogonalizeState
from ..storage.protocol import check_leaves
from .dimensions import WeightDimensionNumbers, matrices_of
from .exchange import Direction, directions
from .layout import Layout, layout_of
from .newton_schulz import PRECONDITIONINGS, Coefficients, Preconditioning, coefficients_of, newton_schulz
from .placement import AnyMesh, check_placement, mesh_of, specs_of


def on_matrices(
    direction: Direction,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    *,
    dtype: DType | None = None,
    mesh: AnyMesh | None = None,
    specs: PyTree = None,
) -> optax.GradientTransformation:
    r"""Apply a function to whole matrices: those of one shape as one batch, gathered where they are sharded.

        polar = lambda x: (lambda u, s, v: u @ v)(*jnp.linalg.svd(x, full_matrices=False))
        exact = mo.matrices.on_matrices(polar)           # in the place of mo.orthogonalize()

    All matrices of one shape are one batch, in one call. Over a mesh each device calls `direction` on its share: the
    leaves of one shape and split are stacked, sent by one `all_to_all` to where each matrix is whole, and back by
    another. For L matrices on n devices that split them, of 4 bytes an element, a device receives
    $8/n \cdot \lceil L/n \rceil n/L$ bytes per parameter, however they are split, and does 1/n of the operations times
    the same factor. Devices with equal parts, along a data axis, share the work too and then gather. Inside
    a `shard_map` or `pmap` that you write, a leaf is what the device holds, such as a worker's whole matrices, and
    nothing is gathered.

    Args:
      direction: From a batch (count, m, n), m <= n, to one of the same shape and dtype, each matrix from its own. A
        matrix of more rows than columns comes transposed. Zeros, which pad a batch, must give finite numbers.
      weight_dimension_numbers: Which axes of each parameter are a matrix: `optax.contrib.MuonDimensionNumbers` for all,
        a tree of them like the parameters or a prefix, or a function from the parameters to one. Other axes count
        matrices. None takes each parameter for a matrix.
      dtype: Of the arithmetic and of what is sent, such as bfloat16; None for the updates' own.
      mesh: The devices of the parameters; None for one device, or for the mesh in the types of arrays that have
        explicit axes.
      specs: How the parameters are split: one `PartitionSpec` for all, or a tree of them or of `NamedSharding`. Without
        it the split is read from types with explicit axes, and outside jit from the arrays; within jit a split over
        automatic axes is not visible, and the first axis of each matrix is taken to be split over the whole mesh.
        Other splits give the same numbers, and cost what it takes to change them.

    Returns:
      A transformation without state. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If an argument is of the wrong type; at `init` for a leaf that is not of a float or complex dtype, with
        its path.
      ValueError: If `specs` come without a `mesh`, or name other axes; at `init` and `update` for a leaf without
        dimension numbers, or whose split is uneven, with its path.
    """
    if not callable(direction):
        raise TypeError(f"direction must be a function of a batch of matrices, got {_checks.shown(direction)}")
    check_placement(mesh, specs)
    wanted = None if dtype is None else _float_dtype(dtype)

    def init(params: optax.Params) -> optax.EmptyState:
        bare = _tree.unboxed(params)
        matrices_of(weight_dimension_numbers, bare)
        check_leaves(bare)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        bare = _tree.unboxed(updates)
        paths, axes = matrices_of(weight_dimension_numbers, bare)

        def new(leaves: list[jax.Array]) -> list[jax.Array]:
            leaves = [jnp.asarray(x) for x in leaves]
            found = mesh_of(leaves, mesh)
            named = list(zip(paths, leaves, strict=True))
            split = [_WHOLE] * len(leaves) if found is None else specs_of(named, axes, found, specs, bare)
            lengths = {} if found is None else found.shape
            rows = zip(leaves, axes, split, strict=True)
            layouts = tuple(layout_of(x.shape, a, _dtype_for(x, wanted), spec, lengths) for x, a, spec in rows)
            return _directions(direction, leaves, layouts, found)

        return _tree.map_together(new, updates), state

    return optax.GradientTransformation(init, update)


_WHOLE = PartitionSpec()


def _directions(
    direction: Direction, leaves: list[jax.Array], layouts: tuple[Layout, ...], mesh: AnyMesh | None
) -> list[jax.Array]:
    """The direction of each leaf, laid out over the mesh as its layout says; without a mesh on one device."""
    if mesh is None or not leaves:
        return directions(direction, leaves, layouts, {})
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    run: Callable[..., list[jax.Array]] = _on_mesh if traced else _compiled_on_mesh
    return run(direction, layouts, mesh, *leaves)


def _on_mesh(direction: Direction, layouts: tuple[Layout, ...], mesh: AnyMesh, *leaves: jax.Array) -> list[jax.Array]:
    """`directions` of leaves that are split over a mesh as their layouts say."""
    specs = tuple(layout.spec for layout in layouts)
    # Copies are equal because they are gathered, which JAX cannot see from their types.
    run: Callable[..., tuple[jax.Array, ...]] = jax.shard_map(
        lambda *parts: tuple(directions(direction, parts, layouts, mesh.shape)),
        mesh=mesh,
        in_specs=specs,
        out_specs=specs,
        check_vma=False,
    )
    return list(run(*leaves))


# Outside jit a `shard_map` would run operation by operation.
_compiled_on_mesh = jax.jit(_on_mesh, static_argnums=(0, 1, 2))


def _float_dtype(dtype: DType) -> DType:
    """`dtype` as one of those in which matrices of any size can be kept."""
    is_array = hasattr(dtype, "shape") and not isinstance(dtype, type | np.dtype)
    try:
        found = None if is_array else jnp.dtype(dtype)
    except TypeError:
        found = None
    # Not float16, in which gradients below 1e-7 are zero.
    if found not in (jnp.bfloat16, jnp.float32, jnp.float64):
        hint = _checks.static("dtype", dtype) if is_array else ""
        raise TypeError(f"dtype must be None, bfloat16, float32 or float64, got {_checks.shown(dtype)}{hint}")
    return found


def _dtype_for(leaf: jax.Array, wanted: DType | None) -> DType:
    """The dtype of the arithmetic: complex matrices keep their own."""
    return leaf.dtype if wanted is None or jnp.iscomplexobj(leaf) else wanted


def orthogonalize(
    steps: int | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    *,
    coefficients: Coefficients = "standard",
    preconditioning: Preconditioning = "frobenius",
    eps: Number | None = None,
    adaptive: bool = False,
    dtype: DType | None = None,
    mesh: AnyMesh | None = None,
    specs: PyTree = None,
) -> optax.GradientTransformation:
    r"""The nearest semi-orthogonal matrix to each update, by Newton and Schulz's iteration: Muon's direction.

    With $X_0 = u / (\|u\|_F + \epsilon)$, $X \leftarrow a X + (b A + c A^2) X$, $A = X X^H$. The "standard" (a, b, c) =
    (3.4445, -4.7750, 2.0315) bring singular values of $X_0$ from [0.01, 1] to [0.68, 1.14] in five steps; they need not
    converge. All matrices of one shape are iterated together, and each is whole on one device, see
    `matrices.on_matrices`: the transformation that takes any other direction, too.

    Small singular values become as large as the others, and with them what rounding made of them. So momentum before
    it must not be kept in int4, and in int8 with care: `muon` and `compress` say so, a chain by hand does not.

    Args:
      steps: The number of iterations, a whole number of at least 1 that is static; None for 5, or for one with each
        of a sequence of coefficients.
      weight_dimension_numbers: Which axes of each parameter are a matrix, see `matrices.on_matrices`.
      coefficients: "standard"; "polar_express", the best for singular values of at least 1e-3; Optax's "dion"; (a, b,
        c); or a sequence of such triples, one for each iteration. The last of a preset is repeated.
      preconditioning: What u is divided by first, as in Optax: "frobenius" or "spectral" norm, "schatten" for its
        Schatten-4 norm, "aol" for an almost orthogonal layer's row sums; the last two save about one iteration.
      eps: What is added to the norm, at least 0; None for 1e-8.
      adaptive: Multiply each matrix by its inner product with u, the dual norm of u. Optax's sums over all matrices of
        a leaf.
      dtype: Of the iterations, and of what devices send: bfloat16 halves that; None for the updates' own.
      mesh: The devices of the parameters, see `matrices.on_matrices`.
      specs: How the parameters are split.

    Returns:
      A transformation without state, for matrices. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a number is out of range or there is no such preset; at `init` and `update` if a leaf is not a
        matrix, with its path: `muon` gives others to another optimizer.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. Amsel et al., "The Polar Express",
      2025, arXiv:2505.16932. Boissin et al., "Turbo-Muon", 2025, arXiv:2512.04632 (AOL). Grishina et al., 2025,
      arXiv:2506.10935 (Schatten-4). Bernstein and Newhouse, "Old optimizer, new norm", 2024, arXiv:2409.20325
      (adaptive).
    """
    triples = coefficients_of(coefficients, steps)
    _checks.choice("preconditioning", preconditioning, PRECONDITIONINGS)
    _checks.flag("adaptive", adaptive)
    eps = 1e-8 if eps is None else eps
    _checks.constant("eps", eps, "[0, inf)")

    # Outside jit its loop would be compiled at every step.
    @jitted
    def direction(x: jax.Array) -> jax.Array:
        new = newton_schulz(x, triples, eps, preconditioning)
        return new * jnp.sum(x.conj() * new, axis=(-2, -1), keepdims=True) if adaptive else new

    tx = on_matrices(direction, weight_dimension_numbers, dtype=dtype, mesh=mesh, specs=specs)

    def init(params: optax.Params) -> OrthogonalizeState:
        tx.init(params)
        return OrthogonalizeState()

    def update(
        updates: optax.Updates, state: OrthogonalizeState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OrthogonalizeState]:
        new: optax.Updates = tx.update(updates, optax.EmptyState(), params)[0]
        return new, state

    return optax.GradientTransformation(init, update)
