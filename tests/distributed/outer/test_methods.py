"""Published outer methods against NumPy loops from the papers' forms."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import STORAGES, every_storage
from distributed.outer.workers import RATE, WORKERS, Velocity, assert_follows, exchanged, loop, problem, rounds

import momentum_optax as mo
from momentum_optax.distributed import outer


def test_every_method_is_compared_with_a_loop_and_measured():
    text, root = pathlib.Path(__file__).read_text(), pathlib.Path(__file__).parents[3]
    methods = [name for name, f in vars(outer.methods).items() if isinstance(f, types.FunctionType) and name[0] != "_"]
    methods = [name for name in methods if getattr(outer.methods, name).__module__ == outer.methods.__name__]
    assert len(methods) >= 4
    for name in methods:
        assert getattr(outer, name, None) is getattr(outer.methods, name), f"outer/__init__.py must export {name}"
        assert re.search(rf"(assert_follows|rounds)\(outer\.{name}\(", text), f"compare {name} with a loop here"
        assert f"mo.outer.{name}(" in (root / "benchmarks" / "outer_quality.py").read_text(), name


def test_averaging_is_the_mean_and_with_one_step_each_the_synchronous_gradient_step(x64):
    assert_follows(outer.local_sgd(), lambda x, mean, t: mean)
    curvature, minimum = problem()
    found = rounds(outer.local_sgd(), inner=1)[0]
    x = np.ones((3, 5))
    for anchor in found:
        x = x - RATE * (curvature * (x - minimum)).mean(0)
        np.testing.assert_allclose(anchor, x, rtol=1e-12)


def test_diloco_is_nesterov_on_pseudo_gradients(x64):
    v = Velocity()

    def move(x, mean, t):
        gone = x - mean
        v.value = 0.9 * v.value + gone
        return x - 0.7 * (gone + 0.9 * v.value)

    assert_follows(outer.diloco(), move)


def test_slowmo_divides_by_the_inner_rate_of_each_round(x64):
    v, rates = Velocity(), 0.1 / np.arange(1.0, 13)

    def move(x, mean, t):
        v.value = 0.5 * v.value + (x - mean) / rates[t]
        return x - 0.8 * rates[t] * v.value

    found = rounds(outer.slowmo(0.5, 0.8), extra={"inner_learning_rate": rates})[0]
    np.testing.assert_allclose(found, loop(move), rtol=1e-12, atol=1e-13)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(None, False), (None, True), (0.6, False), (0.6, True), (0.0, False)]
)
def test_bmuf_filters_blocks(momentum, nesterov, x64):
    v, decay = Velocity(), 1 - 1 / WORKERS if momentum is None else momentum
    point = Velocity()

    def move(x, mean, t):
        # The paper's form: v is the change of the global model; Nesterov's workers start one change further.
        at = x - decay * v.value if nesterov else x
        v.value = decay * v.value + 0.9 * (mean - x)
        point.value = at + v.value
        return point.value + decay * v.value if nesterov else point.value

    assert_follows(outer.bmuf(WORKERS, 0.9, momentum=momentum, nesterov=nesterov), move)


def test_slowmo_of_workers_whose_rate_is_zero_decays():
    kind = outer.slowmo(0.5, 0.8)
    state = exchanged(kind, {"w": jnp.ones((WORKERS, 3))}, inner_learning_rate=0.1)
    v = mo.velocity(state.momentum)[0]["w"]
    np.testing.assert_allclose(v, -10, rtol=1e-6)
    go = jax.vmap(lambda p, s: kind.exchange(p, s, axis_name="workers", inner_learning_rate=0.0), axis_name="workers")
    after = go(state.anchor, state)
    np.testing.assert_array_equal(after.anchor["w"], state.anchor["w"])
    np.testing.assert_allclose(mo.velocity(after.momentum)[0]["w"], 0.5 * v, rtol=1e-6)


@pytest.mark.one_in(3)
@every_storage
def test_the_outer_velocity_in_any_storage(storage):
    found = rounds(outer.diloco(0.5, 0.5, storage=STORAGES[storage]()), dtype=np.float32)[0]
    exact = rounds(outer.diloco(0.5, 0.5), dtype=np.float32)[0]
    most = {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.1, "int4": 0.6}[storage]
    assert np.linalg.norm(found[-1] - exact[-1]) <= most * np.linalg.norm(exact[-1] - 1)
    assert (np.asarray(found) != exact).any() == (storage != "float32")
