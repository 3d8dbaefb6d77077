"""Live states: every entry that does not fit is named, and what is converted goes on as it would have."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import RULES, assert_bit_equal

import momentum_optax as mo
from momentum_optax import interop
from momentum_optax.interop import Recipe

PARAMS = {"dense": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}, "head": jnp.zeros(2)}
NAMES = {"dense/kernel": 0, "dense/bias": 1, "head": 2}
LAYOUTS = {"dense/kernel": "linear"}


def torch_state(dampening=0.0, **changes):
    """A state dictionary; `changes` replace entries, None leaves one out."""
    rng = np.random.default_rng(0)
    entries = {
        0: {"momentum_buffer": rng.normal(size=(3, 4)).astype(np.float32)},
        1: {"momentum_buffer": rng.normal(size=3).astype(np.float32)},
        2: {"momentum_buffer": rng.normal(size=2).astype(np.float32)},
    }
    for key, entry in changes.items():
        entries[int(key[1:])] = entry
    group = {"params": [0, 1, 2], "lr": 0.1, "momentum": 0.9, "dampening": dampening}
    return {"state": {k: v for k, v in entries.items() if v is not None}, "param_groups": [group]}


def take(state_dict=None, names=NAMES, layouts=LAYOUTS, tx=None, **options):
    tx = interop.torch_sgd(lr=0.1, momentum=0.9) if tx is None else tx
    return interop.from_torch(tx.init(PARAMS), state_dict or torch_state(), names, layouts=layouts, **options)


def flat(tree):
    return dict(zip(*interop.slots.by_path(tree), strict=True))


def grads(seed, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


def go_on(tx, state, seeds, like=PARAMS):
    """The updates for seeded gradients, and the last state."""
    out = []
    for seed in seeds:
        u, state = tx.update(grads(seed, like), state, like)
        out.append(u)
    return out, state


def assert_close(a, b, rtol=1e-6, atol=1e-7):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# PyTorch


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


@pytest.mark.parametrize(
    ("layout", "theirs", "ours"),
    [
        ("linear", (2, 3), (3, 2)),
        ("conv1d", (2, 3, 4), (4, 3, 2)),
        ("conv2d", (2, 3, 4, 5), (4, 5, 3, 2)),
        ("conv3d", (2, 3, 4, 5, 6), (4, 5, 6, 3, 2)),
        ((2, 0, 1), (2, 3, 4), (4, 2, 3)),
    ],
)
def test_layouts_are_flaxs(layout, theirs, ours):
    buffer = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
    there = {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [{"params": [0]}]}
    state = interop.torch_sgd(momentum=0.9).init({"w": jnp.zeros(ours)})
    state = interop.from_torch(state, there, {"w": 0}, layouts={"w": layout})
    (v,) = mo.velocity(state)
    # Element by element: out, in and space change places, nothing is flipped.
    axes = {"linear": "oi,io", "conv1d": "oix,xio", "conv2d": "oixy,xyio", "conv3d": "oixyz,xyzio"}.get(
        layout, "abc,cab"
    )
    np.testing.assert_array_equal(v["w"], np.einsum(axes.replace(",", "->"), buffer))
    back = interop.to_torch(state, there, {"w": 0}, layouts={"w": layout})
    np.testing.assert_array_equal(back["state"][0]["momentum_buffer"], buffer)


class Tensor:
    """What of a PyTorch tensor is looked at."""

    def __init__(self, value, dtype="torch.float32", on_device=True):
        self.value, self.dtype, self.on_device = value, dtype, on_device

    def detach(self):
        return Tensor(self.value, self.dtype, True)

    def cpu(self):
        return Tensor(self.value, self.dtype, False)

    def float(self):
        return Tensor(self.value, "torch.float32", self.on_device)

    def __array__(self, dtype=None, copy=None):
        if self.on_device or self.dtype == "torch.bfloat16":
            raise TypeError("NumPy cannot read this")
        return self.value


def test_tensors_of_any_device_and_of_bfloat16_are_read():
    there = torch_state()
    plain = take(there)
    for dtype in ("torch.float32", "torch.bfloat16"):
        wrapped = {i: {"momentum_buffer": Tensor(e["momentum_buffer"], dtype)} for i, e in there["state"].items()}
        assert_bit_equal(take({**there, "state": wrapped}), plain)


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


def error_cases():
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
    there = torch_state()
    there["param_groups"][0]["params"] = [0, 1, 2, 3]
    yield "extra entry", {"state_dict": there}, "names lacks the parameter 3"
    yield (
        "state of nothing",
        {"state_dict": torch_state(_9={"momentum_buffer": bad})},
        "state_dict has state for 9, which is no parameter",
    )
    yield (
        "adam",
        {"state_dict": torch_state(_1={"momentum_buffer": bad[:, 0], "step": 3})},
        "entry 1 of state_dict must hold momentum_buffer alone, got step too",
    )
    yield "twice", {"names": NAMES | {"head": 1}}, "names lacks the parameter 2"
    yield (
        "dampened pending",
        {"state_dict": torch_state(0.5, _2=None)},
        "entry 2 for 'head' has had no gradient yet, and its first one will enter undampened",
    )
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


@pytest.mark.parametrize(("arguments", "match"), [pytest.param(a, m, id=n) for n, a, m in error_cases()])
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


def test_names_must_give_each_parameter_once():
    there = torch_state()
    there["param_groups"][0]["params"] = [0, 1]
    del there["state"][2]
    with pytest.raises(ValueError, match="names must give each parameter once"):
        take(there, NAMES | {"head": 1})
    with pytest.raises(ValueError, match=r"names has the parameter 5, which is not there \(0, 1\)"):
        take(there, NAMES | {"head": 5})


def test_paths_that_read_the_same_are_refused():
    params = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="must have a path of its own for each parameter, got 'a/b', 'a/b'"):
        interop.to_torch(interop.torch_sgd(momentum=0.9).init(params), torch_state(), NAMES)


def test_to_torch_names_what_does_not_fit():
    state, there = take(), torch_state()
    with pytest.raises(ValueError, match="names lacks the path 'head'"):
        interop.to_torch(state, there, {k: v for k, v in NAMES.items() if k != "head"})
    with pytest.raises(ValueError, match="names lacks the parameter 2"):
        interop.to_torch(state, there, NAMES | {"head": 4})
    with pytest.raises(ValueError, match="must hold one velocity per parameter, got 2"):
        interop.to_torch(interop.aggmo(0.1).init(PARAMS), there, NAMES)


def test_counters_go_on_where_the_other_run_was():
    def rate(t):
        return 0.1 / (1 + t)

    tx = interop.torch_sgd(lr=rate, momentum=lambda t: 0.9 - 0.01 * t, weight_decay=lambda t: 0.1 * t)
    long, _ = go_on(tx, tx.init(PARAMS), range(6))
    _, middle = go_on(tx, tx.init(PARAMS), range(4))
    there = interop.to_torch(middle, torch_state(), NAMES)
    got, _ = go_on(tx, interop.from_torch(tx.init(PARAMS), there, NAMES, steps=4), range(4, 6))
    assert_close(got, long[4:])
    other, _ = go_on(tx, interop.from_torch(tx.init(PARAMS), there, NAMES, steps=0), range(4, 6))
    assert abs(other[0]["head"] - long[4]["head"]).max() > 1e-3


def test_masked_parameters_are_paired_and_left_out():
    tx = optax.masked(interop.torch_sgd(lr=0.1, momentum=0.9), {"dense": True, "head": False})
    state = interop.from_torch(tx.init(PARAMS), torch_state(_2=None), NAMES, layouts=LAYOUTS)
    assert list(interop.to_torch(state, torch_state(), NAMES, layouts=LAYOUTS)["state"]) == [0, 1]
    with pytest.raises(ValueError, match="head is masked in opt_state, and its entry has a velocity"):
        interop.from_torch(tx.init(PARAMS), torch_state(), NAMES, layouts=LAYOUTS)


def test_the_state_is_placed_like_the_one_that_it_replaces():
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.zeros((4, 3)), sharding)}
    there = {"state": {0: {"momentum_buffer": np.ones((4, 3), np.float32)}}, "param_groups": [{"params": [0]}]}
    state = interop.from_torch(interop.torch_sgd(momentum=0.9).init(params), there, {"w": 0})
    assert mo.velocity(state)[0]["w"].sharding == sharding


# Bytes


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


# Keras


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
    with pytest.raises(TypeError, match="variables must be a mapping"):
        interop.from_keras(tx.init(PARAMS), [], {})


# Optax

LINES = {
    "trace": (optax.trace(0.9), mo.scale_by_momentum(mo.heavy_ball(0.9)), {"steps": 5}),
    "trace-sgd": (optax.sgd(0.1, 0.9, nesterov=True), mo.sgd(0.1, 0.9, nesterov=True), {"steps": 5}),
    "ema": (optax.ema(0.9, debias=False), mo.scale_by_momentum(mo.ema(0.9)), {}),
    "ema-debiased": (optax.ema(0.9), mo.scale_by_momentum(mo.ema(0.9), debias=True), {"rule": mo.ema(0.9)}),
    "lion": (optax.lion(0.1, weight_decay=0.01), interop.lion(0.1, weight_decay=0.01), {}),
}


@pytest.mark.parametrize("name", LINES)
def test_optax_states_go_on_here_and_ours_there(name):
    theirs, ours, options = LINES[name]
    like = jax.tree.map(lambda x: x + 1, PARAMS)
    whole, _ = go_on(theirs, theirs.init(like), range(8), like)
    _, state = go_on(theirs, theirs.init(like), range(5), like)
    got, _ = go_on(ours, interop.from_optax(ours.init(like), state, **options), range(5, 8), like)
    assert_close(got, whole[5:])
    _, state = go_on(ours, ours.init(like), range(5), like)
    got, _ = go_on(theirs, interop.to_optax(state, theirs.init(like), steps=5), range(5, 8), like)
    assert_close(got, whole[5:])


def test_adams_momentum_goes_on_here_and_ours_there():
    adam, ours = optax.scale_by_adam(b1=0.9), mo.scale_by_momentum(mo.ema(0.9), debias=True)
    _, there = go_on(adam, adam.init(PARAMS), range(5))
    got, here = go_on(ours, interop.from_optax(ours.init(PARAMS), there, rule=mo.ema(0.9)), range(5, 8))
    m = there.mu
    for t, u in zip(range(5, 8), got, strict=True):
        m = jax.tree.map(lambda x, g: 0.9 * x + 0.1 * g, m, grads(t))
        assert_close(u, jax.tree.map(lambda x, t=t: x / (1 - 0.9 ** (t + 1)), m), rtol=2e-6)
    back = interop.to_optax(here, there, steps=8)
    assert int(back.count) == 8
    assert_close(back.mu, m)
    assert_bit_equal(back.nu, there.nu)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (
            lambda: interop.from_optax(TRACED, optax.adagrad(0.1).init(PARAMS)),
            "one state of TraceState, EmaState, ScaleByLionState, ScaleByAdamState, got 0",
        ),
        (lambda: interop.from_optax(TRACED, (optax.trace(0.9).init(PARAMS),) * 2), "got 2"),
        (
            lambda: interop.from_optax(TRACED, optax.trace(0.9).init({"head": jnp.zeros(2)})),
            "the other state lacks the entry 'dense/bias'",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.trace(0.9).init(PARAMS | {"tail": jnp.zeros(2)})),
            "the other state has the entry 'tail'",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.trace(0.9).init(PARAMS | {"head": jnp.zeros(3)})),
            r"'head' must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.ema(0.9).init(PARAMS), steps=3),
            "steps must be the count of optax_state, 0, or None, got 3",
        ),
        (
            lambda: interop.from_optax(
                mo.scale_by_momentum(mo.ema(0.9), debias=True).init(PARAMS), optax.ema(0.9).init(PARAMS)
            ),
            "rule and the number of steps must be given",
        ),
        (
            lambda: interop.to_optax(TRACED, optax.ema(0.9).init(PARAMS)),
            "steps must be given, since optax_state counts them",
        ),
        (
            lambda: interop.to_optax(TRACED, optax.trace(0.9).init(PARAMS | {"head": jnp.zeros(3)})),
            r"'head' must have shape \(3,\), got \(2,\)",
        ),
        (
            lambda: interop.to_optax(TRACED, optax.trace(0.9).init({"head": jnp.zeros(2)})),
            "the other state lacks the entry",
        ),
        (
            lambda: interop.to_optax(
                mo.scale_by_momentum(mo.nesterov(lambda t: 0.9)).init(PARAMS), optax.ema(0.9).init(PARAMS), steps=3
            ),
            "steps must be what opt_state has counted, 0",
        ),
    ],
)
def test_optax_states_that_do_not_fit_are_named(function, match):
    with pytest.raises(ValueError, match=match):
        function()


TRACED = mo.scale_by_momentum(mo.heavy_ball(0.9)).init(PARAMS)


# Change of basis


def constant_rules():
    for name, make in RULES.items():
        rule = make().pruned()
        if not rule.reads_step and name not in ("ademamix_mix", "nadam_mix", "grokfast_average"):
            yield name


@pytest.mark.parametrize("name", list(constant_rules()))
def test_a_rule_goes_on_in_other_velocities(name, x64):
    rule = RULES[name]().pruned()
    T = (
        np.eye(rule.order) * 2.0
        + np.triu(np.full((rule.order,) * 2, 0.3), 1)
        - np.tril(np.full((rule.order,) * 2, 0.2), -1)
    )
    other = rule.change_basis(T)
    like = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    one, two = (mo.scale_by_momentum(r) for r in (rule, other))
    whole, _ = go_on(one, one.init(like), range(9), like)
    _, state = go_on(one, one.init(like), range(5), like)
    state = interop.change_basis(state, rule, other, into=two.init(like))
    got, _ = go_on(two, state, range(5, 9), like)
    assert_close(got, whole[5:], rtol=1e-12, atol=1e-13)


SAME = {
    "ema and heavy ball": (mo.ema(0.9), mo.heavy_ball(0.9).scale(0.1)),
    "two forms of Nesterov": (mo.nesterov(0.9), mo.torch_nesterov(0.9)),
    "Lion and its normal form": (mo.lion_mix(), mo.quasi_hyperbolic(0.99, 0.9 / 0.99)),
    "AccSGD and its normal form": (
        mo.accelerated(),
        mo.quasi_hyperbolic(*mo.accelerated().normal_form()[1:]).scale(mo.accelerated().normal_form()[0]),
    ),
    "AggMo in another order": (mo.aggregated((0.5, 0.9, 0.99)), mo.aggregated((0.99, 0.5, 0.9))),
}


@pytest.mark.parametrize("pair", SAME)
@pytest.mark.parametrize("back", [False, True])
def test_published_rules_with_the_same_updates_take_over_from_each_other(pair, back, x64):
    a, b = SAME[pair][::-1] if back else SAME[pair]
    like = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    one, two = (mo.scale_by_momentum(r) for r in (a, b))
    whole, _ = go_on(one, one.init(like), range(9), like)
    _, state = go_on(one, one.init(like), range(5), like)
    got, _ = go_on(two, interop.change_basis(state, a, b, into=two.init(like)), range(5, 9), like)
    assert_close(got, whole[5:], rtol=1e-9, atol=1e-12)


RECIPES = [
    Recipe("torch_sgd", lr=0.1, momentum=0.9),
    Recipe("keras_sgd", learning_rate=0.1, momentum=0.9),
    Recipe("caffe_sgd", base_lr=0.1, momentum=0.9),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=1.0),
    Recipe("flash_sgd", lr=0.2, momentum=0.9, dampening=0.5),
]


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(RECIPES, 2)), ids=lambda r: r.dialect)
def test_dialects_take_over_from_each_other(source, target):
    one, two = source.transformation(), target.transformation()
    whole, _ = go_on(one, one.init(PARAMS), range(9))
    _, state = go_on(one, one.init(PARAMS), range(5))
    state = interop.change_basis(state, source.filter(), target.filter(), into=two.init(PARAMS))
    got, _ = go_on(two, state, range(5, 9))
    assert_close(got, whole[5:], rtol=3e-6, atol=1e-6)


def test_a_dampened_run_goes_on_past_its_first_step_only():
    damped = Recipe("torch_sgd", lr=0.2, momentum=0.9, dampening=0.5)
    plain = Recipe("torch_sgd", lr=0.1, momentum=0.9)
    one, two = damped.transformation(), plain.transformation()
    whole, _ = go_on(one, one.init(PARAMS), range(9))
    _, state = go_on(one, one.init(PARAMS), range(5))
    given = (damped.filter(), plain.filter())
    got, _ = go_on(two, interop.change_basis(state, *given, into=two.init(PARAMS)), range(5, 9))
    assert_close(got, whole[5:], rtol=3e-6, atol=1e-6)
    with pytest.raises(
        ValueError, match="the first step of 'dense/bias' is pending, and it would be another one in target"
    ):
        interop.change_basis(one.init(PARAMS), *given, into=two.init(PARAMS))
    # The other way the ages say that the first step is past.
    _, state = go_on(two, two.init(PARAMS), range(5))
    back = interop.change_basis(state, *given[::-1], into=one.init(PARAMS))
    whole, _ = go_on(two, two.init(PARAMS), range(9))
    assert_close(go_on(one, back, range(5, 9))[0], whole[5:], rtol=3e-6, atol=1e-6)
    # Equal past their first steps, which differ.
    other = Recipe("torch_sgd", lr=0.125, momentum=0.9, dampening=0.2)
    with pytest.raises(ValueError, match="the first step of 'dense/bias' is pending"):
        interop.change_basis(
            one.init(PARAMS), damped.filter(), other.filter(), into=other.transformation().init(PARAMS)
        )
    # And a pending step stays pending where both have one.
    kept = interop.change_basis(one.init(PARAMS), given[0], given[0], into=one.init(PARAMS))
    assert_bit_equal(kept, one.init(PARAMS))


def basis(state_rule, source, target, into_rule, **options):
    state, into = (mo.scale_by_momentum(r).init(PARAMS) for r in (state_rule, into_rule))
    return interop.change_basis(state, source, target, into=into, **options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            (mo.ema(0.9), mo.ema(0.9), mo.ema(0.8), mo.ema(0.8)),
            "must have the same updates and order, got impulse responses",
        ),
        ((mo.ema(0.9), mo.ema(0.9), mo.heavy_ball(0.9), mo.heavy_ball(0.9)), "must have the same updates"),
        (
            (mo.ema(0.9), mo.aggregated((0.5, 0.9)), mo.ema(0.9), mo.ema(0.9)),
            "source must be the rule of its state, of order 1, got 2",
        ),
        (
            (mo.ema(0.9), mo.ema(0.9), mo.ema(0.9), mo.aggregated((0.5, 0.9))),
            "target must be the rule of its state, of order 2, got 1",
        ),
        (
            (mo.schedule_free(), mo.schedule_free(), mo.ema(0.9), mo.ema(0.9)),
            r"source must have constant coefficients: give source.at\(step\)",
        ),
        (
            (mo.ademamix_mix(), mo.ademamix_mix(), mo.ademamix_mix(), mo.ademamix_mix()),
            "source must not change after the first gradient",
        ),
        (
            (mo.contrib.grokfast_average(5),) * 4,
            "source must not change after the first gradient, got one that does at the 11th",
        ),
        ((mo.aggregated((0.5, 0.5)),) * 4, "must need all its velocities, got a rule that fewer could express"),
    ],
)
def test_rules_that_cannot_take_over_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        basis(*arguments)


def test_errors_of_a_change_of_basis():
    ema = mo.ema(0.9)
    with pytest.raises(TypeError, match="source must be a Filter"):
        basis(ema, "ema", ema, ema)
    state = mo.scale_by_momentum(ema).init(PARAMS)
    into = mo.scale_by_momentum(ema).init({"head": jnp.zeros(2)})
    with pytest.raises(ValueError, match="the other state has the entry 'dense/bias'"):
        interop.change_basis(state, ema, ema, into=into)
    into = mo.scale_by_momentum(ema).init(PARAMS | {"head": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"'head' must have shape \(3,\), got \(2,\)"):
        interop.change_basis(state, ema, ema, into=into)


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


# Parameter groups.

GROUPS = {
    "body": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "bias": {"lr": 0.2, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    "head": {"lr": 0.3},
}
LABELS = {"dense": {"kernel": "body", "bias": "bias"}, "head": "head"}
CONVERTED = {
    "partition": lambda groups: optax.partition({k: interop.torch_sgd(**v) for k, v in groups.items()}, LABELS),
    "chain of masks": lambda groups: optax.chain(
        *(
            optax.masked(interop.torch_sgd(**v), jax.tree.map(lambda label, k=k: label == k, LABELS))
            for k, v in groups.items()
        )
    ),
}
every_way = pytest.mark.parametrize("way", CONVERTED)


def grouped_state(**changes):
    """A state dictionary with a group for each parameter, whose rate is an array as a tensor would be."""
    there = torch_state(**{"_2": None, **changes})
    settings = [GROUPS["body"], GROUPS["bias"], GROUPS["head"]]
    there["param_groups"] = [
        {"params": [i], "momentum": 0, "dampening": 0, **group, "lr": np.float32(group["lr"]), "fused": None}
        for i, group in enumerate(settings)
    ]
    return there


def torch_steps(there, seeds):
    """PyTorch's documented steps from a state dictionary, in NumPy float64; a list of updates by number."""
    buffers = {i: np.float64(entry["momentum_buffer"]) for i, entry in there["state"].items()}
    params = {
        0: np.float64(PARAMS["dense"]["kernel"]).T,
        1: np.float64(PARAMS["dense"]["bias"]),
        2: np.float64(PARAMS["head"]),
    }
    out = []
    for seed in seeds:
        g = grads(seed)
        arrays = {0: np.float64(g["dense"]["kernel"]).T, 1: np.float64(g["dense"]["bias"]), 2: np.float64(g["head"])}
        moved = {}
        for group in there["param_groups"]:
            (i,) = group["params"]
            d = arrays[i] + group.get("weight_decay", 0) * params[i]
            if group["momentum"]:
                first = i not in buffers
                b = d if first else group["momentum"] * buffers[i] + (1 - group["dampening"]) * d
                buffers[i] = b
                d = d + group["momentum"] * b if group.get("nesterov") else b
            moved[i] = -group["lr"] * d
        out.append(moved)
    return out


@every_way
@pytest.mark.parametrize("pending", [(), ("_0",), ("_1",)], ids=["all", "body pending", "bias pending"])
def test_parameter_groups_come_into_a_partition_and_go_on_as_in_pytorch(way, pending):
    there = grouped_state(**dict.fromkeys(pending))
    tx = CONVERTED[way](GROUPS)
    state = interop.from_torch(tx.init(PARAMS), there, NAMES, layouts=LAYOUTS)
    ours, after = go_on(tx, state, (1, 2))
    for u, expected in zip(ours, torch_steps(there, (1, 2)), strict=True):
        np.testing.assert_allclose(u["dense"]["kernel"].T, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(u["dense"]["bias"], expected[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(u["head"], expected[2], rtol=1e-5, atol=1e-6)
    back = interop.to_torch(state, {"state": {}, "param_groups": there["param_groups"]}, NAMES, layouts=LAYOUTS)
    # Without dampening a first step is the same from a buffer of zeros, and is not told apart from one.
    zero = {1: {"momentum_buffer": np.zeros(3, np.float32)}} if "_1" in pending else {}
    assert_bit_equal(back["state"], there["state"] | zero)
    assert back["param_groups"] == there["param_groups"]
    # The group without momentum has no buffer there either.
    assert sorted(interop.to_torch(after, there, NAMES, layouts=LAYOUTS)["state"]) == [0, 1]


@every_way
def test_a_group_without_momentum_takes_no_buffer(way):
    there = grouped_state(_2={"momentum_buffer": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="head is masked in opt_state, and its entry has a velocity"):
        interop.from_torch(CONVERTED[way](GROUPS).init(PARAMS), there, NAMES, layouts=LAYOUTS)


def test_groups_that_all_have_a_momentum_but_two_in_one_chain_are_told_apart():
    both = {key: {"lr": 0.1, "momentum": 0.9} for key in GROUPS}
    tx = optax.chain(CONVERTED["partition"](both), interop.torch_sgd(lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="opt_state must hold one velocity per parameter, got two for 'dense/"):
        interop.to_torch(tx.init(PARAMS), torch_state(), NAMES, layouts=LAYOUTS)
