"""What the workers compute: shards, the order of batches, and the programs, on a mesh where a worker is a device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from momentum_optax.distributed.outer import OuterMomentum, OuterState, diloco
from momentum_optax.rules.look_ahead import nesterov
from momentum_optax.storage import int8
from momentum_optax.transform import scale_by_momentum

from .. import demo

AXIS = "workers"
EACH, WHOLE = PartitionSpec(AXIS), PartitionSpec()
SIDES = {"mnist": 28, "digits": 8}
# Of an outer state, the anchor and the momentum are common and the residual is each worker's own.
OUTER = OuterState(WHOLE, WHOLE, EACH)


class Settings(NamedTuple):
    """What is trained: so many workers, rounds, steps a round, images a step on each worker; rate; seed; data."""

    workers: int
    rounds: int
    inner_steps: int
    batch_size: int
    learning_rate: float
    seed: int
    data: str


class Programs(NamedTuple):
    """Jitted functions, on arrays that have an axis of workers in front where every worker has its own.

    Attributes:
      local: `local(params, state, images, labels) -> params, state`: a round's steps, on each worker's own batches.
      meet: `meet(params, outer_state) -> params, outer_state`: the exchange.
      step: `step(params, state, images, labels) -> params, state`: a step on the mean of the gradients of all.
    """

    local: Any
    meet: Any
    step: Any


def shards(images: np.ndarray, labels: np.ndarray, workers: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each worker's own images and labels; each image goes to one worker."""
    return list(zip(np.array_split(images, workers), np.array_split(labels, workers), strict=True))


def order(settings: Settings, worker: int, images: int) -> np.ndarray:
    """Which of its images a worker takes, of shape (rounds, inner_steps, batch_size): every one before one again."""
    rng = np.random.default_rng((settings.seed, worker))
    shape = (settings.rounds, settings.inner_steps, settings.batch_size)
    epochs = -(-int(np.prod(shape)) // images)
    rows = np.concatenate([rng.permutation(images) for _ in range(epochs)])
    return rows[: int(np.prod(shape))].reshape(shape)


def inner(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of the CNN in `examples.demo` with its velocity in bytes: Nesterov at decay 0.9, clipped."""
    steps = settings.rounds * settings.inner_steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, max(1, steps // 16), steps + 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        # Every worker has its parameters as a whole.
        scale_by_momentum(nesterov(0.9), storage=int8(axis_names=())),
        optax.scale_by_learning_rate(schedule),
    )


def outer() -> OuterMomentum:
    """DiLoCo with its published rate and momentum, velocity and exchange in bytes."""
    return diloco(storage="int8", exchange="int8")


def start(settings: Settings) -> Any:
    """The initial parameters of the CNN of `examples.demo`."""
    from flax import nnx  # noqa: PLC0415

    return nnx.split(demo.build_cnn(SIDES[settings.data], settings.seed))[1]


def model(settings: Settings) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The shapes of `start`, which takes seconds, and the function from parameters and images to logits."""
    from flax import nnx  # noqa: PLC0415

    graph, shapes = nnx.split(nnx.eval_shape(partial(demo.build_cnn, SIDES[settings.data], settings.seed)))
    return shapes, lambda params, images: nnx.merge(graph, params)(images)


def programs(mesh: Mesh, settings: Settings, apply: Callable[[Any, Any], Any]) -> Programs:
    """See `Programs`."""
    tx, meetings = inner(settings), outer()

    def gradient(params: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()

        return jax.grad(loss)(params)

    def moved(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def local(params: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        def one(carry: Any, batch: Any) -> tuple[Any, None]:
            params, state = carry
            return moved(params, state, gradient(params, *batch)), None

        (params, state), _ = jax.lax.scan(one, (_own(params), _own(state)), (images[0], labels[0]))
        return _stacked(params), _stacked(state)

    def meet(params: Any, state: OuterState) -> tuple[Any, OuterState]:
        params, state = meetings.sync(_own(params), state._replace(residual=_own(state.residual)), axis_name=AXIS)
        return _stacked(params), state._replace(residual=_stacked(state.residual))

    def step(params: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        return moved(params, state, jax.lax.pmean(gradient(params, images[0], labels[0]), AXIS))

    over = partial(jax.shard_map, mesh=mesh, check_vma=False)
    return Programs(
        jax.jit(over(local, in_specs=EACH, out_specs=EACH), donate_argnums=(0, 1)),
        jax.jit(over(meet, in_specs=(EACH, OUTER), out_specs=(EACH, OUTER)), donate_argnums=(0, 1)),
        jax.jit(over(step, in_specs=(WHOLE, WHOLE, EACH, EACH), out_specs=WHOLE), donate_argnums=(0, 1)),
    )


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """This worker's arrays as its part of global ones; with `EACH` they have an axis of length 1 in front."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def here(tree: Any) -> Any:
    """This worker's part of global arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def _own(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)
