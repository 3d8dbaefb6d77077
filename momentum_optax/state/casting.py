"""Trees in the dtypes of others of the same structure and shapes."""

import jax
import jax.numpy as jnp

from .._typing import DType, KeyPath, Leaf, PyTree, TreeDef

STRUCTURE = "like must have the structure of the new state"


def forms(tree: PyTree) -> tuple[TreeDef, list[tuple[tuple[int, ...], DType]]]:
    """Structure, shapes and dtypes."""
    return jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]


def cast(old: PyTree, like: PyTree, where: str) -> PyTree:
    """`old` in the dtypes of `like`.

    Raises:
      ValueError: If structure or shapes differ, or the storage of a leaf, or if complex values would become real; with
        the place `where` and the path below.
    """
    treedef: TreeDef = jax.tree.structure(old)
    structure: TreeDef = jax.tree.structure(like)
    if treedef != structure:
        raise ValueError(f"{STRUCTURE} in {where}, which has {treedef.num_leaves} leaves, got {structure.num_leaves}")

    def cast_leaf(path: KeyPath, x: Leaf, y: Leaf) -> Leaf:
        place = where + jax.tree_util.keystr(path)
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"like must have the shapes of the new state, {jnp.shape(x)} at {place}, got {jnp.shape(y)}"
            )
        if jnp.iscomplexobj(x) and not jnp.iscomplexobj(y):
            raise ValueError(f"like must be complex as the new state at {place}, got {jnp.result_type(y)}")
        if (jnp.result_type(x) == jnp.bool_) != (jnp.result_type(y) == jnp.bool_):
            # A bool stands for a leaf that is not here.
            raise ValueError(f"like must keep each leaf in the storage of the new state, got another one at {place}")
        # What comes from `like` may be a `ShapeDtypeStruct`.
        return x if x is y else jnp.asarray(x, y.dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, old, like)
