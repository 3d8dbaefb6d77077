"""The iteration against its reference loop in float64 NumPy, and against the singular value decomposition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.matrices.newton_schulz import coefficients_of, newton_schulz


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def best_quintic(low, high):
    """The odd polynomial of degree 5 that is nearest to 1 on an interval: its error has four equal extremes."""
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(30):
        x = np.array([low, q, r, high])
        *triple, _ = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        a, b, c = triple
        q, r = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a])))
    return np.array(triple)


def polar_express(count, low=1e-3, cushion=0.02407327424182761):
    """Amsel et al., algorithm 1: the best polynomial for where the one before leaves the singular values.

    The interval for the polynomial is not longer than `cushion` allows; then its values are centred at 1 again.
    """
    high = 1.0
    for _ in range(count):
        triple = best_quintic(max(low, cushion * high), high)
        triple *= 2 / sum(triple @ [x, x**3, x**5] for x in (low, high))
        low = triple @ [low, low**3, low**5]
        high = 2 - low
        yield triple / [1.01, 1.01**3, 1.01**5]


# Then the limit, without the factor of safety.
EXPRESS = [*polar_express(7), (1.875, -1.25, 0.375), (1.875, -1.25, 0.375)]


def loop(x, triples):
    for a, b, c in triples:
        gram = x @ x.conj().T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


FIRST = {
    "frobenius": lambda x: x / np.sqrt((abs(x) ** 2).sum()),
    "spectral": lambda x: x / np.linalg.svd(x)[1][0],
    "aol": lambda x: x / np.sqrt(abs(x @ x.conj().T).sum(1))[:, None],
    "schatten": lambda x: x / (np.linalg.svd(x)[1] ** 4).sum() ** 0.25,
}


@pytest.mark.parametrize(
    "preconditioning", [pytest.param(name, marks=() if name == "aol" else pytest.mark.slow) for name in FIRST]
)
def test_every_preconditioning_is_its_formula_for_each_matrix_of_a_batch(preconditioning, x64, rng):
    x = rng.normal(size=(3, 4, 7)) * np.array([1.0, 30.0, 1e-2])[:, None, None]
    triples = coefficients_of("polar_express", 4)
    got = jax.jit(lambda x: newton_schulz(x, triples, 1e-30, preconditioning))(x)
    for one, new in zip(x, got, strict=True):
        np.testing.assert_allclose(new, loop(FIRST[preconditioning](one), triples), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "preconditioning", [pytest.param(name, marks=() if name == "frobenius" else pytest.mark.slow) for name in FIRST]
)
def test_squares_may_leave_the_range_of_float16(preconditioning, rng):
    x = rng.normal(size=(1, 8, 40)) * 1e4
    triples = coefficients_of("polar_express", 8)
    both = jnp.asarray(np.concatenate([x, np.zeros_like(x)]), jnp.float16)
    got = jax.jit(lambda x: newton_schulz(x, triples, 1e-8, preconditioning))(both)
    u, _, v = np.linalg.svd(x[0], full_matrices=False)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got[0], u @ v, rtol=0, atol=0.01)
    assert not got[1].any()


@pytest.mark.parametrize(
    "preconditioning", [pytest.param(name, marks=() if name == "schatten" else pytest.mark.slow) for name in FIRST]
)
def test_squares_may_leave_the_range_of_float32_and_no_digit_changes_below_it(preconditioning, rng):
    x = rng.normal(size=(4, 6)).astype(np.float32)
    x *= 4 / abs(x).max()
    # The largest float times a power of two is in the last batch.
    scales = 2.0 ** np.array([0.0, 13.0, 14.0, 63.0, 100.0, 125.0])
    batch = jnp.asarray(x * scales[:, None, None], jnp.float32)
    run = jax.jit(lambda x, eps: newton_schulz(x, coefficients_of("standard", 5), eps, preconditioning))
    got = run(batch, 1e-30)
    np.testing.assert_allclose(
        got[0], loop(FIRST[preconditioning](np.float64(x)), coefficients_of("standard", 5)), atol=1e-5
    )
    np.testing.assert_allclose(got, jnp.broadcast_to(got[0], got.shape), rtol=0, atol=2e-6)
    # What is added to a norm, or is the least of it, counts as before.
    huge, last = run(batch, 1e30), {"frobenius": 3, "spectral": 3}.get(preconditioning, 2)
    assert abs(huge[last + 1]).max() > 0.1 > abs(huge[last]).max()
    assert np.isnan(run(batch.at[0, 0, 0].set(jnp.inf), 1e-30)[0]).all()


@pytest.mark.parametrize(
    ("given", "steps", "triples"),
    [
        ("standard", None, [(3.4445, -4.7750, 2.0315)] * 5),
        ("standard", 2, [(3.4445, -4.7750, 2.0315)] * 2),
        ((1.5, -0.5, 0.0), 3, [(1.5, -0.5, 0.0)] * 3),
        ([(2, -1.5, 0.5), (1.5, -0.5, 0)], None, [(2, -1.5, 0.5), (1.5, -0.5, 0)]),
    ],
)
def test_coefficients_by_name_once_for_all_and_one_by_one(given, steps, triples):
    np.testing.assert_allclose(coefficients_of(given, steps), triples, rtol=1e-15)


def test_polar_express_is_made_of_the_best_polynomials():
    np.testing.assert_allclose(coefficients_of("polar_express", 9), EXPRESS, rtol=1e-9)
    np.testing.assert_array_equal(coefficients_of("polar_express", None), coefficients_of("polar_express", 9)[:5])


def test_polar_express_converges_to_the_polar_factor_of_badly_conditioned_matrices(x64, rng):
    u, _, v = np.linalg.svd(rng.normal(size=(6, 9)), full_matrices=False)
    x = u * np.geomspace(1, 1e-3, 6) @ v
    tx = mo.orthogonalize(10, coefficients="polar_express")
    got, _ = jax.jit(tx.update)({"wide": jnp.asarray(x), "tall": jnp.asarray(x.T)}, optax.EmptyState())
    np.testing.assert_allclose(got["wide"], u @ v, rtol=0, atol=1e-9)
    np.testing.assert_allclose(got["tall"], (u @ v).T, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_complex_matrices_go_to_their_unitary_factor(x64, rng):
    x = rng.normal(size=(4, 5)) + 1j * rng.normal(size=(4, 5))
    u, _, v = np.linalg.svd(x, full_matrices=False)
    # Schatten's first gram matrix is Hermitian only of the conjugate.
    tx = mo.orthogonalize(12, coefficients="polar_express", preconditioning="schatten")
    got, _ = jax.jit(tx.update)(jnp.asarray(x), optax.EmptyState())
    np.testing.assert_allclose(got, u @ v, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_iterations_in_bfloat16_are_near_the_polar_factor_and_updates_keep_their_dtype(rng):
    u, _, v = np.linalg.svd(rng.normal(size=(6, 40)), full_matrices=False)
    x = jnp.asarray(u * np.linspace(0.5, 1, 6) @ v, jnp.float32)
    tx = mo.orthogonalize(6, coefficients="polar_express", dtype=jnp.bfloat16)
    got, _ = jax.jit(tx.update)(x, optax.EmptyState())
    assert got.dtype == jnp.float32
    assert (got == got.astype(jnp.bfloat16)).all()
    assert np.sum(got * (u @ v)) > 0.99 * np.linalg.norm(got) * 6**0.5
    np.testing.assert_allclose(np.linalg.svd(got)[1], 1, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"steps": 2.5}, TypeError, "steps must be a whole number, got 2.5"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        (
            {"coefficients": "jordan"},
            ValueError,
            "coefficients must be one of 'standard', 'polar_express', 'dion', got",
        ),
        ({"coefficients": (1.0, 2.0)}, ValueError, r"or a sequence of such triples, got numbers of shape \(2,\)"),
        ({"coefficients": (1.0, 2.0, float("nan"))}, ValueError, "coefficients must be finite, got"),
        ({"coefficients": object()}, TypeError, r"coefficients must be a name or numbers \(a, b, c\)"),
        ({"coefficients": [(1, 0, 0)] * 3, "steps": 2}, ValueError, "steps must be None or 3"),
        ({"preconditioning": "aal"}, ValueError, "preconditioning must be one of 'frobenius', 'spectral', 'aol', 'sch"),
        ({"eps": -1.0}, ValueError, r"eps must be in \[0, inf\)"),
        ({"adaptive": 1}, TypeError, "adaptive must be True or False"),
        ({"dtype": jnp.int8}, TypeError, "dtype must be None, bfloat16, float32 or float64, got"),
        ({"dtype": "bf16"}, TypeError, "dtype must be None, bfloat16, float32 or float64, got 'bf16'"),
        ({"dtype": jnp.float16}, TypeError, "dtype must be None, bfloat16, float32 or float64, got"),
    ],
)
def test_arguments_out_of_range_are_refused_when_it_is_built(arguments, error, match):
    for make in (mo.orthogonalize, lambda **options: mo.muon(0.1, **options)):
        with pytest.raises(error, match=match) as caught:
            make(**arguments)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "tx", [mo.orthogonalize(), mo.muon(0.1), mo.normuon(0.1), mo.matrices.scale_by_neuron()], ids=lambda tx: "tx"
)
def test_a_leaf_of_integers_is_named_at_init(tx):
    with pytest.raises(TypeError, match=r"params\['n'\] must have a dtype of .*, got int32"):
        tx.init({"w": jnp.ones((2, 2)), "n": jnp.ones((2, 2), jnp.int32)})


def test_a_direction_is_a_function():
    with pytest.raises(TypeError, match="direction must be a function of a batch of matrices, got 'svd'"):
        mo.matrices.on_matrices("svd")


def products(tx, tree):
    """The matrix products and the loops around them in a lowered update."""
    text = jax.jit(lambda g: tx.update(g, optax.EmptyState())[0]).lower(tree).as_text()
    loops = text.split("stablehlo.while")[1:]
    return text.count("stablehlo.dot_general"), sum("stablehlo.dot_general" in loop for loop in loops)


def test_matrices_of_one_shape_are_one_loop_whatever_leaf_they_are_in():
    one = products(mo.orthogonalize(), {"0": jnp.ones((4, 6))})
    assert one == (3, 1)
    forty = {str(i): jnp.ones((4, 6) if i % 2 else (6, 4)) for i in range(40)}
    assert products(mo.orthogonalize(), forty) == one
    assert products(mo.orthogonalize(), forty | {"other": jnp.ones((4, 5))}) == (6, 2)


def kernels(count):
    """The number of different kernels in a compiled update of so many matrices; those alike are compiled once."""
    tree, tx = {str(i): jnp.ones((4, 6)) for i in range(count)}, mo.orthogonalize()
    text = jax.jit(lambda g: tx.update(g, optax.EmptyState())[0]).lower(tree).compile().as_text()
    bodies = re.findall(r"^%\S*(?:fused|wrapped)\S* (\(.*?)^}", text, re.DOTALL | re.MULTILINE)
    return len({re.sub(r", metadata=\{.*?\}|param\S*:|%[\w.-]+", "", body) for body in bodies})


def test_more_matrices_of_a_shape_need_no_more_kernels():
    assert kernels(16) <= kernels(4) + 1


def test_elsewhere_the_parts_of_a_stack_are_slices():
    tree = {str(i): jnp.ones((4, 6)) for i in range(5)}
    traced = jax.jit(lambda g: mo.orthogonalize().update(g, optax.EmptyState())[0]).trace(tree)
    for platform, loops, slices in (("tpu", 1, 5), ("cuda", 1, 5), ("cpu", 2, 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = text.count("stablehlo.while"), text.count(": (tensor<5x4x6xf32>) -> tensor<1x4x6xf32>")
        assert found == (loops, slices), platform
