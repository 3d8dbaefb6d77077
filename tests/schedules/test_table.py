"""Momentum schedules, against the papers' own recurrences and case distinctions."""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedule_cases import CASES

import momentum_optax as mo
from momentum_optax import schedules

# Where a case distinction lies, and beside it.
STEPS = [0, 1, 2, 9, 10, 19, 30, 39, 40, 41, 49, 50, 60, 99, 100, 101, 249, 250, 300, 950, 970, 999, 1000]
STEPS += [1023, 1024, 1025, 30_000]


def made(name):
    return getattr(schedules, name)(*CASES[name][0])


def public_schedules():
    return {
        n for n, f in vars(schedules).items() if inspect.isfunction(f) and f.__module__.startswith(schedules.__name__)
    }


@pytest.mark.parametrize("module", [name for _, name, _ in pkgutil.iter_modules(schedules.__path__)])
def test_the_schedules_of_a_module_are_exported(module):
    defined = vars(importlib.import_module(f"{schedules.__name__}.{module}"))
    functions = {n: f for n, f in defined.items() if inspect.isfunction(f) and f.__module__ == defined["__name__"]}
    found = [n for n, f in functions.items() if inspect.signature(f).return_annotation == "Schedule" and n[0] != "_"]
    assert sorted(found) == defined.get("__all__", []), f"the schedules of {module}.py are its __all__, in order"
    assert all(getattr(schedules, name, None) is functions[name] for name in found), f"import * from {module}"


def test_every_schedule_has_a_case():
    assert public_schedules() == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_an_integer_step_gives_the_papers_value_in_float64(name):
    schedule, paper = made(name), CASES[name][1]
    values = [schedule(t) for t in STEPS]
    assert all(isinstance(v, int | float) for v in values)
    np.testing.assert_allclose(values, [paper(t) for t in STEPS], rtol=1e-13, atol=1e-15)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_a_traced_step_gives_the_same_in_float32(name):
    schedule, paper = made(name), CASES[name][1]
    values = jax.jit(lambda t: schedule(t) * jnp.float32(1))(jnp.asarray(STEPS, jnp.int32))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [paper(t) for t in STEPS], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_traced_step_gives_float64_where_it_is_enabled(name, x64):
    schedule, paper = made(name), CASES[name][1]
    values = jax.jit(lambda t: schedule(t) * jnp.float64(1))(jnp.asarray(STEPS, jnp.int32))
    np.testing.assert_allclose(values, [paper(t) for t in STEPS], rtol=1e-13, atol=1e-15)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_every_schedule_serves_as_a_decay(name):
    schedule, paper = made(name), CASES[name][1]
    rule = mo.Filter(schedule, 1.0, schedule, 1.0)
    tx = mo.scale_by_momentum(rule)
    state, update = tx.init(jnp.zeros(())), jax.jit(tx.update)
    v = 0.0
    for t in range(40):
        u, state = update(jnp.ones(()), state)
        v = paper(t) * v + 1
        assert float(u) == pytest.approx(v, rel=2e-5)
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: schedules.sutskever(1.0), ValueError, r"max_decay must be in \[0, 1\), got 1.0"),
        (lambda: schedules.sutskever(0.9, stage=0), ValueError, "stage must be at least 1, got 0"),
        (lambda: schedules.sutskever(0.9, drop_at=-1), ValueError, "drop_at must be at least 0, got -1"),
        (lambda: schedules.sutskever(0.9, drop_to=2), ValueError, "drop_to must be in"),
        (lambda: schedules.sutskever("0.9"), TypeError, "max_decay must be a number, got '0.9'"),
        (lambda: schedules.nesterov_convex(0), ValueError, r"offset must be in \(0, inf\), got 0"),
        (lambda: schedules.demon(0.9, 0), ValueError, "total_steps must be at least 1"),
        (lambda: schedules.demon(1.0, 10), ValueError, "decay must be in"),
        (lambda: schedules.restarted(0.9, 10), TypeError, "schedule must be a function"),
        (lambda: schedules.restarted(schedules.fista(), 0), ValueError, "at must be at least 1"),
        (lambda: schedules.restarted(schedules.fista(), ()), ValueError, "at must name at least one step"),
        (lambda: schedules.restarted(schedules.fista(), (5, 5)), ValueError, r"at\[1\] must be at least 6, got 5"),
        (lambda: schedules.restarted(schedules.fista(), (0, 5)), ValueError, r"at\[0\] must be at least 1, got 0"),
        (lambda: schedules.restarted(schedules.fista(), (2.5,)), TypeError, r"at\[0\] must be a whole number"),
        (lambda: schedules.restarted(schedules.fista(), np.ones((2, 2), int)), TypeError, "at must hold .* got int64"),
        (
            lambda: schedules.restarted(schedules.fista(), np.array([2.5])),
            TypeError,
            "at must hold whole .* got float64",
        ),
        (lambda: schedules.cyclical(0.9, 0.8, 10), ValueError, r"high must be in \[0.9, 1\), got 0.8"),
        (lambda: schedules.cyclical(0.8, 0.9, 1), ValueError, "period must be at least 2"),
        (lambda: schedules.one_cycle(1), ValueError, "total_steps must be at least 2"),
        (lambda: schedules.one_cycle(10, peak=1.0), ValueError, "peak must be in"),
        (lambda: schedules.ramp(float("nan"), 1), ValueError, "value must be in"),
        (lambda: schedules.ramp(5.0, 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: schedules.half_life_ramp(0.0, 0.9, 5), ValueError, "start must be in"),
        (lambda: schedules.half_life_ramp(0.9, 1.0, 5), ValueError, "end must be in"),
        (lambda: schedules.fsgdm(299), ValueError, "total_steps must be at least 300, got 299"),
        (lambda: schedules.fsgdm(1000, stages=0), ValueError, "stages must be at least 1"),
        (lambda: schedules.fsgdm(1000, scaling=0.0), ValueError, r"scaling must be in \(0, inf\), got 0.0"),
        (lambda: schedules.muon_momentum(349), ValueError, "total_steps must be at least 350, got 349"),
        (lambda: schedules.muon_momentum(low=0.96), ValueError, r"high must be in \[0.96, 1\), got 0.95"),
        (lambda: schedules.muon_momentum(warmup_steps=0), ValueError, "warmup_steps must be at least 1"),
        (lambda: schedules.muon_momentum(cooldown_steps=0.5), TypeError, "cooldown_steps must be a whole number"),
        (lambda: schedules.momentum_correction(0.9, 0.1), TypeError, "learning_rate must be a schedule"),
        (lambda: schedules.momentum_correction(1.1, lambda t: 1.0), ValueError, "decay must be in"),
    ],
)
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
