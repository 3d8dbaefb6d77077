"""Record the golden trajectories with the libraries themselves; writes the .npz files and versions.json beside it.

    make golden

`--check` compares with the files instead, up to 8 roundings. The libraries run on the CPU; the tests need none of them.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import types
import warnings

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from golden.cases import CASES, HANDOVER, RECORDED, SHAPES, STEPS, flatten, gradient, start  # noqa: E402  beside this file

PACKAGES = ("torch", "keras", "qhoptim", "pytorch_optimizer", "timm", "heavyball", "flashoptim", "numpy", "jax")


def timm_class(module, name):
    """A class of timm's optimizers. Its own __init__ wants torchvision, which they do not."""
    if "timm" not in sys.modules:
        root = next(iter(importlib.util.find_spec("timm").submodule_search_locations))
        for package, path in (("timm", root), ("timm.optim", f"{root}/optim")):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [path]
    return getattr(importlib.import_module(f"timm.optim.{module}"), name)


def torch_optimizer(case, parameters, arguments):
    """The library's optimizer over torch parameters."""
    import torch

    library, _, name = case.library.partition("-")
    if library == "torch":
        return torch.optim.SGD(parameters, **arguments, **case.extra)
    if library == "timm":
        return timm_class(*(("lion", "Lion") if name else ("sgdw", "SGDW")))(parameters, **arguments)
    if library == "kozistr":
        if "smallConst" in arguments:
            arguments["constant"] = arguments.pop("smallConst")
        # One parameter at a time: its batched form lacks nothing, but is no plainer.
        return getattr(importlib.import_module("pytorch_optimizer"), name)(parameters, foreach=False, **arguments)
    if library == "qhoptim":
        return importlib.import_module("qhoptim.pyt").QHM(parameters, **arguments)
    if library == "heavyball":
        return importlib.import_module("heavyball").SGD(parameters, **arguments)
    flash = importlib.import_module("flashoptim").FlashSGD
    return flash(parameters, quantize=False, fused=False, master_weight_bits=None, **arguments)


class TorchRun:
    """A run with a PyTorch optimizer."""

    def __init__(self, case, params):
        import torch

        self.case, self.torch = case, torch
        self.parameters = {n: torch.nn.Parameter(torch.from_numpy(params[n].copy())) for n in SHAPES}
        arguments = dict(case.arguments) | {name: float(table[0]) for name, table in case.scheduled.items()}
        self.optimizer = torch_optimizer(case, list(self.parameters.values()), arguments)

    def params(self):
        return {n: p.detach().numpy().copy() for n, p in self.parameters.items()}

    def step(self, t):
        for name, table in self.case.scheduled.items():
            for group in self.optimizer.param_groups:
                group[name] = float(table[t])
        for name, g in gradient(self.params(), t, self.case.ascends).items():
            self.parameters[name].grad = None if g is None else self.torch.from_numpy(g.copy())
        self.optimizer.step()

    def buffers(self):
        """The momentum buffers; None for a parameter that has none."""
        state = self.optimizer.state_dict()["state"]
        found = (state.get(i, {}).get("momentum_buffer") for i in range(len(SHAPES)))
        return {name: None if b is None else b.numpy().copy() for name, b in zip(SHAPES, found, strict=True)}


class KerasRun:
    """A run with Keras' SGD on its JAX backend."""

    def __init__(self, case, params):
        import keras

        dtype = str(params["scale"].dtype)
        self.case, self.keras = case, keras
        arguments = dict(case.arguments)
        if case.scheduled:
            table = case.scheduled["learning_rate"]

            class Table(keras.optimizers.schedules.LearningRateSchedule):
                def __call__(self, step):
                    return keras.ops.take(keras.ops.convert_to_tensor(table, dtype), keras.ops.cast(step, "int32"))

            arguments["learning_rate"] = Table()
        keras.backend.set_floatx(dtype)  # the learning rate is of this type
        self.variables = {n: keras.Variable(params[n], dtype=dtype, name=n.replace(".", "_")) for n in SHAPES}
        self.optimizer = keras.optimizers.SGD(**arguments)
        self.optimizer.build(list(self.variables.values()))

    def params(self):
        return {n: np.array(v.value) for n, v in self.variables.items()}

    def step(self, t):
        grads = gradient(self.params(), t)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            self.optimizer.apply(
                [None if g is None else self.keras.ops.convert_to_tensor(g) for g in grads.values()],
                list(self.variables.values()),
            )

    def buffers(self):
        """The velocities, if any."""
        return {n: np.array(v.value) for n, v in zip(SHAPES, self.optimizer.momentums, strict=False)}


def run(case, params, first=0, prepare=None):
    """The recorded parameters of one run from step `first`, and the buffers at the hand-over."""
    driver = (KerasRun if case.library == "keras" else TorchRun)(case, params)
    if prepare is not None:
        prepare(driver)
    recorded, buffers = [], {}
    for t in range(first, STEPS):
        driver.step(t)
        if t + 1 in RECORDED:
            recorded.append(flatten(driver.params()))
        if t + 1 == HANDOVER and case.hands_over:
            buffers = driver.buffers()
    return np.array(recorded), buffers


def resumed(case, dtype):
    """Fifty steps with this package, then fifty with the library from the exported state."""
    from golden.handover import our_first_half

    params, opt_state = our_first_half(case, dtype)
    load = into_keras if case.library == "keras" else into_torch
    return run(case, params, HANDOVER, lambda driver: load(driver, opt_state))[0]


def into_torch(driver, opt_state):
    """Load our state into a PyTorch optimizer, and read it back."""
    import momentum_optax as mo

    names = {name: i for i, name in enumerate(SHAPES)}
    empty = driver.optimizer.state_dict()
    driver.optimizer.load_state_dict(mo.interop.to_torch(opt_state, empty, names, array=driver.torch.from_numpy))
    back = mo.interop.from_torch(opt_state, driver.optimizer.state_dict(), names, steps=HANDOVER)
    jax.tree.map(np.testing.assert_array_equal, mo.velocity(back), mo.velocity(opt_state))


def into_keras(driver, opt_state):
    """Assign our state to a Keras optimizer's variables, and read it back."""
    import momentum_optax as mo

    optimizer = driver.optimizer
    names = {name: v.path for name, v in zip(SHAPES, optimizer.momentums, strict=False)}
    arrays = mo.interop.to_keras(opt_state, names)
    for v in optimizer.momentums:
        v.assign(arrays[v.path])
    optimizer.iterations.assign(HANDOVER)
    back = mo.interop.from_keras(opt_state, {v.path: v for v in optimizer.variables}, names)
    jax.tree.map(np.testing.assert_array_equal, mo.velocity(back), mo.velocity(opt_state))


def muon():
    """What torch's Muon orthogonalises, for a fixed sequence of gradients."""
    import torch
    from torch.optim import _muon

    x = start(np.float64)
    seen = []
    name = next(n for n in vars(_muon) if n.startswith("_zeropower"))
    original = getattr(_muon, name)
    setattr(_muon, name, lambda u, *rest: seen.append(u.numpy().copy()) or u)
    for nesterov in (True, False):
        p = torch.nn.Parameter(torch.from_numpy(x["dense.weight"].copy()))
        optimizer = torch.optim.Muon([p], momentum=0.9, nesterov=nesterov)
        for t in range(20):
            p.grad = torch.from_numpy(gradient(x, t)["dense.weight"].copy())
            optimizer.step()
    setattr(_muon, name, original)
    return np.array(seen).reshape(2, 20, 3, 4)


def record(dtype):
    """Everything in one type."""
    out = {}
    for case in CASES.values():
        if dtype not in case.dtypes:
            continue
        print(dtype, case.name, flush=True)
        recorded, buffers = run(case, start(np.dtype(dtype)))
        out[f"{case.name}/params"] = recorded
        if any(b is not None for b in buffers.values()):
            out[f"{case.name}/buffers"] = flatten(buffers).astype(dtype)
        if case.hands_over:
            out[f"{case.name}/resumed"] = resumed(case, np.dtype(dtype))
    if dtype == "float64":
        out["muon/updates"] = muon()
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    check = parser.parse_args().check
    jax.config.update("jax_enable_x64", True)
    for dtype in ("float64", "float32"):
        new = record(dtype)
        path = HERE / f"{dtype}.npz"
        if check:
            old = np.load(path)
            if set(old) != set(new):
                sys.exit(f"the recordings and the cases differ in {sorted(set(old) ^ set(new))}")
            for key, value in new.items():
                np.testing.assert_allclose(old[key], value, rtol=8 * np.finfo(dtype).eps, err_msg=key)
        else:
            np.savez_compressed(path, **new)
    if not check:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
