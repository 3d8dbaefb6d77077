"""The computations of the workers: shards, order of batches, and programs on a mesh with one worker on each device."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import momentum_optax as mo

from ..demo.cnn import build_cnn

AXIS = "workers"
PER_WORKER, REPLICATED = PartitionSpec(AXIS), PartitionSpec()
SIDES = {"mnist": 28, "digits": 8}
# Of an outer state, the anchor and the momentum are common and the residual is each worker's own.
OUTER = mo.outer.OuterState(REPLICATED, REPLICATED, PER_WORKER)


class Settings(NamedTuple):
    """Settings of a training run.

    Attributes:
      workers: Processes.
      rounds: Meetings of DiLoCo.
      inner_steps: Steps from one meeting to the next.
      batch_size: Images of a step on each worker.
      learning_rate: The peak of the inner optimizer's schedule.
      seed: Of the initial parameters, the split and the orders.
      data: A key of `SIDES`.
    """

    workers: int
    rounds: int
    inner_steps: int
    batch_size: int
    learning_rate: float
    seed: int
    data: str


class Programs(NamedTuple):
    """Jitted functions; arrays that differ between workers have an axis of workers in front.

    Attributes:
      local: `local(params, state, images, labels) -> params, state`: the steps of a round, on each worker's batches.
      meet: `meet(params, outer_state) -> params, outer_state`: the exchange.
      step: `step(params, state, images, labels) -> params, state`: a step on the mean of all workers' gradients.
    """

    local: jax.stages.Wrapped
    meet: jax.stages.Wrapped
    step: jax.stages.Wrapped


# A function from parameters and images to logits.
Apply: TypeAlias = Callable[[optax.Params, jax.Array], jax.Array]


def shards(images: np.ndarray, labels: np.ndarray, workers: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each worker; every image goes to one worker."""
    return list(zip(np.array_split(images, workers), np.array_split(labels, workers), strict=True))


def order(settings: Settings, worker: int, images: int) -> np.ndarray:
    """Indices of a worker's images, shape (rounds, inner_steps, batch_size); every image before one occurs again."""
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
        mo.scale_by_momentum(mo.nesterov(0.9), storage=mo.storage.int8(axis_names=())),
        optax.scale_by_learning_rate(schedule),
    )


def average() -> optax.GradientTransformationExtraArgs:
    """An average of the weights in two bytes for each; about the last eighth of the steps so far counts."""
    # Every worker has its parameters as a whole.
    return mo.average_params(mo.schedules.power_average(6.0), storage=mo.storage.bfloat16(axis_names=()))


def every_step(settings: Settings) -> optax.GradientTransformation:
    """The optimizer of gradients that are averaged over the workers: `inner`, and an average of the weights."""
    return optax.chain(inner(settings), average())


def outer() -> mo.outer.OuterMomentum:
    """DiLoCo with its published rate and momentum, velocity and exchange in bytes, and an average of the anchor."""
    return mo.outer.outer_momentum(
        optax.chain(mo.sgd(0.7, 0.9, nesterov=True, storage="int8"), average()), exchange="int8"
    )


def start(settings: Settings) -> optax.Params:
    """The initial parameters of the CNN of `examples.demo`."""
    from flax import nnx  # noqa: PLC0415

    return nnx.split(build_cnn(SIDES[settings.data], settings.seed))[1]


def model(settings: Settings) -> tuple[optax.Params, Apply]:
    """The shapes of `start`, which takes seconds, and the function from parameters and images to logits."""
    from flax import nnx  # noqa: PLC0415

    graph, shapes = nnx.split(nnx.eval_shape(partial(build_cnn, SIDES[settings.data], settings.seed)))
    return shapes, lambda params, images: nnx.merge(graph, params)(images)


def programs(mesh: Mesh, settings: Settings, apply: Apply) -> Programs:
    """The programs of a training run, for a mesh of one axis, `AXIS`."""
    local, meet = _local_steps(inner(settings), apply), _meeting(outer())
    step = _data_parallel(every_step(settings), apply)
    over = partial(jax.shard_map, mesh=mesh, check_vma=False)
    return Programs(
        jax.jit(over(local, in_specs=PER_WORKER, out_specs=PER_WORKER), donate_argnums=(0, 1)),
        jax.jit(over(meet, in_specs=(PER_WORKER, OUTER), out_specs=(PER_WORKER, OUTER)), donate_argnums=(0, 1)),
        jax.jit(
            over(step, in_specs=(REPLICATED, REPLICATED, PER_WORKER, PER_WORKER), out_specs=REPLICATED),
            donate_argnums=(0, 1),
        ),
    )


def _gradient(apply: Apply, params: optax.Params, images: jax.Array, labels: jax.Array) -> optax.Updates:
    def loss(params: optax.Params) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels))

    return jax.grad(loss)(params)


def _stepped(
    tx: optax.GradientTransformation, params: optax.Params, state: optax.OptState, gradients: optax.Updates
) -> tuple[optax.Params, optax.OptState]:
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _local_steps(tx: optax.GradientTransformation, apply: Apply) -> Callable[..., tuple[optax.Params, optax.OptState]]:
    def local(
        params: optax.Params, state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[optax.Params, optax.OptState]:
        def one(
            carry: tuple[optax.Params, optax.OptState], batch: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[optax.Params, optax.OptState], None]:
            params, state = carry
            return _stepped(tx, params, state, _gradient(apply, params, *batch)), None

        (params, state), _ = jax.lax.scan(one, (_own(params), _own(state)), (images[0], labels[0]))
        return _with_axis(params), _with_axis(state)

    return local


def _meeting(outer: mo.outer.OuterMomentum) -> Callable[..., tuple[optax.Params, mo.outer.OuterState]]:
    def meet(params: optax.Params, state: mo.outer.OuterState) -> tuple[optax.Params, mo.outer.OuterState]:
        params, state = outer.sync(_own(params), state._replace(residual=_own(state.residual)), axis_name=AXIS)
        return _with_axis(params), state._replace(residual=_with_axis(state.residual))

    return meet


def _data_parallel(
    tx: optax.GradientTransformation, apply: Apply
) -> Callable[..., tuple[optax.Params, optax.OptState]]:
    def step(
        params: optax.Params, state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[optax.Params, optax.OptState]:
        return _stepped(tx, params, state, jax.lax.pmean(_gradient(apply, params, images[0], labels[0]), AXIS))

    return step


def placed(tree: optax.Params, mesh: Mesh, spec: PartitionSpec) -> optax.Params:
    """This worker's arrays as its part of global ones; with `PER_WORKER` they have an axis of length 1 in front."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def here(tree: optax.Params) -> optax.Params:
    """This worker's part of global arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def _own(tree: optax.Params) -> optax.Params:
    """Without the axis of workers, which has length 1 on a device."""
    return jax.tree.map(lambda x: x[0], tree)


def _with_axis(tree: optax.Params) -> optax.Params:
    return jax.tree.map(lambda x: x[None], tree)
