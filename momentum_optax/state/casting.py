"""Trees in the dtypes of others of the same structure and shapes."""

import jax
import jax.numpy as jnp

from .._typing import DType, PyTree, TreeDef

STRUCTURE = "like must have the structure of the new state"


def forms(tree: PyTree) -> tuple[TreeDef, list[tuple[tuple[int, ...], DType]]]:
    """Structure, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def cast(old: PyTree, like: PyTree, where: str) -> PyTree:
    """`old` in the dtypes of `like`.

    Raises:
      ValueError: If structure or shapes differ, or the storage of a leaf, with the place `where` and the path below.
    """
    treedef: TreeDef
    structure: TreeDef
    pairs, treedef = jax.tree_util.tree_flatten_with_path(old)
    target, structure = jax.tree.flatten(like)
    if treedef != structure:
        raise ValueError(f"{STRUCTURE} in {where}, which has {treedef.num_leaves} leaves, got {structure.num_leaves}")
    for (path, x), y in zip(pairs, target, strict=True):
        if jnp.shape(x) != jnp.shape(y):
            place = where + jax.tree_util.keystr(path)
            raise ValueError(
                f"like must have the shapes of the new state, {jnp.shape(x)} at {place}, got {jnp.shape(y)}"
            )
        if (jnp.result_type(x) == jnp.bool_) != (jnp.result_type(y) == jnp.bool_):
            # A bool stands for a leaf that is not here.
            place = where + jax.tree_util.keystr(path)
            raise ValueError(f"like must keep each leaf in the storage of the new state, got another one at {place}")
    # What comes from `like` may be a `ShapeDtypeStruct`.
    return treedef.unflatten(
        [x if x is y else jnp.asarray(x, y.dtype) for (_, x), y in zip(pairs, target, strict=True)]
    )
