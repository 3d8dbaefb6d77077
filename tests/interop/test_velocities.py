"""Velocities by path: counters, masks, placement."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interop.live_states import LAYOUTS, NAMES, PARAMS, assert_close, go_on, torch_state

import momentum_optax as mo

interop = mo.interop


def test_paths_that_read_the_same_are_refused():
    params = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="must have a different path for each parameter, got 'a/b', 'a/b'"):
        interop.to_torch(interop.torch_sgd(momentum=0.9).init(params), torch_state(), NAMES)


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


def test_cycles_of_micro_batches_begin_where_the_other_run_was():
    # Odd ages would say that the buffer holds gradients of a cycle that is open.
    rest = optax.scale_by_schedule(lambda t: -0.1 / (1 + t))
    rule = mo.heavy_ball(0.9, dampening=0.5, first_step="gradient")
    tx = mo.accumulated(rule, 2, rest)
    long, _ = go_on(tx, tx.init(PARAMS), range(10))
    _, middle = go_on(tx, tx.init(PARAMS), range(6))
    there = interop.to_torch(middle, torch_state(), NAMES)
    state = interop.from_torch(tx.init(PARAMS), there, NAMES, steps=3)
    got, _ = go_on(tx, state, range(6, 10))
    assert_close(got, long[6:])
    assert int(state.gradient_step) == int(state.rest.count) == 3
    assert int(interop.from_torch(optax.MultiSteps(tx, 2).init(PARAMS), there, NAMES, steps=3).gradient_step) == 3
    with pytest.raises(ValueError, match="steps must be given, since opt_state counts them in gradient_step"):
        interop.from_torch(tx.init(PARAMS), there, NAMES)
    _, open_cycle = go_on(tx, middle, range(6, 7))
    with pytest.raises(ValueError, match="opt_state must be at the end of a cycle of micro-batches, got 1 of them"):
        interop.to_torch(open_cycle, there, NAMES)


def test_other_counts_stay():
    tx = mo.guarded(interop.torch_sgd(lr=lambda t: 0.1, momentum=0.9), max_ratio=4.0)
    state = interop.from_torch(tx.init(PARAMS), torch_state(), NAMES, layouts=LAYOUTS, steps=5)
    assert int(optax.tree.get(state, "ScaleByScheduleState").count) == 5
    assert int(optax.tree.get(state, "Spikes").count) == 0


def test_a_state_of_numpy_arrays_is_taken():
    tx = interop.torch_sgd(lr=0.1, momentum=0.9)
    state = interop.from_torch(jax.device_get(tx.init(PARAMS)), torch_state(), NAMES, layouts=LAYOUTS)
    assert_close(state, interop.from_torch(tx.init(PARAMS), torch_state(), NAMES, layouts=LAYOUTS))


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
