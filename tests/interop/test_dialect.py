"""The registry: every dialect has all its parts, and every argument does something."""

import inspect

import numpy as np
import optax
import pytest
from interop.dialect_calls import (
    CALLS,
    FIXED,
    IGNORED,
    every,
    follow,
    parameters,
)

import momentum_optax as mo
from momentum_optax.interop.dialect import DIALECTS

interop = mo.interop


def test_every_dialect_has_a_row():

    assert set(CALLS) == set(DIALECTS)
    assert set(CALLS) == {n for n, f in vars(interop).items() if "storage" in parameters(f)}


@every
def test_every_argument_changes_the_steps(name):
    base, others = CALLS[name]
    function = getattr(interop, name)
    arguments = set(parameters(function)) - {"storage"} - {a for d, a in FIXED if d == name} - IGNORED
    assert set(others) == arguments
    before = follow(function(**base))
    for argument, value in others.items():
        after = follow(function(**{**base, argument: value}))
        assert abs(after - before).max() > 1e-6, argument


@every
def test_an_argument_that_the_dialect_does_not_have_is_refused(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'caution'"):
        getattr(interop, name)(**CALLS[name][0], caution=True)


@pytest.mark.parametrize("name", ["torch_sgd", "timm_sgdw", "lion"])
def test_how_pytorch_computes_is_accepted_and_ignored(name):
    function, base = getattr(interop, name), CALLS[name][0]
    before = follow(function(**base))
    for argument in IGNORED:
        for value in (None, False, True):
            np.testing.assert_array_equal(follow(function(**base, **{argument: value})), before)
        with pytest.raises(TypeError, match=f"{argument} must be True or False, got 'yes'"):
            function(**base, **{argument: "yes"})


class Tensor:
    """What of PyTorch's tensors is looked at."""

    def __init__(self, value):
        self.value, self.dtype = np.float32(value), "torch.float32"
        self.shape = self.value.shape

    def detach(self):
        return self

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return np.array(self.value, dtype)


@every
def test_a_rate_may_be_a_tensor_of_one_element(name, x64):
    base, others = CALLS[name]
    rate = next((key for key in ("lr", "learning_rate", "base_lr") if key in others), None)
    if rate is None:
        pytest.skip("it has no rate")
    function = getattr(interop, name)
    expected = follow(function(**{**base, rate: float(np.float32(0.1))}))
    for value in (0.1, [0.1]):
        np.testing.assert_array_equal(follow(function(**{**base, rate: Tensor(value)})), expected)
    with pytest.raises(ValueError, match=r"a tensor must have one element to be a hyperparameter, got shape \(2,\)"):
        function(**{**base, rate: Tensor([0.1, 0.2])})


def test_help_says_that_a_transformation_comes_out():
    for name in CALLS:
        signature = inspect.signature(getattr(interop, name))
        assert signature.return_annotation is optax.GradientTransformationExtraArgs
        assert signature.parameters["storage"].kind is inspect.Parameter.KEYWORD_ONLY
