"""The dialects against recorded trajectories of the libraries themselves, and live states handed over half-way.

The recordings, their script and the versions are in `golden/`. Nothing here needs PyTorch, Keras or any of them.
"""

import contextlib
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, HANDOVER, RECORDED, SHAPES, STEPS, flatten, gradient, start, unflatten
from golden.handover import our_run, run, transformation
from precision import enable_x64

import momentum_optax as mo
from momentum_optax.interop.dialect import DIALECTS

HERE = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN = {dtype: dict(np.load(HERE / f"{dtype}.npz")) for dtype in ("float64", "float32")}
AFTER = [i for i, t in enumerate(RECORDED) if t > HANDOVER]
# The axes of ours; PyTorch's Linear and Conv2d have others.
LAYOUTS = {"dense.weight": "linear", "conv.weight": "conv2d"}
TO_OURS = {"dense.weight": (1, 0), "conv.weight": (2, 3, 1, 0)}

# Tests of one case share its run, and so a worker.
handed_over = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.xdist_group(n), id=n) for n, case in CASES.items() if case.hands_over],
)


def enable(dtype):
    if dtype == "float32":
        return contextlib.nullcontext()
    return enable_x64(True)


@functools.cache
def our_trajectory(name, dtype):
    """The recorded parameters, and the parameters and state at the hand-over."""
    with enable(dtype):
        return our_run(CASES[name], np.dtype(dtype))


def tolerance(case, dtype):
    """The largest relative difference: 1e-6 in float32, a thousand roundings in float64.

    The libraries multiply parameters by 1 - rate * decay in one float32 number. Where nothing pulls the parameters
    back (a sign has the same size everywhere), its rounding is compounded over the steps.
    """
    if dtype == "float64":
        return 1e-12
    if case.dialect not in ("lion", "signum") or not case.arguments.get("weight_decay"):
        return 1e-6
    factor = 1 - case.arguments["lr"] * case.arguments["weight_decay"]
    return 1e-6 + STEPS * abs(float(np.float32(factor)) / factor - 1)


# The other libraries' float64 adds little to their float32, and half the time.
BOTH = [
    pytest.param(name, dtype, id=f"{name}-{dtype}", marks=marks)
    for name, case in CASES.items()
    for dtype in case.dtypes
    for marks in [[pytest.mark.xdist_group(name)] + [pytest.mark.slow] * (dtype == "float64" and not case.hands_over)]
]


@pytest.mark.one_in(36)
@pytest.mark.parametrize(("name", "dtype"), BOTH)
def test_a_hundred_steps_are_the_librarys(name, dtype):
    case = CASES[name]
    expected = GOLDEN[dtype][f"{name}/params"]
    recorded, _, _ = our_trajectory(name, dtype)
    assert recorded.dtype == expected.dtype == dtype
    assert abs(expected[-1] - expected[-2]).max() > 1e-2, "at rest too early to tell anything"
    np.testing.assert_allclose(recorded, expected, rtol=tolerance(case, dtype), atol=0)


def test_every_dialect_has_a_case_or_its_own_lines():
    recorded = {case.dialect for case in CASES.values()} | {"muon_average"}
    for name in set(DIALECTS) - recorded:
        module = getattr(mo.interop, name).__module__.rpartition(".")[2]
        path = pathlib.Path(__file__).parent / f"test_{module}.py"
        text = path.read_text() if path.exists() else ""
        assert f"interop.{name}(" in text, f"give {name} a case in golden/cases.py, or its lines in test_{module}.py"


def to_ours(tree):
    """In the layout of Flax."""
    return {n: x if x is None or n not in TO_OURS else x.transpose(TO_OURS[n]) for n, x in tree.items()}


def to_theirs(tree):
    """In the layout of PyTorch."""
    return {n: x if x is None or n not in TO_OURS else x.transpose(np.argsort(TO_OURS[n])) for n, x in tree.items()}


def foreign_state(name, dtype):
    """What the library's optimizer holds at the hand-over, in the form in which it gives it: arrays for tensors."""
    case = CASES[name]
    buffers = GOLDEN[dtype].get(f"{name}/buffers")
    buffers = {} if buffers is None else unflatten(buffers)
    if case.library == "keras":
        entries = {f"SGD/{n.replace('.', '_')}_momentum": b for n, b in buffers.items() if b is not None}
        return {"SGD/iteration": np.int32(HANDOVER), "SGD/learning_rate": np.float32(0.05)} | entries
    state = {i: {"momentum_buffer": buffers[n]} for i, n in enumerate(SHAPES) if buffers.get(n) is not None}
    group = {"params": list(range(len(SHAPES))), "dampening": case.arguments.get("dampening", 0)}
    return {"state": state, "param_groups": [group]}


def take_over(name, dtype, opt_state):
    """`opt_state`, in the layout of Flax, with the library's velocities."""
    foreign = foreign_state(name, dtype)
    if CASES[name].library == "keras":
        names = {n: f"SGD/{n.replace('.', '_')}_momentum" for n in SHAPES}
        return mo.interop.from_keras(opt_state, foreign, names, layouts=LAYOUTS)
    numbers = {n: i for i, n in enumerate(SHAPES)}
    return mo.interop.from_torch(opt_state, foreign, numbers, layouts=LAYOUTS, steps=HANDOVER)


def second_half(name, dtype, **options):
    """The parameters recorded over the last fifty steps, from the library's own state."""
    case = CASES[name]
    tx = transformation(case, **options)
    params = unflatten(GOLDEN[dtype][f"{name}/params"][RECORDED.index(HANDOVER)])
    opt_state = tx.init(jax.tree.map(jnp.asarray, to_ours(params)))
    opt_state = take_over(name, dtype, opt_state)
    steps = range(HANDOVER, STEPS)
    return run(tx, case, params, opt_state, steps, to_ours=to_ours, to_torch=to_theirs)[0]


@pytest.mark.one_in(16)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@handed_over
def test_fifty_steps_there_and_fifty_here_are_a_hundred_there(name, dtype):
    expected = GOLDEN[dtype][f"{name}/params"][AFTER]
    with enable(dtype):
        got = second_half(name, dtype)
    np.testing.assert_allclose(got, expected, rtol=tolerance(CASES[name], dtype), atol=0)


@pytest.mark.one_in(16)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@handed_over
def test_fifty_steps_here_and_fifty_there_are_a_hundred_there(name, dtype):
    # The library's last fifty steps were recorded from the state that this package exported then ...
    golden, rtol = GOLDEN[dtype], tolerance(CASES[name], dtype)
    np.testing.assert_allclose(golden[f"{name}/resumed"], golden[f"{name}/params"][AFTER], rtol=rtol, atol=0)
    # ... and what it exports now is what the library itself has there.
    _, params, opt_state = our_trajectory(name, dtype)
    names = {n: i for i, n in enumerate(SHAPES)}
    if CASES[name].library == "keras":
        exported = mo.interop.to_keras(opt_state, names)
    else:
        empty = {"state": {}, "param_groups": [{"params": list(range(len(SHAPES)))}]}
        full = mo.interop.to_torch(opt_state, empty, names)
        exported = {i: entry["momentum_buffer"] for i, entry in full["state"].items()}
        assert full["param_groups"] == empty["param_groups"]
    np.testing.assert_allclose(flatten(params), golden[f"{name}/params"][RECORDED.index(HANDOVER)], rtol=rtol)
    buffers = golden.get(f"{name}/buffers")
    if buffers is None:
        assert not exported
        return
    for i, (n, expected) in enumerate(unflatten(buffers).items()):
        if expected is None:
            # Pending there: pending here, or a velocity of zero, from which the first step is the same.
            assert i not in exported or not exported[i].any(), n
        else:
            scale = np.abs(expected).max()
            np.testing.assert_allclose(exported[i], expected, rtol=0, atol=10 * rtol * scale, err_msg=n)


def test_the_recordings_say_with_what_they_were_made():
    versions = json.loads((HERE / "versions.json").read_text())
    text = (HERE / "requirements.txt").read_text()
    for package, version in versions.items():
        assert f"{package}=={version.removesuffix('+cpu')}" in text
    assert sum(p.stat().st_size for p in HERE.glob("*.npz")) < 400_000
    for dtype, golden in GOLDEN.items():
        named = {key.split("/")[0] for key in golden} - {"muon"}
        assert named == {name for name, case in CASES.items() if dtype in case.dtypes}


def test_every_event_is_in_the_recordings():
    # A parameter without a gradient does not move, one with a gradient of zero coasts.
    at = {t: unflatten(row) for t, row in zip(RECORDED, GOLDEN["float64"]["torch-momentum-decay/params"], strict=True)}
    first = start(np.dtype("float64"))
    np.testing.assert_array_equal(at[2]["conv.weight"], first["conv.weight"])
    assert (at[8]["conv.weight"] != first["conv.weight"]).all()
    np.testing.assert_array_equal(at[51]["head"], first["head"])
    assert (at[61]["head"] != first["head"]).all()
    assert (at[40]["scale"] != at[26]["scale"]).all()
    buffers = unflatten(GOLDEN["float64"]["torch-momentum-decay/buffers"])
    assert [n for n, b in buffers.items() if b is None] == ["head"]


def test_what_muon_orthogonalises_is_torchs():
    expected = GOLDEN["float64"]["muon/updates"]
    params = start(np.dtype("float64"))
    with enable("float64"):
        for row, nesterov in zip(expected, (True, False), strict=True):
            tx = mo.interop.muon_average(momentum=0.9, nesterov=nesterov)
            opt_state = tx.init(params["dense.weight"])
            for t, u in enumerate(row):
                got, opt_state = tx.update(jnp.asarray(gradient(params, t)["dense.weight"]), opt_state)
                np.testing.assert_allclose(got, u, rtol=1e-13, atol=1e-15)


@pytest.mark.slow
def test_the_recordings_can_be_made_again():
    missing = [p for p in ("torch", "keras", "qhoptim", "pytorch_optimizer", "timm", "heavyball", "flashoptim")
               if importlib.util.find_spec(p) is None]  # fmt: skip
    if missing:
        pytest.skip(f"needs the libraries themselves, and {', '.join(missing)} is not installed")
    subprocess.run([sys.executable, HERE / "make_golden.py", "--check"], check=True)
