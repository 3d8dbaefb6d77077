"""Rules that belong behind an optimizer, and their published loops over any base, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_optax as mo

STEPS = 400
START = np.linspace(-1.5, 1.5, 6)
MIX = np.random.default_rng(0).normal(size=(6, 6)) / 3


def ramp(t):
    """A look-ahead of .6 that grows over the first 100 steps, in arithmetic that any step allows."""
    return 0.6 * (1 - 1 / (1 + t / 25.0))


RULES = {
    "primal averaging": mo.primal_averaging(0.95, 0.7),
    "EMA-Nesterov": mo.ema_nesterov(0.9, ramp),
    "outer Nesterov": mo.outer_nesterov(7, 0.68, 0.37),
    "Lookahead": mo.lookahead(5, 0.5),
}


def gradient(x, xp=np):
    """Of a loss that is not quadratic."""
    return MIX.T @ xp.tanh(MIX @ x) + 0.1 * x


def cosine(t):
    """The rate of step t."""
    return 0.05 * 0.5 * (1 + np.cos(np.pi * t / STEPS))


def rate():
    return optax.cosine_decay_schedule(0.05, STEPS)


class Adam:
    """The steps of Adam with the cosine rate: what is added to the parameters."""

    def __init__(self):
        self.m, self.s, self.t = 0.0, 0.0, 0

    def __call__(self, g, decayed=0.0):
        self.m, self.s = 0.9 * self.m + 0.1 * g, 0.999 * self.s + 0.001 * g * g
        step = cosine(self.t)
        self.t += 1
        m, s = self.m / (1 - 0.9**self.t), self.s / (1 - 0.999**self.t)
        return -step * (m / (np.sqrt(s) + 1e-8) + decayed)


def primal_averaging_loop(decay=0.0, decays="z", mu_x=0.95, mu_y=0.7):
    """Three sequences, as in arXiv:2512.17131; weights decay at z, or at y as in its code."""
    adam, x, z = Adam(), START, START
    while True:
        y = mu_y * x + (1 - mu_y) * z
        z = z + adam(gradient(y), decay * (z if decays == "z" else y))
        x = mu_x * x + (1 - mu_x) * z
        yield mu_y * x + (1 - mu_y) * z, x


def ema_nesterov_loop(c=0.9):
    """arXiv:2605.25395: ahead along an average of displacements."""
    adam, x, m, t = Adam(), START, 0.0, 0
    while True:
        y = x + ramp(t) * m
        new = y + adam(gradient(y))
        m, x, t = c * m + (1 - c) * (new - x), new, t + 1
        yield x + ramp(t) * m, x


def outer_nesterov_loop(period=7, learning_rate=0.68, decay=0.37):
    """An inner optimizer, and SGD with Nesterov's momentum on what it has moved by, every `period` steps."""
    adam, x, slow, buffer, t = Adam(), START, START, 0.0, 0
    while True:
        x, t = x + adam(gradient(x)), t + 1
        if t % period == 0:
            moved = slow - x
            buffer = decay * buffer + moved
            slow = slow - learning_rate * (moved + decay * buffer)
            x = slow
        yield x, slow


def lookahead_loop(period=5, step_size=0.5):
    """Algorithm 1 of arXiv:1907.08610."""
    adam, slow = Adam(), START
    while True:
        fast = slow
        for _ in range(period - 1):
            fast = fast + adam(gradient(fast))
            yield fast, slow
        slow = slow + step_size * (fast + adam(gradient(fast)) - slow)
        yield slow, slow


LOOPS = {
    "primal averaging": primal_averaging_loop,
    "EMA-Nesterov": ema_nesterov_loop,
    "outer Nesterov": outer_nesterov_loop,
    "Lookahead": lookahead_loop,
}


def expected(loop):
    """The stored and the evaluated point after each of the steps of a loop."""
    return tuple(map(np.array, zip(*(next(loop) for _ in range(STEPS)), strict=True)))


def runs(txs, evaluate):
    """The same of several optimizers, in one compiled scan."""

    def step(carry, _):
        new, points = {}, {}
        for name, tx in txs.items():
            x, state = carry[name]
            u, state = tx.update(gradient(x, jnp), state, x)
            x = optax.apply_updates(x, u)
            new[name], points[name] = (x, state), (x, evaluate(state, x))
        return new, points

    start = {name: (jnp.asarray(START), tx.init(jnp.asarray(START))) for name, tx in txs.items()}
    return jax.device_get(jax.jit(lambda s: jax.lax.scan(step, s, length=STEPS))(start)[1])
