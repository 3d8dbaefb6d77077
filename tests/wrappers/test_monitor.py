"""`monitor` does not change the step: its bits, its compiled program and the bytes that it moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal
from monitored import BALL, LIKE, PLAIN, SIGNAL, STORAGES, compiled, every_storage, run
from moved_on_tpu import counts, needs_libtpu

import momentum_optax as mo


@pytest.mark.one_in(9)
@every_storage
def test_updates_and_velocities_are_those_without_a_monitor_to_the_bit(storage):
    tx = mo.scale_by_momentum(BALL, storage=STORAGES[storage])
    seldom = mo.monitor(tx, every=2)
    runs = [(tx.init(LIKE), jax.jit(tx.update)), (seldom.init(LIKE), jax.jit(seldom.update))]
    # Bytes take long to compile.
    runs = [*runs[: 1 if storage in ("int8", "int4") else 2], (compiled(storage)[0](LIKE), compiled(storage)[1])]
    for g in SIGNAL:
        out, states = zip(*(step(g, state) for state, step in runs), strict=True)
        for u, state in zip(out[1:], states[1:], strict=True):
            assert_bit_equal(u, out[0])
            assert_bit_equal(state.inner, states[0])
        runs = [(state, step) for state, (_, step) in zip(states, runs, strict=True)]


@pytest.mark.parametrize("every", [1, 2])
def test_no_way_from_the_gradients_to_the_updates_leads_around_the_barrier(every):
    # XLA shares and fuses what is computed twice: measuring would change how the step is rounded, on one backend or
    # another. The updates and velocities come of what has passed a barrier together with the figures.
    tx = mo.monitor(mo.scale_by_momentum(BALL), every=every)

    def step(g, state):
        u, after = tx.update(g, state)
        return u, after.inner

    jaxpr = jax.make_jaxpr(step)(SIGNAL[0], tx.init(LIKE)).jaxpr
    needed = set(jaxpr.outvars)
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            needed -= set(equation.outvars)
            if equation.primitive.name != "optimization_barrier":
                needed |= {x for x in equation.invars if not hasattr(x, "val")}
    assert not needed & set(jaxpr.invars)


def test_only_each_nth_step_is_measured_and_the_figures_are_kept_between():
    every = [after.figures for *_, after in run(PLAIN)]
    rows = run(mo.monitor(mo.scale_by_momentum(BALL), BALL, every=3))
    for t, (*_, after) in enumerate(rows):
        pairs = zip(jax.tree.leaves(after.figures), jax.tree.leaves(every[t - t % 3]), strict=True)
        assert all(np.allclose(a, b, rtol=1e-6, atol=0) for a, b in pairs)
        assert_bit_equal(after.figures, rows[t - t % 3][-1].figures)
        assert after.step == t + 1
    memories = [row[-1].memory for row in rows]
    assert len({float(memory.gain) for memory in memories}) == len(SIGNAL)


def test_a_loss_is_differentiated_through_a_monitored_step():
    def loss(rate, tx):
        u, state = tx.update(jnp.arange(3.0) * rate, tx.init(jnp.zeros(3)))
        u, _ = tx.update(jnp.arange(3.0), state)
        return jnp.sum(u * u)

    slopes = [jax.jit(jax.grad(lambda rate, tx=tx: loss(rate, tx)))(2.0) for tx in (mo.scale_by_momentum(BALL), PLAIN)]
    # The derivative of 5 (0.9 rate + 1)^2.
    np.testing.assert_allclose(slopes, 25.2, rtol=1e-6)


def test_what_cannot_be_monitored_is_refused():
    with pytest.raises(TypeError, match=r"tx must be a transformation with init and update, got 0\.9"):
        mo.monitor(0.9)
    with pytest.raises(TypeError, match=r"rule must be a Filter .* or None, got 'ema'"):
        mo.monitor(mo.scale_by_momentum(BALL), "ema")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        mo.monitor(mo.scale_by_momentum(BALL), every=0)
    with pytest.raises(ValueError, match="tx must hold a state of scale_by_momentum or compress"):
        mo.monitor(optax.adam(0.1)).init(LIKE)
    with pytest.raises(ValueError, match=r"rule must be that of .* got order 2 for states with \[1\] velocities"):
        mo.monitor(mo.scale_by_momentum(BALL), mo.aggregated()).init(LIKE)
    twice = optax.chain(mo.scale_by_momentum(BALL), mo.scale_by_momentum(BALL))
    with pytest.raises(ValueError, match=r"the only scale_by_momentum in tx, got order 1 for states with \[1, 1\]"):
        mo.monitor(twice, BALL).init(LIKE)
    with pytest.raises(ValueError, match="velocities in trees like the parameters"):
        mo.monitor(optax.flatten(mo.scale_by_momentum(BALL))).init(LIKE)
    tx = mo.monitor(mo.scale_by_momentum(BALL, storage=AlwaysBytes(min_size=1)))
    with pytest.raises(ValueError, match="the storage must keep velocities in full"):
        jax.eval_shape(tx.update, LIKE, jax.eval_shape(tx.init, LIKE))


class AlwaysBytes(type(mo.storage.int8())):
    """A custom storage that breaks law 7."""

    def encode(self, velocities, previous, write):
        return super().encode(velocities, self.init(velocities[0], len(velocities)), write)


# Alone, measured at every tenth step, and at every step.
MEASURED = """
rule, optimizers = mo.nesterov(0.9), {}
for storage in ("float32", "int8"):
    alone = mo.sgd(0.1, rule, storage=storage)
    for every, tx in ((0, alone), (10, mo.monitor(alone, rule, every=10)), (1, mo.monitor(alone, rule))):
        optimizers[f"{storage} {every}"] = tx
"""


@pytest.mark.slow
@needs_libtpu
def test_on_tpu_a_step_that_is_not_measured_moves_no_more_and_a_measured_one_what_docs_say():
    found = counts(MEASURED)
    for storage, floor, measured in (("float32", 20, 28), ("int8", 14.13, 23.26)):
        alone, tenth, each = (found[f"{storage} {every}"] for every in (0, 10, 1))
        assert alone["bytes"] == pytest.approx(floor, abs=0.01)
        assert tenth["bytes"] == pytest.approx(floor, abs=0.01)
        assert each["bytes"] == pytest.approx(measured, abs=0.02)
        # Scales, and rows of partial sums.
        assert max(tenth["temporaries"], each["temporaries"]) < 0.03
