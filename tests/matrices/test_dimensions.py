"""Dimension numbers: trees, prefixes and functions; what does not fit is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.matrices.dimensions import Axes, axes_of_leaves

D = optax.contrib.MuonDimensionNumbers
PARAMS = {"a": {"conv": jnp.ones((3, 3, 2, 5)), "bias": jnp.ones(5)}, "stack": jnp.ones((4, 2, 3)), "none": None}
CONV, STACK = Axes((), (0, 1, 2), (3,)), Axes((0,), (1,), (2,))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"a": {"conv": D((0, 1, 2), 3), "bias": None}, "stack": D(1, 2), "none": None}, [None, CONV, STACK]),
        (
            {"a": {"conv": D((-4, -3, 1 + 1), -1), "bias": None}, "stack": D(-2, [-1]), "none": None},
            [None, CONV, STACK],
        ),
        ({"a": None, "stack": D(-2, -1), "none": None}, [None, None, STACK]),
        (lambda p: jax.tree.map(lambda x: D(-2, -1) if x.ndim == 3 else None, p), [None, None, STACK]),
        (None, [None, None, None]),
    ],
    ids=["a tree", "negative axes", "a prefix", "a function", "none"],
)
def test_every_way_to_say_which_axes_are_a_matrix(given, expected):
    assert axes_of_leaves(given, PARAMS) == expected


def test_one_entry_stands_for_all_and_matrices_are_the_default():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "masked": optax.MaskedNode()}
    assert axes_of_leaves(None, tree) == [Axes((), (0,), (1,)), None]
    assert axes_of_leaves(D(), {"a": tree["a"]}) == [Axes((), (0,), (1,))]
    assert axes_of_leaves({"a": D(), "b": D()}, {}) == []


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"a": D(0, 1), "b": 3}, TypeError, r"must hold optax\.contrib\.MuonDimensionNumbers or None, got 3 for .*'b'"),
        ({"a": ((0,), 1), "b": None}, TypeError, r"MuonDimensionNumbers or None, got \(\(0,\), 1\) for params\['a'\]"),
        ({"a": D(0, 2), "b": None}, ValueError, r"must name axes of params\['a'\], of shape \(2, 3\)"),
        ({"a": D(0, -2), "b": None}, ValueError, "must name different axes .* reduction_axis=0, output_axis=-2"),
        ({"a": D((), 1), "b": None}, ValueError, "at least one each"),
        ({"a": D()}, ValueError, r"must be a tree like the parameters or a prefix of it: it lacks params\['b'\]"),
        ({"a": D(), "c": None}, ValueError, r"lacks params\['b'\] and has params\['c'\], which is no parameter"),
        ([D(), None], ValueError, r"lacks params\['a'\] and has params\[0\]"),
        ({"a": D(None, 1), "b": None}, ValueError, r"must name axes of params\['a'\].*, got reduction_axis=None"),
        ({"a": D("in", 1), "b": None}, ValueError, r"must name axes of params\['a'\].*, got reduction_axis='in'"),
        (jnp.ones(2), TypeError, "static_args='weight_dimension_numbers'"),
    ],
)
def test_what_does_not_fit_is_named_at_init(given, error, match):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with pytest.raises(error, match=match) as caught:
        mo.muon(0.1, weight_dimension_numbers=given).init(params)
    assert len(str(caught.value)) < 300


def test_a_bias_under_the_direction_alone_is_named_with_the_ways_out():
    for init in (True, False):
        tx, tree = mo.orthogonalize(), {"layer": {"bias": np.ones(4, np.float32)}}
        match = r"params\['layer'\]\['bias'\] must be a matrix, got shape \(4,\); .*others=.*optax\.masked"
        with pytest.raises(ValueError, match=match) as caught:
            tx.init(tree) if init else tx.update(tree, optax.EmptyState())
        assert len(str(caught.value)) < 300
