"""States of PyTorch's optimizers, there and back: every entry that does not fit is named."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal
from interop.live_states import LAYOUTS, NAMES, PARAMS, go_on, grads, take, torch_state

import momentum_optax as mo

interop = mo.interop


def test_torch_buffers_come_in_and_go_out_in_the_layout_that_is_said():
    there = torch_state()
    state = take(there)
    (v,) = mo.velocity(state)
    np.testing.assert_array_equal(v["dense"]["kernel"], there["state"][0]["momentum_buffer"].T)
    np.testing.assert_array_equal(v["dense"]["bias"], there["state"][1]["momentum_buffer"])
    back = interop.to_torch(state, {"state": {}, "param_groups": there["param_groups"]}, NAMES, layouts=LAYOUTS)
    assert list(back) == ["state", "param_groups"]
    assert list(back["state"]) == [0, 1, 2]
    assert_bit_equal(back["state"], there["state"])
    assert back["state"][0]["momentum_buffer"].flags.c_contiguous
    assert back["state"][0]["momentum_buffer"].flags.writeable


def test_parameters_may_go_by_their_names():
    there = torch_state()
    there["param_groups"][0]["param_names"] = ["fc.weight", "fc.bias", "out"]
    names = {"dense/kernel": "fc.weight", "dense/bias": "fc.bias", "head": "out"}
    assert_bit_equal(take(there, names), take())
    with pytest.raises(ValueError, match=r"names\['head'\] must be a parameter of state_dict, which names 'fc.weight'"):
        take(there, names | {"head": "nowhere"})
    with pytest.raises(ValueError, match=r"which names none: give its number, got 'fc.weight'"):
        take(names=names)


def test_several_groups_are_one_optimizer():
    there = torch_state()
    first = there["param_groups"][0]
    there["param_groups"] = [first | {"params": [0, 2]}, first | {"params": [1]}]
    assert_bit_equal(take(there), take())


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_parameter_without_a_buffer_takes_its_first_step_here(dampening):
    tx = interop.torch_sgd(lr=0.1, momentum=0.9, dampening=dampening)
    state = take(torch_state(dampening, _2=None), tx=tx)
    none = take(torch_state(dampening, _2={"momentum_buffer": None}), tx=tx)
    assert_bit_equal(state, none)
    (u, *_), state = go_on(tx, state, [1])
    g = grads(1)
    np.testing.assert_allclose(u["head"], -0.1 * g["head"], rtol=1e-6)
    v = torch_state()["state"][1]["momentum_buffer"]
    expected = -0.1 * (0.9 * v + (1 - dampening) * g["dense"]["bias"])
    np.testing.assert_allclose(u["dense"]["bias"], expected, rtol=1e-6)


def test_lions_call_their_velocity_otherwise():
    there = torch_state()
    theirs = {i: {"exp_avg": e["momentum_buffer"]} for i, e in there["state"].items()}
    tx = interop.lion()
    state = take({**there, "state": theirs}, tx=tx, key="exp_avg")
    np.testing.assert_array_equal(mo.velocity(state)[0]["head"], theirs[2]["exp_avg"])
    back = interop.to_torch(state, there, NAMES, layouts=LAYOUTS, key="exp_avg")
    assert_bit_equal(back["state"], theirs)
    with pytest.raises(ValueError, match="entry 0 of state_dict must hold momentum_buffer alone, got exp_avg too"):
        take({**there, "state": theirs}, tx=tx)


def test_a_pending_first_step_goes_out_as_no_buffer():
    tx = interop.torch_sgd(lr=0.1, momentum=0.9, dampening=0.5)
    state = take(torch_state(0.5, _2=None), tx=tx)
    back = interop.to_torch(state, torch_state(0.5), NAMES, layouts=LAYOUTS)
    assert list(back["state"]) == [0, 1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"param_groups": [{}]}, r"param_groups of state_dict must be mappings that list params, got \[\{\}\]"),
        ({"param_groups": {"params": [0]}}, "param_groups of state_dict must be mappings that list params"),
        ({"state": []}, r"state of state_dict must map parameters to mappings, got \[\]"),
        ({"state": {0: None}}, "state of state_dict must map parameters to mappings"),
    ],
)
def test_a_dictionary_of_another_form_is_named(change, match):
    tx = interop.torch_sgd(momentum=0.9)
    for call in (interop.from_torch, interop.to_torch):
        with pytest.raises(TypeError, match=match):
            call(tx.init(PARAMS), torch_state() | change, NAMES)


def entry_errors():
    """Entries of the state dictionary that do not fit: an id, arguments of `take`, the message."""
    bad = np.zeros((3, 4), np.float32)
    yield (
        "wrong shape",
        {"state_dict": torch_state(_2={"momentum_buffer": bad[0]})},
        r"the velocity for 'head' must have shape \(2,\), got \(4,\)",
    )
    yield (
        "layout forgotten",
        {"layouts": None},
        r"the velocity for 'dense/kernel' must have shape \(4, 3\), got \(3, 4\)",
    )
    yield (
        "state of nothing",
        {"state_dict": torch_state(_9={"momentum_buffer": bad})},
        "state_dict has state for 9, which is not a parameter",
    )
    yield (
        "adam",
        {"state_dict": torch_state(_1={"momentum_buffer": bad[:, 0], "step": 3})},
        "entry 1 of state_dict must hold momentum_buffer alone, got step too",
    )
    yield (
        "dampened pending",
        {"state_dict": torch_state(0.5, _2=None)},
        "entry 2 for 'head' has had no gradient yet, and its first one will enter undampened",
    )


def name_errors():
    """Names that do not fit."""
    yield (
        "missing entry",
        {"names": {k: v for k, v in NAMES.items() if k != "head"}},
        "names lacks the path 'head' of opt_state",
    )
    yield (
        "extra path",
        {"names": NAMES | {"tail": 3}},
        r"names has the path 'tail', which is not in opt_state \('dense/bias', 'dense/kernel', 'head'\)",
    )
    yield "unknown number", {"names": NAMES | {"head": 7}}, "names lacks the parameter 2"
    yield "twice", {"names": NAMES | {"head": 1}}, "names lacks the parameter 2"
    there = torch_state()
    there["param_groups"][0]["params"] = [0, 1, 2, 3]
    yield "extra entry", {"state_dict": there}, "names lacks the parameter 3"


def option_errors():
    """Layouts, optimizers and steps that do not fit."""
    yield (
        "unknown layout",
        {"layouts": {"dense/kernel": "conv"}},
        r"layouts\['dense/kernel'\] must be 'linear', 'conv1d', .*, got 'conv'",
    )
    yield "bad permutation", {"layouts": {"dense/kernel": (0, 0)}}, r"or a permutation such as \(1, 0\), got \(0, 0\)"
    yield "layout of nothing", {"layouts": LAYOUTS | {"tail": "linear"}}, "layouts has the path 'tail'"
    yield (
        "layout of a bias",
        {"layouts": LAYOUTS | {"head": "linear"}},
        r"entry 2 for 'head' must have 2 axes as its layout, got \(2,\)",
    )
    yield (
        "bytes",
        {"tx": interop.torch_sgd(momentum=0.9, storage="int8")},
        "must keep its velocities in float32, got Int8Velocity",
    )
    yield (
        "steps needed",
        {"tx": interop.torch_sgd(lr=lambda t: 0.1, momentum=0.9)},
        "steps must be given, since opt_state counts them in .*count; got None",
    )
    yield (
        "two rules",
        {"tx": optax.chain(*(mo.scale_by_momentum(mo.ema(0.9)),) * 2)},
        "opt_state must hold one velocity per parameter, got two for 'dense/bias'",
    )
    yield "order", {"tx": interop.aggmo(0.1)}, "opt_state must hold one velocity per parameter, got 2"
    yield (
        "no momentum",
        {"tx": interop.torch_sgd()},
        "entry 0 has a momentum_buffer, and opt_state no velocity to put it into",
    )
    yield "debiased", {"tx": mo.scale_by_momentum(mo.ema(0.9), debias=True)}, "opt_state must not debias here"
    yield "negative steps", {"steps": -1}, "steps must be at least 0, got -1"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [pytest.param(a, m, id=n) for n, a, m in itertools.chain(entry_errors(), name_errors(), option_errors())],
)
def test_what_does_not_fit_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        take(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"names": ["dense/kernel"]}, "names must be a mapping from paths"),
        ({"layouts": "linear"}, "layouts must be a mapping from paths"),
        ({"state_dict": {"state": {}}}, "state_dict must be that of a PyTorch optimizer"),
        (
            {"state_dict": torch_state(_1={"momentum_buffer": np.zeros(3, np.int32)})},
            "entry 1 must be an array of floats",
        ),
        ({"state_dict": torch_state(_1={"momentum_buffer": np.zeros(3, complex)})}, "'dense/bias' must be real"),
        ({"steps": 1.5}, "steps must be a whole number"),
    ],
)
def test_what_is_no_state_at_all_is_a_type_error(arguments, match):
    with pytest.raises(TypeError, match=match):
        take(**arguments)


def test_to_torch_names_what_does_not_fit():
    state, there = take(), torch_state()
    with pytest.raises(ValueError, match="names lacks the path 'head'"):
        interop.to_torch(state, there, {k: v for k, v in NAMES.items() if k != "head"})
    with pytest.raises(ValueError, match="names lacks the parameter 2"):
        interop.to_torch(state, there, NAMES | {"head": 4})
    with pytest.raises(ValueError, match="must hold one velocity per parameter, got 2"):
        interop.to_torch(interop.aggmo(0.1).init(PARAMS), there, NAMES)


@pytest.fixture(scope="module")
def large():
    """A leaf that is compressed, and its buffer there."""
    rng = np.random.default_rng(1)
    buffer = rng.normal(size=(512, 16)).astype(np.float32)
    group = {"params": [0]}
    return {"w": jnp.zeros((16, 512))}, {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [group]}


def test_buffers_go_through_bytes_within_their_stated_error(large):
    params, there = large
    tx32, tx8 = (interop.torch_sgd(lr=0.1, momentum=0.9, storage=s) for s in ("float32", "int8"))
    exact = interop.from_torch(tx32.init(params), there, {"w": 0}, layouts={"w": "linear"})
    like = jax.eval_shape(tx8.init, params)
    state = jax.jit(lambda exact: mo.convert(exact, "int8", like=like))(exact)
    back = interop.to_torch(state, there, {"w": 0}, layouts={"w": "linear"})["state"][0]["momentum_buffer"]
    buffer = there["state"][0]["momentum_buffer"]
    # White noise at decay 0.9: below 0.03, stored once and over a run.
    assert 1e-4 < np.linalg.norm(back - buffer) / np.linalg.norm(buffer) < 0.03
    step = jax.jit(tx8.update)
    for seed in range(30):
        g = grads(seed, params)
        _, exact = tx32.update(g, exact)
        _, state = step(g, state)
    a, b = (np.asarray(mo.velocity(s)[0]["w"]) for s in (exact, state))
    assert np.linalg.norm(a - b) / np.linalg.norm(a) < 0.03


def test_states_of_nnx_are_trees_too():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    there = torch_state(_2=None)
    there["param_groups"][0]["params"] = [0, 1]
    params = nnx.state(model, nnx.Param)
    state = interop.torch_sgd(lr=0.1, momentum=0.9).init(params)
    names = {"bias": 1, "kernel": 0}
    state = interop.from_torch(state, there, names, layouts={"kernel": "linear"})
    (v,) = mo.velocity(state)
    np.testing.assert_array_equal(v["kernel"][...], there["state"][0]["momentum_buffer"].T)
    assert_bit_equal(interop.to_torch(state, there, names, layouts={"kernel": "linear"})["state"], there["state"])
