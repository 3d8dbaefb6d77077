"""A training run that may be killed at any moment: `python tests/state/checkpoint/resumable.py DIRECTORY STEPS`.

It checkpoints every few steps, goes on from the last checkpoint when it is started again, and writes its last state to
DIRECTORY/final.npz. `test_resumed_runs.py` kills it. It prints where it began and each step that it made.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import momentum_optax as mo

EVERY = 4
TX = optax.chain(
    mo.scale_by_momentum(mo.nesterov(mo.schedules.sutskever(0.95)), storage=mo.storage.int8(min_size=512)),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.05, 1000)),
)


def start():
    params = {"w": jnp.ones((8, 512)), "b": jnp.zeros((512,))}
    return {"params": params, "opt_state": TX.init(params)}


@jax.jit
def advance(state, step):
    """One step; the batch is a function of the step."""
    x, y = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (2, 16, 8))

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["w"] + p["b"])[:, :8] - y) ** 2)

    updates, opt_state = TX.update(jax.grad(loss)(state["params"]), state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}


def latest(manager):
    """The last checkpoint and its step; a new state only where there is none."""
    step = manager.latest_step()
    if step is None:
        return start(), 0
    layout = manager.restore(step, args=ocp.args.Composite(layout=ocp.args.JsonRestore())).layout
    target = jax.eval_shape(start)
    mo.checkpoint.check(layout, target)
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
    mo.checkpoint.check(layout, state)
    return state, step


def train(directory, steps, report=lambda line: None):
    with ocp.CheckpointManager(
        directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        state, step = latest(manager)
        report(f"from {step}")
        while step < steps:
            state = advance(state, jnp.int32(step))
            step += 1
            if step % EVERY == 0:
                layout = ocp.args.JsonSave(mo.checkpoint.describe(state))
                manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), layout=layout))
            report(f"step {step}")
        manager.wait_until_finished()
    return state


if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    last = train(directory, int(sys.argv[2]), lambda line: print(line, flush=True))
    np.savez(directory / "final.npz", **{k: np.asarray(x) for k, x in mo.checkpoint.fields(last).items()})
