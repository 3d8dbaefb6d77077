"""Trees are taken apart and put together in one place, once per update."""

import ast
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax import _boxes, _tree
from momentum_optax.storage.mixed import leaf_treedef_of

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
    of_trees = {name for name in three if name[0] in (_boxes.__file__, _tree.__file__)}
    assert 10 < len(of_leaves)
    assert len(of_leaves | of_trees) <= 25
    # The tree is transposed once on the way in and once on the way out, and coefficients are put in once.
    once = ("update_leaves", "to_leaf_states", "to_trees", "relative_scales", "_Runner.resolved")
    assert [three[name] for name in sorted(three) if name[1] in once] == [1] * len(once)


@pytest.mark.parametrize(
    ("rule", "debias", "most"),
    [
        (mo.heavy_ball(0.9), False, 4),
        (mo.heavy_ball(0.9, dampening=0.1, first_step="gradient"), False, 8),
        (mo.heavy_ball(lambda step: 0.9 - 0.1 / (step + 1)), False, 5),
        (mo.ema(0.9), True, 10),
    ],
)
def test_a_leaf_takes_few_operations(rule, debias, most):
    tx = mo.scale_by_momentum(rule, debias=debias)

    def operations(leaves):
        params = {str(i): jnp.ones((2, 3)) for i in range(leaves)}
        return len(jax.make_jaxpr(tx.update)(params, tx.init(params)).eqns)

    assert operations(3) - operations(2) <= most


def test_one_state_for_each_leaf_and_back():
    tx = mo.scale_by_momentum(mo.aggregated((0.5, 0.9)), storage=mo.storage.int8(min_size=1))
    params = {"a": jnp.ones((2, 3)), "none": None, "b": [jnp.ones(4), ()]}
    velocity = tx.init(params).velocity
    treedef, leaf_treedef = jax.tree.structure(params), leaf_treedef_of(velocity)
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
    treedef, leaf_treedef = jax.tree.structure(params), leaf_treedef_of(velocity)
    assert _tree.to_leaf_states(velocity, treedef, leaf_treedef) == []
    assert _tree.to_trees([], treedef, leaf_treedef) == velocity


def test_numbered_leaves_count_none():
    tree, other = {"a": 1.0, "b": None, "c": 3.0}, {"a": 10.0, "b": 20.0, "c": 30.0}
    new = _tree.map_numbered(lambda place, x, y: (place[1], x, y), tree, other, is_leaf=lambda x: x is None)
    assert new == {"a": (0, 1.0, 10.0), "b": (1, None, 20.0), "c": (2, 3.0, 30.0)}


def test_states_are_mapped_with_other_trees_and_may_change_their_form():
    params = {"a": jnp.ones((2, 3)), "none": None, "b": [jnp.ones(4), ()]}
    velocity = mo.scale_by_momentum(mo.aggregated((0.5, 0.9))).init(params).velocity

    def function(place, leaf, other):
        path, i = place
        return {"name": jax.tree_util.keystr(path), "shapes": [x.shape for x in leaf.values], "seen": (i, other)}

    layout = jax.tree.structure({"name": 0, "shapes": 0, "seen": 0})
    other = {"a": 10.0, "none": None, "b": [20.0, ()]}
    new = _tree.map_states(function, velocity, leaf_treedef_of(velocity), other, to=layout)
    assert new["name"] == {"a": "['a']", "none": None, "b": ["['b'][0]", ()]}
    assert new["shapes"] == {"a": [(2, 3)] * 2, "none": None, "b": [[(4,)] * 2, ()]}
    assert new["seen"] == {"a": (0, 10.0), "none": None, "b": [(1, 20.0), ()]}


def test_the_children_of_a_node():
    node = {"a": [1.0, None], "b": optax.EmptyState(), "c": 2.0}
    keys = [(jax.tree_util.keystr(path), child) for path, child in _tree.children(node)]
    assert keys == [("['a']", node["a"]), ("['b']", node["b"]), ("['c']", 2.0)]
    assert [_tree.children(leaf) for leaf in (2.0, None, ())] == [[], [], []]
    assert _tree.map_children(lambda _, child: [child], node) == {key: [child] for key, child in node.items()}
    assert [_tree.map_children(lambda *_: "changed", leaf) for leaf in (2.0, None, ())] == [2.0, None, ()]


def test_the_leaves_of_gradients_and_of_trees_that_fit_them():
    masked = optax.MaskedNode()
    leaves = _tree.Leaves({"a": 1.0, "b": None, "c": masked, "d": [2.0, ()]})
    assert leaves.values == [1.0, None, masked, 2.0]
    other = {"a": 10.0, "b": 20.0, "c": [30.0], "d": [40.0, ()]}
    assert leaves.of(other) == [10.0, 20.0, [30.0], 40.0]
    assert not leaves.fit(other)
    assert leaves.fit({"a": masked, "b": 1.0, "c": None, "d": [None, ()]})
    back = leaves.to_tree([5.0, None, masked, 6.0], {"a": 0.0, "b": None, "c": masked, "d": [0.0, ()]})
    assert back == {"a": 5.0, "b": None, "c": masked, "d": [6.0, ()]}


def test_found_nodes_have_their_paths():
    tx = mo.scale_by_momentum(mo.ema(0.9))
    state = {"inner": [tx.init(jnp.ones(2)), 3.0]}
    ((path, found),) = _tree.find_all(state, mo.transform.MomentumState)
    assert jax.tree_util.keystr(path) == "['inner'][0]"
    np.testing.assert_array_equal(found.velocity.values[0], 0)
