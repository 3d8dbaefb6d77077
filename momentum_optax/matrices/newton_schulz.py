"""Newton and Schulz's iteration for the nearest semi-orthogonal matrix, on batches of matrices."""

import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._typing import DType, Number

Preconditioning: TypeAlias = Literal["frobenius", "spectral", "aol", "schatten"]
PRECONDITIONINGS = get_args(Preconditioning)
# Those by a norm, as `jnp.linalg.norm` has them; the others look at the gram matrix.
_NORMS: dict[str, Literal["fro", 2]] = {"frobenius": "fro", "spectral": 2}
# A name of a preset, one triple (a, b, c) for every iteration, or one for each.
Coefficients: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]]

# Amsel et al., 2025, arXiv:2505.16932, algorithm 1: for singular values from 1e-3, without its factor for safety.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The same paper's factor: singular values up to this do no harm. The last polynomial, repeated after it, has none.
_SAFETY = 1.01
# By name; those of Optax have its names. The last triple of a preset serves all iterations beyond its length.
PRESETS: dict[str, tuple[tuple[float, ...], ...]] = {
    "standard": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]),
        _POLAR_EXPRESS[-1],
    ),
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
_STEPS = 5
# The fourth power of this, times the square of the number of elements, is in the range of float32.
_LARGE = 2.0**16


def coefficients_of(coefficients: Coefficients, steps: int | None) -> np.ndarray:
    """The triples of all iterations, float64 of shape (iterations, 3), of checked arguments.

    Args:
      coefficients: A name in `PRESETS`, a triple, or a sequence of them.
      steps: The number of iterations; None for 5, or for as many as there are in a sequence.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If there is no such preset, a number is not finite, `steps` is below 1 or not the length of a sequence
        of triples.
    """
    if steps is not None:
        _checks.integer("steps", steps, 1)
    if isinstance(coefficients, str):
        _checks.choice("coefficients", coefficients, tuple(PRESETS))
        preset = PRESETS[coefficients]
        chain = itertools.chain(preset, itertools.repeat(preset[-1]))
        return np.array(list(itertools.islice(chain, int(steps or _STEPS))))
    try:
        given = np.array(coefficients, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"coefficients must be a name or numbers (a, b, c), got {_checks.shown(coefficients)}"
            + _checks.static("coefficients", coefficients)
        ) from error
    if not np.all(np.isfinite(given)):
        raise ValueError(f"coefficients must be finite, got {_checks.shown(coefficients)}")
    if given.shape == (3,):
        return np.tile(given, (int(steps or _STEPS), 1))
    if given.ndim != 2 or given.shape[1] != 3 or not len(given):
        raise ValueError(
            f"coefficients must be one of {', '.join(map(repr, PRESETS))}, (a, b, c) or a sequence of such triples, "
            f"got numbers of shape {given.shape}"
        )
    if steps not in (None, len(given)):
        raise ValueError(f"steps must be None or {len(given)}, one for each triple of coefficients, got {steps}")
    return given


def newton_schulz(x: jax.Array, coefficients: np.ndarray, eps: Number, preconditioning: Preconditioning) -> jax.Array:
    r"""$X \leftarrow a X + (b A + c A^2) X$, $A = X X^H$, from a multiple of X with singular values of at most about 1.

    The multiple is $X / (\|X\| + \epsilon)$ with the Frobenius or the spectral norm; or, from the first A, which then
    is not computed again, $D X$ with $D_{ii} = (\sum_j |A_{ij}|)^{-1/2}$ (almost orthogonal layers, AOL), or
    $X / \|A\|_F^{1/2}$ (Schatten-4).

    Args:
      x: Matrices (..., m, n), m <= n, in the dtype of the arithmetic.
      coefficients: (a, b, c) for each iteration.
      eps: In Frobenius and spectral norms as above; in the others the least of what is divided by.
      preconditioning: Which multiple.
    """
    triples = jnp.asarray(coefficients, jnp.finfo(x.dtype).dtype)
    x, gram = _normalized(x, eps, preconditioning)
    if gram is not None:
        x, triples = _polynomial(x, gram, triples[0]), triples[1:]
    # Not unrolled: three products are compiled, however many iterations there are.
    return jax.lax.scan(lambda x, abc: (_polynomial(x, _gram(x), abc), None), x, triples)[0]


def _normalized(x: jax.Array, eps: Number, preconditioning: Preconditioning) -> tuple[jax.Array, jax.Array | None]:
    """The multiple of x that is iterated, and its gram matrix if that is known then.

    Norms are computed in float32 or wider: squares soon leave the range of float16, of which `eps` is the zero.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    factor = _factor_into_range(x)
    eps = jnp.asarray(eps, factor.dtype) * factor
    x = x * factor.astype(jnp.finfo(x.dtype).dtype)
    whole = x.astype(wide)
    if preconditioning in _NORMS:
        norm = jnp.linalg.norm(whole, ord=_NORMS[preconditioning], axis=(-2, -1), keepdims=True)
        return (whole / (norm + eps)).astype(x.dtype), None
    gram = _gram(x, wide)
    if preconditioning == "aol":
        size = jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)
    else:
        size = jnp.linalg.norm(gram, axis=(-2, -1), keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(size, eps * factor))
    return (scale * whole).astype(x.dtype), (scale * gram * jnp.swapaxes(scale, -1, -2)).astype(x.dtype)


def _factor_into_range(x: jax.Array) -> jax.Array:
    """For each matrix a factor that keeps squares, and their squares, from overflowing; float32 or wider.

    A power of two, so that no digit changes; 1 up to what float16 can hold.
    """
    size = jnp.abs(jax.lax.stop_gradient(x)).astype(jnp.promote_types(jnp.finfo(x.dtype).dtype, jnp.float32))
    largest = jnp.max(size, axis=(-2, -1), keepdims=True, initial=0)
    _, exponent = jnp.frexp(largest)
    # Not 1 - exponent: the inverse of the largest floats is not a normal number.
    inverse = jnp.ldexp(jnp.ones_like(largest), 2 - exponent)
    return jnp.where((largest > _LARGE) & jnp.isfinite(largest), inverse, 1)


def _gram(x: jax.Array, dtype: DType = None) -> jax.Array:
    return jnp.matmul(x, jnp.swapaxes(x, -1, -2).conj(), preferred_element_type=dtype)


def _polynomial(x: jax.Array, gram: jax.Array, abc: jax.Array) -> jax.Array:
    a, b, c = abc[0], abc[1], abc[2]
    return a * x + (b * gram + c * gram @ gram) @ x
