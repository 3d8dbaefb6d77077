"""Every option of `muon` against `optax.contrib.muon`, stacks against their layers, and `normuon` against its paper."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo

D = optax.contrib.MuonDimensionNumbers
SHAPES = {"tall": (6, 4), "wide": (4, 6), "bias": (5,), "conv": (3, 2, 2, 5), "stack": (2, 4, 6), "heads": (6, 2, 3)}
NUMBERS = {
    **{name: D() for name in ("tall", "wide")},
    **{"bias": None, "conv": D((0, 1, 2), 3), "stack": D(-2, -1), "heads": D(0, (1, 2))},
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def steps(tx, count=3, like=lambda tree: tree):
    """The updates of some steps, compiled, and their last state."""
    params = like(tree(0))
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for seed in range(1, count + 1):
        u, state = update(like(tree(seed)), state, params)
        out.append(u)
    return out, state


# What is the same in both, as arguments of ours and of Optax's.
SAME = {
    "defaults": ({}, {}),
    "aol": ({"preconditioning": "aol"},) * 2,
    "schatten": ({"preconditioning": "schatten"},) * 2,
    "spectral": ({"preconditioning": "spectral"},) * 2,
    "dion": ({"coefficients": "dion"}, {"ns_coeffs": "dion"}),
    "triples": (
        {"coefficients": ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))},
        {"ns_coeffs": ((2, -1.5, 0.5), (1.5, -0.5, 0))},
    ),
    "one triple": ({"coefficients": (2.0, -1.5, 0.5), "steps": 3}, {"ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": 3}),
    "steps": ({"steps": 2}, {"ns_steps": 2}),
    "eps": ({"eps": 0.3, "others": optax.nadam(0.1, eps=0.3)}, {"eps": 0.3}),
    "consistent_rms": ({"consistent_rms": 0.3},) * 2,
    "rms": ({"scale": "rms"}, {"consistent_rms": 0.2}),
    "decay": ({"weight_decay": 0.1},) * 2,
    "masked decay": (
        {"weight_decay": 0.1, "mask": {**dict.fromkeys(SHAPES, True), "conv": False}},
        {"weight_decay": 0.1, "weight_decay_mask": {**dict.fromkeys(SHAPES, True), "conv": False}},
    ),
    "beta": ({"momentum": mo.nadam_mix(0.8, psi=1e6)}, {"beta": 0.8}),
    "no look-ahead": (
        {"momentum": mo.ema(0.95), "others": optax.adam(0.1)},
        {"nesterov": False},
    ),
    "others": (
        {"others": optax.adamw(0.01, 0.8, 0.9, eps_root=1e-3, weight_decay=0.2, nesterov=True)},
        {
            **{"adam_learning_rate": 0.01, "adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 1e-3},
            "adam_weight_decay": 0.2,
        },
    ),
}
# The fast test; the others are slow ones.
FAST = {("masked decay", "dimension numbers")}
ROWS = [
    pytest.param(name, numbers, id=f"{name}, {kind}", marks=() if (name, kind) in FAST else pytest.mark.slow)
    for name in SAME
    for kind, numbers in (("dimension numbers", NUMBERS), ("matrices", None))
]


@pytest.mark.parametrize(("name", "numbers"), ROWS)
def test_every_option_is_optax_s(name, numbers, x64):
    here, there = SAME[name]
    # The debiasing of Optax's default momentum; an average orthogonalises the same with and without.
    options = {"momentum": mo.nadam_mix(0.95, psi=1e6), "weight_dimension_numbers": numbers, **here}
    ours, _ = steps(mo.muon(0.1, **options))
    theirs, _ = steps(optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers, **there))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * abs(b).max())


def test_no_option_of_optax_s_is_left_out():
    here = {"learning_rate", "adaptive", "mu_dtype", "muon_weight_dimension_numbers"}
    tested = {option for _, there in SAME.values() for option in there}
    # An older Optax has fewer.
    assert set(inspect.signature(optax.contrib.muon).parameters) <= here | tested


@pytest.mark.slow
def test_mu_dtype_is_a_storage_up_to_the_product_that_optax_rounds_too():
    single = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    nearest, rule = mo.storage.bfloat16("nearest"), mo.nadam_mix(0.95, psi=1e6)
    _, state = steps(mo.muon(0.1, rule, storage=nearest), like=single)
    _, other = steps(optax.contrib.muon(0.1, mu_dtype=jnp.bfloat16), like=single)
    (ours,), theirs = mo.velocity(state), optax.tree.get(other.inner_states["muon"], "mu")
    for name in ("tall", "wide"):
        assert theirs[name].dtype == state.inner_states["matrices"].inner_state[0].velocity[0][0][name].dtype
        # In each of three steps a product with a decay in bfloat16, and a sum.
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=3 * 3 * 2.0**-9 * abs(theirs[name]).max())


@pytest.mark.slow
def test_adaptive_multiplies_each_matrix_by_its_dual_norm(x64):
    rule = mo.nadam_mix(0.95, psi=1e6)
    two = {k: v for k, v in NUMBERS.items() if k != "stack"}
    ours, _ = steps(
        mo.muon(0.1, rule, adaptive=True, weight_dimension_numbers=two),
        like=lambda t: {k: v for k, v in t.items() if k in two},
    )
    theirs, _ = steps(
        optax.contrib.muon(0.1, adaptive=True, muon_weight_dimension_numbers=two),
        like=lambda t: {k: v for k, v in t.items() if k in two},
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * abs(b).max())


@pytest.mark.parametrize(
    "make",
    [pytest.param(partial(mo.muon, adaptive=True), marks=pytest.mark.slow), mo.normuon],
    ids=["muon", "normuon"],
)
def test_a_stack_is_its_layers_one_by_one(make, x64):
    (*_, stacked), _ = steps(
        make(0.1, weight_dimension_numbers={"stack": D(1, 2)}), like=lambda t: {"stack": t["stack"]}
    )
    (*_, layers), _ = steps(make(0.1), like=lambda t: list(t["stack"]))
    np.testing.assert_allclose(stacked["stack"], jnp.stack(layers), rtol=0, atol=1e-12)


def test_a_scale_is_a_name_or_a_factor_for_all(x64):
    g = tree(0)["wide"]
    plain, _ = mo.orthogonalize().update(g, optax.EmptyState())
    for scale, factor in (("spectral", 1.5**0.5), ("rms", 0.2 * 6**0.5), (3.0, 3.0)):
        got, _ = mo.matrices.scale_by_shape(scale).update(plain, optax.EmptyState())
        np.testing.assert_allclose(got, factor * plain, rtol=1e-15)
    with pytest.raises(ValueError, match="scale must be one of 'spectral', 'rms', got 'moonlight'"):
        mo.muon(0.1, scale="moonlight")
    with pytest.raises(ValueError, match="consistent_rms is a scale: leave out scale, got 'rms'"):
        mo.muon(0.1, scale="rms", consistent_rms=0.2)


@pytest.mark.slow
def test_a_missing_gradient_keeps_a_matrix_s_velocity_and_parameters_are_needed_for_a_decay_only():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), tree(0))
    tx = mo.muon(0.1, weight_dimension_numbers=NUMBERS)
    _, state = tx.update(params, tx.init(params))
    u, after = tx.update({**params, "wide": None, "stack": None}, state)
    assert u["wide"] is None
    assert u["stack"] is None
    assert u["bias"].shape == (5,)
    (old,), (new,) = mo.velocity(state), mo.velocity(after)
    np.testing.assert_array_equal(old["stack"], new["stack"])
    assert jax.tree.structure(after) == jax.tree.structure(state)
    with pytest.raises(TypeError, match=r"others must be a transformation with init and update, got 0\.1"):
        mo.muon(0.1, others=0.1)


def normuon(grads, rate, beta, b2):
    """The paper's algorithm with its code's look-ahead and norm, for (outputs, inputs); NumPy float64."""
    momentum, moment = 0.0, 0.0
    for g in grads:
        momentum = beta * momentum + (1 - beta) * g
        x = beta * momentum + (1 - beta) * g
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        moment = b2 * moment + (1 - b2) * np.mean(x * x, axis=1, keepdims=True)
        normalized = x / np.sqrt(moment)
        normalized *= np.linalg.norm(x) / np.linalg.norm(normalized)
        yield -rate * max(1, g.shape[0] / g.shape[1]) ** 0.5 * normalized


def test_normuon_is_the_paper_s_loop_and_keeps_a_number_for_each_neuron(x64):
    ours, state = steps(mo.normuon(0.02, 0.9, 0.8, weight_dimension_numbers=NUMBERS), count=4)
    (found,) = [
        x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "second_moment")) if hasattr(x, "second_moment")
    ]
    shapes = {name: x.shape for name, x in found.second_moment.items() if hasattr(x, "shape")}
    assert shapes == {"tall": (1, 4), "wide": (1, 6), "conv": (1, 1, 1, 5), "stack": (2, 1, 6), "heads": (1, 2, 3)}
    for name, matrix in (
        ("tall", lambda x: x.T),
        ("wide", lambda x: x.T),
        ("conv", lambda x: x.reshape(-1, 5).T),
        ("stack", lambda x: x[1].T),
        ("heads", lambda x: x.reshape(6, 6).T),
    ):
        grads = [matrix(np.asarray(tree(seed)[name])) for seed in range(1, 5)]
        for u, expected in zip(ours, normuon(grads, 0.02, 0.9, 0.8), strict=True):
            np.testing.assert_allclose(matrix(np.asarray(u[name])), expected, rtol=0, atol=1e-8)


def test_the_warning_of_int8_is_at_the_line_of_the_user():
    for make in (mo.muon, mo.normuon):
        with pytest.warns(UserWarning, match="storage int8 turns the orthogonalised direction") as seen:
            make(0.1, storage="int8")
        assert {x.filename for x in seen} == {__file__}
