"""Muon on every kind of tree, and what it says of gradients and states that do not fit."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import momentum_optax as mo

ODD = {
    "tuple": (jnp.ones((3, 4)), [jnp.ones((4, 2)), None], ()),
    "scalar": jnp.float32(1),
    "number": 1.0,
    "numpy": np.ones((3, 4), np.float32),
    "no inputs": jnp.ones((0, 4)),
    "no outputs": jnp.ones((4, 0)),
    "empty": jnp.ones(0),
    "one": jnp.ones((1, 1)),
    "row": jnp.ones((1, 7)),
    "column": jnp.ones((7, 1)),
    "masked": optax.MaskedNode(),
    "bfloat16": {"kernel": jnp.ones((3, 4), jnp.bfloat16), "bias": jnp.ones(4, jnp.bfloat16)},
    "float16": jnp.ones((3, 4), jnp.float16),
    "complex": {"kernel": jnp.ones((3, 4), jnp.complex64), "bias": jnp.ones(4, jnp.complex64)},
}
TREES = [*ODD.values(), {}, ODD]
PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@pytest.mark.parametrize("make", [mo.muon, mo.normuon])
def test_every_tree_keeps_its_types(make):
    tx = make(0.1)
    for params in TREES:
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
        assert types(updates) == types(params)
        assert types(new) == types(state)


@pytest.mark.slow
@pytest.mark.parametrize("make", [mo.muon, mo.normuon])
def test_updates_of_every_tree_are_finite(make):
    tx = make(0.1)
    for gradients in (ODD, jax.tree.map(jnp.zeros_like, ODD)):
        updates, _ = jax.jit(tx.update)(gradients, jax.jit(tx.init)(ODD), ODD)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


BOXES = {"linen": lambda x: nn.Partitioned(x, (None,) * np.ndim(x)), "nnx": nnx.Param}
MIXED = {
    "muon": mo.muon(0.1, weight_decay=0.1),
    "normuon": mo.normuon(0.1, mo.nesterov(0.9), storage="bfloat16"),
    "no velocity": mo.muon(0.1, mo.ema(0.0)),
    "two storages": mo.muon(0.1, mo.aggregated(), storage={"w": "bfloat16", "b": "float32"}),
}


def program(tx, *trees):
    """What a step computes from the leaves of (gradients, state, parameters), and the structure of what it returns."""
    leaves, treedef = jax.tree.flatten(trees)
    jaxpr, out = jax.make_jaxpr(lambda *x: tx.update(*jax.tree.unflatten(treedef, x)), return_shape=True)(*leaves)
    return str(jaxpr), out


@pytest.mark.parametrize("of_w", [PARAMS["w"], None], ids=["all", "none of a matrix"])
@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("name", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in [*MIXED][1:])])
def test_boxes_may_be_around_any_leaves_of_the_state_the_gradients_and_the_parameters(name, kind, of_w):
    tx, gradients = MIXED[name], PARAMS | {"w": of_w}
    expected, _ = program(tx, gradients, jax.eval_shape(tx.init, PARAMS), PARAMS)

    def in_boxes(tree, keys):
        return {key: BOXES[kind](x) if key in keys else x for key, x in tree.items()}

    subsets = ["", "w", "b", "wb"]
    for of_state, of_gradients, of_params in itertools.product(subsets, repeat=3):
        state = jax.eval_shape(tx.init, in_boxes(PARAMS, of_state))
        given = in_boxes(gradients, of_gradients)
        computed, (updates, new) = program(tx, given, state, in_boxes(PARAMS, of_params))
        assert computed == expected
        assert jax.tree.structure(updates) == jax.tree.structure(given)
        assert jax.tree.structure(new) == jax.tree.structure(state)


def test_the_other_optimizer_sees_gradients_in_the_boxes_of_its_mask():
    boxed = {key: BOXES["linen"](x) for key, x in PARAMS.items()}
    tx = mo.muon(0.1, others=optax.adamw(0.1, mask=jax.tree.map(lambda x: x.ndim > 1, boxed)))
    state = jax.eval_shape(tx.init, boxed)
    assert program(tx, PARAMS, state, boxed)[0] == program(tx, boxed, state, boxed)[0]


def test_none_for_another_parameter_in_a_box_is_named():
    boxed = {key: nn.Partitioned(x, ("x",) * x.ndim) for key, x in PARAMS.items()}
    tx = mo.muon(0.1)
    with pytest.raises(ValueError, match=r"others takes no gradient of None, got one for params\['b'\]: give zeros"):
        jax.eval_shape(tx.update, boxed | {"b": None}, jax.eval_shape(tx.init, boxed), boxed)


WRONG = {
    "one too few": ({"w": PARAMS["w"]}, None, r"the gradients lack params\['b'\], present at init"),
    "one too many": ({**PARAMS, "c": PARAMS["b"]}, None, r"the gradients have params\['c'\], absent at init"),
    "another shape": ({**PARAMS, "w": jnp.ones((4, 3))}, None, r"params\['w'\] must have shape \(3, 4\), got \(4, 3\)"),
    "no gradient of another parameter": (
        {**PARAMS, "b": None},
        None,
        r"others takes no gradient of None, got one for params\['b'\]: give zeros",
    ),
    "the state of Optax's": (
        PARAMS,
        lambda: optax.contrib.muon(0.1).init(PARAMS),
        "a partition into adam, muon, and this optimizer's into matrices, others: begin with",
    ),
    "the state of NorMuon": (PARAMS, lambda: mo.normuon(0.1).init(PARAMS), "must be a chain of 5 states, got"),
    "the state of SGD": (PARAMS, lambda: optax.sgd(0.1, 0.9).init(PARAMS), "the state must be a PartitionState, got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_with_a_way_out(name):
    gradients, make, match = WRONG[name]
    tx = mo.muon(0.1)
    state = jax.eval_shape(make or (lambda: tx.init(PARAMS)))
    with pytest.raises(ValueError, match=match) as caught:
        jax.eval_shape(tx.update, gradients, state, PARAMS)
    assert len(str(caught.value)) < 300


def test_a_rule_of_every_kind_is_a_momentum_of_muon():
    for rule in (mo.heavy_ball(0.9), mo.aggregated(), mo.nesterov(mo.schedules.fista()), mo.ema(0.0), mo.adan_mix()):
        tx = mo.muon(0.1, rule)
        state = jax.eval_shape(tx.init, PARAMS)
        updates, new = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
        assert types((updates, new)) == types((PARAMS, state))


def test_updates_of_another_shape_are_named_by_the_scale_of_neurons():
    tx = mo.matrices.scale_by_neuron()
    state = tx.init({"w": jnp.ones((3, 4))})
    match = r"update for params\['w'\] must fit the second moment of shape \(1, 4\), .* got shape \(3, 5\)"
    with pytest.raises(ValueError, match=match):
        tx.update({"w": jnp.ones((3, 5))}, state)


def test_the_state_of_optax_s_muon_is_refused_with_the_call_that_takes_it_over():
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    tx, other = mo.muon(0.1), optax.contrib.muon(0.1)
    theirs = other.init(params)
    with pytest.raises(ValueError, match=r"begin with mo\.interop\.from_optax\(tx\.init\(params\), opt_state\)"):
        tx.update(params, theirs, params)
    tx.update(params, mo.interop.from_optax(tx.init(params), theirs), params)


@pytest.mark.parametrize("kernel", [None, nnx.Param(None)], ids=["none", "a box of none"])
def test_in_boxes_of_nnx_a_matrix_without_gradient_leaves_the_structure_of_the_state(kernel):
    params = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    tx = mo.muon(0.1)
    gradients = jax.tree.map(jnp.ones_like, params)
    gradients["kernel"] = kernel
    state = jax.eval_shape(tx.init, params)
    _, new = jax.eval_shape(tx.update, gradients, state, params)
    # Older Flax compares its states by identity.
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.leaves(new) == jax.tree.leaves(state)
