"""Rules behind an optimizer: the references' loops around Adam's steps under a cosine rate, and Optax's Lookahead."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_optax as mo
from tests.rules.oracles import BY_RULE, START, TABLE, gradient

STEPS, RATE = 400, 0.05
BEHIND = ("primal_averaging", "ema_nesterov", "outer_nesterov", "lookahead", "schedule_free", "overshoot")


class Adam:
    """What Adam subtracts from the parameters at each step, its cosine learning rate included."""

    def __init__(self):
        self.t, self.m, self.s = 0, 0.0, 0.0

    def __call__(self, x):
        g, t = gradient(x), self.t
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.s = 0.999 * self.s + 0.001 * g**2
        direction = self.m / (1 - 0.9**self.t) / (np.sqrt(self.s / (1 - 0.999**self.t)) + 1e-8)
        return RATE * (1 + math.cos(math.pi * t / STEPS)) / 2 * direction


def test_behind_adam_under_a_cosine_rate_each_is_its_references_loop(x64):
    # All rules in one program, each with its own parameters and its own Adam.
    rows = {name: BY_RULE[name] for name in BEHIND}
    rate = optax.cosine_decay_schedule(RATE, STEPS)
    txs = {n: optax.chain(optax.adam(rate), mo.scale_by_momentum(row.make())) for n, row in rows.items()}

    @jax.jit
    def step(points, states, grads):
        pairs = {n: tx.update(grads[n], states[n]) for n, tx in txs.items()}
        points = {n: points[n] + u for n, (u, _) in pairs.items()}
        return points, {n: state for n, (_, state) in pairs.items()}

    points = {n: jnp.asarray(START) for n in rows}
    states = {n: tx.init(points[n]) for n, tx in txs.items()}
    run = []
    for _ in range(STEPS):
        points, states = step(points, states, {n: gradient(np.asarray(x)) for n, x in points.items()})
        run.append(jax.device_get(points))
    for name, row in rows.items():
        expected, evaluated = row.run(Adam(), START, STEPS, learning_rate=1.0)
        np.testing.assert_allclose([x[name] for x in run], expected, rtol=0, atol=1e-12, err_msg=name)
        assert abs(expected - evaluated).max() > 1e-3, "the memory does nothing here"


def test_lookahead_is_that_of_optax(x64):
    # Fast and slow parameters, behind Adam, whose own state goes on at a meeting.
    period, size = 6, 0.5
    theirs = optax.lookahead(optax.adam(0.05), period, size)
    params = optax.LookaheadParams.init_synced(jnp.asarray(START))
    rule = mo.lookahead(period, size)
    ours = optax.chain(optax.adam(0.05), mo.scale_by_momentum(rule))
    x, state, their_state = jnp.asarray(START), ours.init(jnp.asarray(START)), theirs.init(params)
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(40):
        u, their_state = their_step(gradient(np.asarray(params.fast)), their_state, params)
        params = optax.apply_updates(params, u)
        u, state = step(gradient(np.asarray(x)), state)
        x = x + u
        np.testing.assert_allclose(x, params.fast, rtol=0, atol=1e-13)
        (sum_of_updates,) = jax.tree.leaves(mo.velocity(state))
        np.testing.assert_allclose(x - sum_of_updates, params.slow, rtol=0, atol=1e-13)


def test_outer_steps_without_a_decay_are_lookaheads():
    assert mo.equivalent(mo.outer_nesterov(5, 0.3, 0.0), mo.lookahead(5, 0.3), rtol=1e-12)
    assert not mo.equivalent(mo.outer_nesterov(5, 0.3, 0.1), mo.lookahead(5, 0.3), rtol=1e-2)


def test_an_outer_step_of_every_step_is_pytorchs_nesterov():
    # Its buffer takes each gradient, and the outer rate multiplies what comes out.
    assert mo.equivalent(mo.outer_nesterov(1, 0.7, 0.9), mo.torch_nesterov(0.9), (1.0, 0.7), rtol=1e-12)


def test_a_rule_here_has_a_row_that_is_run_behind_adam():
    from momentum_optax.rules import after_optimizer

    here = {row.rule for row in TABLE if getattr(mo, row.rule, None) in vars(after_optimizer).values()}
    assert here <= set(BEHIND)
    assert len(here) == 4
