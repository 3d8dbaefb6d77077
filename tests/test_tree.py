"""Trees are taken apart and put together in one place, once per update."""

import ast
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import _tree

PACKAGE = pathlib.Path(mo.__file__).parent
FLATTENS = {"flatten", "flatten_up_to", "tree_flatten", "tree_flatten_with_path", "tree_unflatten", "unflatten"}


def calls(path):
    """Names of the methods and functions that a module calls by attribute, `_tree`'s own apart."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "_tree"):
            yield node.attr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_trees_are_flattened_in_one_place(path):
    name = path.relative_to(PACKAGE).as_posix()
    assert name == "_tree.py" or not FLATTENS & set(calls(path))


def passed(leaves):
    """The number of calls of each function of the package while an update of int8 leaves is traced."""
    tx = mo.sgd(0.1, 0.9, storage=mo.storage.int8(min_size=1))
    params = {str(i): jnp.ones((8, 8)) for i in range(leaves)}
    state, calls = tx.init(params), {}

    def count(frame, event, _):
        code = frame.f_code
        # What is no function of ours, comprehensions say, is not counted.
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            key = code.co_filename, code.co_qualname
            calls[key] = calls.get(key, 0) + 1

    jax.make_jaxpr(partial(tx.update))(params, state)  # traces the codes of a leaf
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        jax.make_jaxpr(partial(tx.update))(params, state)  # another function: nothing is cached
    finally:
        sys.setprofile(before)
    return calls


def test_a_leaf_passes_few_functions():
    one, three = passed(1), passed(3)
    of_leaves = {name for name in three if three[name] > one[name]}
    of_trees = {name for name in three if name[0] == _tree.__file__}
    assert 10 < len(of_leaves)
    assert len(of_leaves | of_trees) <= 25
    # The tree is transposed once on the way in and once on the way out, and coefficients are put in once.
    once = ("update_leaves", "to_leaf_states", "to_trees", "relative_scales", "_Runner.resolved")
    assert [three[name] for name in sorted(three) if name[1] in once] == [1] * len(once)


def test_one_state_for_each_leaf_and_back():
    tx = mo.scale_by_momentum(mo.aggregated((0.5, 0.9)), storage=mo.storage.int8(min_size=1))
    params = {"a": jnp.ones((2, 3)), "none": None, "b": [jnp.ones(4), ()]}
    velocity = tx.init(params).velocity
    treedef, leaf_treedef = jax.tree.structure(params), _tree.leaf_treedef_of(velocity)
    states = _tree.to_leaf_states(velocity, treedef, leaf_treedef)
    assert [state.codes[1].shape for state in states] == [(2, 3), (4,)]
    assert all(jax.tree.structure(state) == leaf_treedef for state in states)
    back = _tree.to_trees(states, treedef, leaf_treedef)
    assert jax.tree.structure(back) == jax.tree.structure(velocity)
    assert all(x is y for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(velocity), strict=True))


@pytest.mark.parametrize("params", [{}, None, {"none": None}, ()], ids=str)
def test_a_tree_without_leaves_has_no_states(params):
    tx = mo.scale_by_momentum(mo.heavy_ball(0.9), storage="int8")
    velocity = tx.init(params).velocity
    treedef, leaf_treedef = jax.tree.structure(params), _tree.leaf_treedef_of(velocity)
    assert _tree.to_leaf_states(velocity, treedef, leaf_treedef) == []
    assert _tree.to_trees([], treedef, leaf_treedef) == velocity


def test_numbered_leaves_count_none():
    tree, other = {"a": 1.0, "b": None, "c": 3.0}, {"a": 10.0, "b": 20.0, "c": 30.0}
    new = _tree.map_numbered(lambda place, x, y: (place[1], x, y), tree, other, is_leaf=lambda x: x is None)
    assert new == {"a": (0, 1.0, 10.0), "b": (1, None, 20.0), "c": (2, 3.0, 30.0)}


def test_found_nodes_have_their_paths():
    tx = mo.scale_by_momentum(mo.ema(0.9))
    state = {"inner": [tx.init(jnp.ones(2)), 3.0]}
    ((path, found),) = _tree.find_all(state, mo.transform.MomentumState)
    assert jax.tree_util.keystr(path) == "['inner'][0]"
    np.testing.assert_array_equal(found.velocity.values[0], 0)
