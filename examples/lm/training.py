"""The training of the language model: a compiled step, held-out losses, telemetry, and a run that can be resumed."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

import momentum_optax as mo

from ..demo.cnn import in_short
from . import data
from .checkpoints import Checkpoints, State
from .config import CONFIGS
from .model import init, loss
from .optimizers import MEASURED
from .placement import Placed
from .settings import Settings

# Held-out losses in a run.
EVALUATIONS = 10
# Names of `points`, in the order in which they are printed.
POINTS = ("weights", "behind", "average")


class DivergedError(Exception):
    """A loss that is not finite."""


@dataclasses.dataclass
class History:
    """Progress of a run.

    Attributes:
      loss: Training loss of each step, nats per token.
      held_out: For each evaluation its step, as "step", and the loss on validation text of each of `points`.
      telemetry: Results of `mo.telemetry` at each `MEASURED`-th step, and that step.
      test: The loss on test text of each point at the end; empty before.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    held_out: list[dict[str, float]] = dataclasses.field(default_factory=list)
    telemetry: list[dict[str, float]] = dataclasses.field(default_factory=list)
    test: dict[str, float] = dataclasses.field(default_factory=dict)


class Programs(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      start: The state before the first step.
      step: A state and a batch to the next state and the loss; it overwrites the state.
      evaluate: A state and batches to the mean loss of each window of text, at each of `points`.
      target: Shapes, dtypes and shardings of the state.
    """

    start: Callable[[], State]
    step: Callable[[State, np.ndarray], tuple[State, jax.Array]]
    evaluate: Callable[[State, np.ndarray], dict[str, jax.Array]]
    target: State


def programs(settings: Settings, placed: Placed) -> Programs:
    """The compiled functions for an optimizer that is placed."""
    tx, shardings = placed.tx, {"params": placed.params, "opt_state": placed.opt_state}

    def start() -> State:
        params = init(CONFIGS[settings.config], settings.seed)
        return {"params": params, "opt_state": tx.init(params)}

    def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        params = state["params"]
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = tx.update(gradients, state["opt_state"], params)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, value

    def evaluate(state: State, batches: jax.Array) -> dict[str, jax.Array]:
        def losses(params: optax.Params) -> jax.Array:
            each: jax.Array = jax.lax.map(jax.vmap(lambda window: loss(params, window[None])), batches)
            return each

        return {name: losses(params) for name, params in points(settings, state).items()}

    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(start), shardings
    )
    return Programs(
        jax.jit(start, out_shardings=shardings),
        jax.jit(
            step,
            in_shardings=(shardings, placed.batch),
            out_shardings=(shardings, placed.scalar),
            donate_argnums=0,
        ),
        jax.jit(evaluate, in_shardings=(shardings, placed.batches), out_shardings=placed.scalar),
        target,
    )


def points(settings: Settings, state: State) -> dict[str, optax.Params]:
    """The parameters to evaluate: those that are trained, the rule's own point, and their average."""
    params, opt_state = state["params"], state["opt_state"]
    found = {"weights": params}
    if settings.behind != "none":
        # The rule's own state: another rule, before the learning rate, may have a point as well.
        found["behind"] = mo.eval_params(opt_state[0].inner.momentum, params, -1.0)
    if settings.average:
        found["average"] = mo.averaged_params(opt_state[1], params)
    return found


def held_out(run: Programs, state: State, windows: np.ndarray, batch: int) -> dict[str, float]:
    """Mean nats per token over all windows, shape (n, length + 1), at each of `points`."""
    count = len(windows)
    # The first windows again, to fill the last batch.
    batches = np.resize(windows, (-(-count // batch), batch, windows.shape[1]))
    losses = jax.device_get(run.evaluate(state, batches))
    return {
        name: float(np.mean(losses[name].reshape(-1)[:count], dtype=np.float64)) for name in POINTS if name in losses
    }


def train(settings: Settings, placed: Placed, folder: Path | None = None, save_every: int = 50) -> History:
    """Train, print held-out losses, and return what was measured.

    Args:
      settings: What to train.
      placed: The optimizer and where it is, see `place`.
      folder: Of checkpoints; where there is one of this run, it goes on from there. None for none.
      save_every: Steps between checkpoints; there is one after the last step too.

    Raises:
      DivergedError: If the loss is not finite.
      mo.checkpoint.CheckpointError: If the folder has checkpoints of other settings.
    """
    run = programs(settings, placed)
    state, history = None, History()
    with ExitStack() as stack:
        saved = None if folder is None else stack.enter_context(Checkpoints(folder, settings))
        if saved is not None and (found := saved.latest(run.target)) is not None:
            done, state, numbers = found
            history = History(**numbers)
            print(f"  Resumed after step {done}, from {folder}.")
        state = run.start() if state is None else state
        if len(history.loss) < settings.steps:
            save = None if saved is None else partial(_save, saved, save_every, settings.steps, history)
            _advance(settings, run, state, history, save)
    return history


def _save(saved: Checkpoints, every: int, steps: int, history: History, state: State) -> None:
    done = len(history.loss)
    if done % every == 0 or done == steps:
        saved.save(done, state, dataclasses.asdict(history))


def _advance(
    settings: Settings, run: Programs, state: State, history: History, save: Callable[[State], None] | None
) -> None:
    """Make the steps that are missing, note what they measure, and save."""
    from tqdm import tqdm  # noqa: PLC0415

    length, steps, batch = CONFIGS[settings.config].length, settings.steps, settings.batch_size
    text = data.splits()
    validation, test = (data.windows(part, length) for part in (text.validation, text.test))
    with tqdm(total=steps, initial=len(history.loss), desc="train", unit="step", leave=False) as bar:
        for step in range(len(history.loss), steps):
            state, value = run.step(state, data.batch_at(text.train, batch, length, step, settings.seed))
            history.loss.append(float(value))
            if not math.isfinite(history.loss[-1]):
                raise DivergedError(f"the loss is {history.loss[-1]} at step {step}")
            if step % MEASURED == 0:
                figures = _telemetry(state)
                history.telemetry.append({"step": step, **figures})
                bar.set_postfix_str(f"loss {history.loss[-1]:.3f}, {in_short(figures)}", refresh=False)
            if step + 1 == steps or (step + 1) % max(1, steps // EVALUATIONS) == 0:
                history.held_out.append({"step": step + 1, **held_out(run, state, validation, batch)})
                bar.write(line(history))
            if step + 1 == steps:
                history.test.update(held_out(run, state, test, batch))
            if save is not None:
                save(state)
            bar.update()


def _telemetry(state: State) -> dict[str, float]:
    """The figures of a step; of AdamW's moments those of the first, which is a velocity."""
    return {name: value for name, value in mo.telemetry(state["opt_state"]).items() if not name.endswith("/nu")}


def line(history: History) -> str:
    """The last evaluation in words."""
    step, *_ = (last := history.held_out[-1]).values()
    since = history.held_out[-2]["step"] if len(history.held_out) > 1 else 0
    trained = float(np.mean(history.loss[int(since) : int(step)]))
    losses = ", ".join(f"{name} {value:.4f}" for name, value in last.items() if name != "step")
    return f"  step {int(step):5}: training {trained:.4f}, held out: {losses}"
