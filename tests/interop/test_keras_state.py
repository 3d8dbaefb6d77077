"""States of Keras' optimizers, there and back."""

import numpy as np
import pytest
from conformance import assert_bit_equal
from interop.live_states import LAYOUTS, NAMES, PARAMS, go_on, grads

import momentum_optax as mo

interop = mo.interop


def keras_variables():
    rng = np.random.default_rng(2)
    return {
        "SGD/iteration": np.int32(7),
        "SGD/learning_rate": np.float32(0.1),
        "SGD/dense_kernel_momentum": rng.normal(size=(4, 3)).astype(np.float32),
        "SGD/dense_bias_momentum": rng.normal(size=3).astype(np.float32),
        "SGD/head_momentum": rng.normal(size=2).astype(np.float32),
    }


KERAS_NAMES = {path: f"SGD/{path.replace('/', '_')}_momentum" for path in NAMES}


def test_keras_velocities_have_the_rate_and_the_sign_in_them():
    there = keras_variables()
    tx = interop.keras_sgd(learning_rate=lambda t: 0.1 / (1 + t), momentum=0.9)
    state = interop.from_keras(tx.init(PARAMS), there, KERAS_NAMES)
    (u,), after = go_on(tx, state, [0])
    v = 0.9 * there["SGD/head_momentum"] - 0.1 / 8 * grads(0)["head"]
    np.testing.assert_allclose(u["head"], v, rtol=1e-6)
    np.testing.assert_allclose(interop.to_keras(after, KERAS_NAMES)["SGD/head_momentum"], v, rtol=1e-6)
    out = interop.to_keras(state, KERAS_NAMES)
    assert_bit_equal(out, {k: there[k] for k in out})
    assert len(out) == 3


def test_keras_variables_may_have_their_axes_in_another_order():
    there = keras_variables() | {"SGD/dense_kernel_momentum": np.arange(12, dtype=np.float32).reshape(3, 4)}
    tx = interop.keras_sgd(learning_rate=0.1, momentum=0.9)
    state = interop.from_keras(tx.init(PARAMS), there, KERAS_NAMES, layouts=LAYOUTS)
    np.testing.assert_array_equal(mo.velocity(state)[0]["dense"]["kernel"], there["SGD/dense_kernel_momentum"].T)
    out = interop.to_keras(state, KERAS_NAMES, layouts=LAYOUTS)
    assert_bit_equal(out, {k: there[k] for k in out})
    with pytest.raises(ValueError, match="names lacks the path 'head'"):
        interop.to_keras(state, {k: v for k, v in KERAS_NAMES.items() if k != "head"})


@pytest.mark.parametrize(
    ("changes", "names", "steps", "match"),
    [
        (
            {"SGD/head_momentum": None},
            KERAS_NAMES,
            None,
            "names has the variable 'SGD/head_momentum', which is not there",
        ),
        ({"SGD/tail_momentum": np.zeros(2)}, KERAS_NAMES, None, "names lacks the variable 'SGD/tail_momentum'"),
        ({"SGD/head_momentum": np.zeros(3)}, KERAS_NAMES, None, r"'head' must have shape \(2,\), got \(3,\)"),
        ({}, {"head": "SGD/head_momentum"}, None, "names lacks the path 'dense/bias'"),
        ({}, KERAS_NAMES, 8, "steps must be the iteration of variables, 7, or None, got 8"),
        ({"SGD/iteration": None}, KERAS_NAMES, None, "steps must be given"),
    ],
)
def test_keras_variables_that_do_not_fit_are_named(changes, names, steps, match):
    there = {k: v for k, v in (keras_variables() | changes).items() if v is not None}
    tx = interop.keras_sgd(learning_rate=lambda t: 0.1, momentum=0.9)
    with pytest.raises(ValueError, match=match):
        interop.from_keras(tx.init(PARAMS), there, names, steps=steps)


def test_keras_without_momentum_has_nothing_to_convert():
    tx = interop.keras_sgd()
    assert interop.to_keras(tx.init(PARAMS), {}) == {}
    interop.from_keras(tx.init(PARAMS), {"SGD/iteration": np.int32(3)}, {})
    with pytest.raises(ValueError, match="variables has 'SGD/dense_kernel_momentum', and opt_state no velocity"):
        interop.from_keras(tx.init(PARAMS), keras_variables(), KERAS_NAMES)
    for variables in ([], {1: np.zeros(2)}):
        with pytest.raises(TypeError, match="variables must be a mapping from names to arrays, got"):
            interop.from_keras(tx.init(PARAMS), variables, {})
