"""The registry: every dialect has all its parts, and every argument does something."""

import inspect
import pathlib
import re

import numpy as np
import optax
import pytest
from dialects import CALLS, IGNORED
from interop.dialect_calls import every, follow, parameters
from interop.recipe_pairs import SOURCES

import momentum_optax as mo
from momentum_optax.interop import Recipe
from momentum_optax.interop.agreement import agree
from momentum_optax.interop.description import Description
from momentum_optax.interop.dialect import DIALECTS, dialect
from momentum_optax.interop.recipe import constant_form

interop = mo.interop


def test_every_record_of_the_folder_is_exported():
    files = pathlib.Path(interop.__file__).parent.glob("*.py")
    written = {name for f in files for name in re.findall(r"^@dialect\(.*\)\ndef (\w+)\(", f.read_text(), re.M)}
    assert {name for name in written if not hasattr(interop, name)} == set(), "export them from interop/__init__.py"
    assert written == set(DIALECTS)


def test_every_dialect_is_exported_and_stores_a_velocity():
    assert set(DIALECTS) == {n for n, f in vars(interop).items() if "storage" in parameters(f)}


def no_arguments(form):
    return {}


def nothing(lr=0.1, *, storage="float32"):
    """A dialect that only its name and its record tell from plain descent."""
    return Description(None, lr, storage=storage)


@pytest.mark.parametrize("part", ["inverse", "learning_rate", "momentum"])
def test_a_part_that_is_left_out_is_an_error_on_import(part):
    parts = {"inverse": no_arguments, "learning_rate": "lr", "momentum": None}
    with pytest.raises(TypeError, match=part):
        dialect(**{key: value for key, value in parts.items() if key != part})(nothing)
    assert "nothing" not in DIALECTS


@pytest.mark.parametrize("part", ["learning_rate", "momentum"])
def test_a_part_that_names_no_argument_is_an_error_on_import(part):
    parts = {"inverse": no_arguments, "learning_rate": None, "momentum": None, part: "rate"}
    with pytest.raises(ValueError, match=f"{part} must be an argument of nothing or None, got 'rate'"):
        dialect(**parts)(nothing)
    assert "nothing" not in DIALECTS


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_the_inverse_gives_the_arguments_back_up_to_equal_steps(source):
    record = DIALECTS[source.dialect]
    again = Recipe(source.dialect, **record.arguments(constant_form(source)))
    assert agree(source, again, first=True)
    a, b = source.description(), again.description()
    assert [b.l2, b.decoupled] == pytest.approx([a.l2, a.decoupled], rel=1e-12)
    assert (b.sign, b.maximize) == (a.sign, a.maximize)


@every
def test_the_learning_rate_is_the_argument_that_the_record_names(name):
    record, base = DIALECTS[name], CALLS[name][0]
    if record.learning_rate is None:
        assert record.describe(**base).learning_rate is None
        return
    assert record.describe(**{**base, record.learning_rate: 0.123}).learning_rate == 0.123


@every
def test_the_decay_that_may_be_scheduled_is_the_argument_that_the_record_names(name):
    record, base = DIALECTS[name], CALLS[name][0]
    decays = {"momentum", "beta", "betas"} & set(parameters(getattr(interop, name)))
    for argument in decays:
        scheduled = (lambda t: 0.8 + 0.01 * t,) * 2 if argument == "betas" else lambda t: 0.8 + 0.01 * t
        if record.momentum is None:
            with pytest.raises((TypeError, ValueError), match="must be a "):
                record.describe(**{**base, argument: scheduled})
        else:
            assert record.momentum == argument
            rule = record.describe(**{**base, argument: scheduled}).rule
            assert rule.at(0, 1).A != rule.at(5, 5).A
    assert decays or record.momentum is None


@pytest.mark.one_in(2)
@every
def test_every_argument_changes_the_steps(name):
    base, others = CALLS[name]
    function = getattr(interop, name)
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
