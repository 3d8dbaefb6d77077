"""`average_params` and `averaged_params`: an average of the weights beside them, for evaluation."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._boxes import content
from .._export import serializable
from .._tree import Leaves, absent, find_all, init_leaves, path_name, plain, raise_mismatch, reboxed, unboxed
from .._typing import Entry, KeyPath, Leaf, PyTree
from ..filters.coefficients import Scalar, value_at
from ..state.mismatch import ANYTHING, StateMismatchError, check_state
from ..storage import Storage, resolve
from ..storage._bfloat16 import Bfloat16
from ..storage._by_leaf import ByLeaf
from ..storage._float32 import Float32
from ..storage._int8 import Int8
from ..storage.noise import stamp_of
from ..storage.protocol import arithmetic_dtype, check_whole, checked_leaf
from ..storage.rows import code_shapes, split_as, zeros_along
from .residues import is_coded, read, write

# Leaves with fewer elements are kept in full, where a storage does not say.
_MIN_SIZE = 128
# Distinguishes the noise of averages from that of velocities and weights, which are rounded in the same step.
_AVERAGE = 0x41564552
# In float32 an average that takes less than this of the weights a step stands still.
_LEAST_WEIGHT = 2.0**-20


@serializable
class AverageState(NamedTuple):
    """State of `average_params`; `averaged_params` reads it.

    The weights after an update are first seen by the next one, which takes them into the average. Until then their
    share is in `weight`.

    Attributes:
      step: int32 scalar, the number of updates made.
      weight: Float scalar: the share that the present weights have in the average, and `codes` not yet.
      kept: Float scalar: the product of the decays since the last write; None where it is the same at every write.
      gain: Float scalar: the sum of the shares of all weights so far; only with `debias=True`.
      codes: A tree like the parameters: the average in full, or its last bits in units.
      unit: A tree of float32, one entry for each row, of shape (1, ..., 1) where the average is in full.
    """

    step: jax.Array
    weight: jax.Array
    kept: jax.Array | None
    gain: jax.Array | None
    codes: PyTree
    unit: PyTree


def average_params(
    decay: Scalar,
    *,
    every: int | jax.Array = 1,
    storage: str | Storage = "float32",
    debias: bool = False,
    start: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keep an average of the weights, $a_t = c\,a_{t-1} + (1-c)\,\theta_{t+1}$, beside any optimizer, for evaluation.

        tx = optax.chain(optax.adamw(1e-3), mo.average_params(0.999))
        ...
        averaged = mo.averaged_params(opt_state, params)

    Here $\theta_{t+1}$ are the weights after step t, $a_{-1} = \theta_0$. With `every` = k the average is written after
    each k-th step, with $c^k$ (the product of the last k decays of a schedule), and stands still between.

    Updates pass unchanged. It belongs at the end of the chain, where the updates are what is added to the weights;
    inside `guarded`, `optax.MultiSteps` and `optax.apply_if_finite`, so that steps that are skipped do not count. The
    weights are read from `params`, one step later, and `averaged_params` adds the last ones: whatever
    is done to them after the update, rounding, stochastic rounding, a projection, is in the average. A leaf whose
    gradient is None is averaged too. A non-finite weight makes its average non-finite for good.

    What is not trained by the optimizer is not averaged: statistics of normalization layers must be measured anew for
    averaged weights, see the guide.

    Storage. In "float32" (wider where the weights are) the average itself is kept. "bfloat16" takes 2 bytes a parameter
    and "int8" 1, and 4 for each row (`storage.ROW_SIZE`); they hold not floats but the last 16 or 8 bits of the
    average in units of its row, and the weights give the others. The error does not grow with the memory: on 64 x 512
    weights with decaying rate and noise it is 0.05 % of the average in 2 bytes and 1.2 % in 1 byte for decay 0.999,
    0.2 % and 4.3 % for 0.9999, 0.7 % and 4.3 % for that with `every=100` (`benchmarks/weight_averages.py`). That is 1
    to 3 % and 12 to 17 % of the distance between average and weights, which is the noise that the average removes: for
    decays beyond 0.999 take 2 bytes if a sixth of it matters. Steps a thousand times as large as usual coarsen both for
    a while. Weights that another program puts in place of the trained ones take the average along
    if they are far.

    Bytes: each step reads and writes the average, without a branch: 8 bytes a parameter beside the 20 of `optax.sgd`
    with momentum, compiled for TPU. In few bits it looks at the weights twice: 18 and 15 bytes, and a copy of the leaf.

    Args:
      decay: c per step, in [0, 1]: a number, a scalar array or a schedule of the step, counted from 0.
        `tuning.decay_from_half_life` gives it from a half-life in steps, tokens or epochs; `schedules.power_average`
        gives the mean of all weights, or more weight to the later ones; with `start`, or `schedules.restarted`, that of
        the last k checkpoints (LAWA). A schedule's values are float32, so that averages over more than a million steps
        need `every`.
      every: k, a whole number from 1, or an integer scalar array.
      storage: "float32", "bfloat16", "int8", or an object of `momentum_optax.storage`, for its `seed`, `min_size` and
        `axis_names`. Leaves of fewer than `min_size` elements (128 in bfloat16) and complex ones are kept in full.
      debias: Divide by the sum of the shares, so that the weights of `init` (or of `start`) have none, as in Adam.
      start: The number of steps until which the average is the weights themselves, from 0; the first write after it
        has the decays since.

    Returns:
      A transformation whose state is an `AverageState`. `update` needs `params`.

    Raises:
      TypeError: If an argument has the wrong type; at `init` if a leaf is not of a float or complex dtype.
      ValueError: If an argument is out of range, or the storage cannot keep averages; at `update` without `params`, or
        if these have other leaves than at `init`, or the updates other ones than these.
      StateMismatchError: At `update`, a `ValueError`, if the state is of another transformation.

    Reference:
      Polyak and Juditsky, SIAM J. Control and Optimization 1992; Ruppert, 1988. Stochastic weight averaging: Izmailov
      et al., UAI 2018, arXiv:1803.05407.
    """
    _checks.within("decay", decay, "[0, 1]")
    for name, count, least in (("every", every, 1), ("start", start, 0)):
        # Injected hyperparameters are arrays.
        if not _checks.is_array(count):
            _checks.integer(name, count, least)
    _checks.flag("debias", debias)
    if _checks.is_number(decay) and _checks.is_number(every) and 0 < 1 - decay**every < _LEAST_WEIGHT:
        _checks.warn(f"decay {decay!r} moves the average by less than float32 holds: write it less often, every=100")
    average = _Average(decay, every, _checked_storage(storage), debias, start)
    return optax.GradientTransformationExtraArgs(average.init, average.update)


def averaged_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The average of the weights that `average_params` keeps, with the present weights in it.

    Args:
      opt_state: A state, or any part of one, with one state of `average_params` for each parameter, in any chain, mask,
        partition or wrapper; the live one of an `nnx.Optimizer` too.
      params: The weights that belong to it: those after its last update. Before the first one they are the average.

    Returns:
      A tree like `params`, of the same dtypes; of float32 for weights in bfloat16 that are given in float32. A
      parameter that has no average, such as a masked one, is returned unchanged.

    Raises:
      TypeError: If `opt_state` is not a state.
      ValueError: If it holds no average, or two averages of one parameter: then give the part with one of them; if a
        parameter that it averages is not in `params`, or has another shape.
    """
    _checks.state("opt_state", opt_state)
    states = [state for _, state in find_all(unboxed(plain(opt_state)), AverageState)]
    if not states:
        raise ValueError("opt_state must hold a state of average_params: put it at the end of the optimizer's chain")
    found: dict[str, tuple[AverageState, Leaf, Leaf]] = {}
    for state in states:
        for (path, codes), unit in zip(_paths(state.codes), jax.tree.leaves(state.unit), strict=True):
            if path in found:
                raise ValueError(f"opt_state must hold one average of {path}, got two: give the part with one of them")
            found[path] = state, codes, unit

    shapes = {path: jnp.shape(x) for path, x in _paths(unboxed(params))}
    for path, (_, codes, _) in found.items():
        if shapes.get(path) != codes.shape:
            got = f"shape {shapes[path]}" if path in shapes else "no such leaf"
            raise ValueError(
                f"params must have {path} of shape {codes.shape}, whose average is in opt_state, got {got}"
            )

    def one(path: KeyPath, weights: Leaf) -> Leaf:
        state, codes, unit = found.get(path_name(path), (None, None, None))
        if state is None:
            return weights
        weights = jnp.asarray(weights)
        # A state that is spread further than the weights, as in zero1, is gathered.
        codes, unit = (split_as(jnp.asarray(x), weights) for x in (codes, unit))
        a = _read(codes, unit, weights)
        mixed: jax.Array = _mixed(a, weights, jnp.asarray(state.weight))
        return mixed.astype(weights.dtype)

    return reboxed(jax.tree_util.tree_map_with_path(one, unboxed(params)), params)


class _Average:
    """The methods of a transformation of checked arguments."""

    def __init__(
        self,
        decay: Scalar,
        every: int | jax.Array,
        storage: "Float32 | Bfloat16 | Int8",
        debias: bool,
        start: int | jax.Array,
    ) -> None:
        self.decay, self.every, self.storage, self.debias, self.start = decay, every, storage, debias, start
        # Then every write has the same decay: without a start within a period.
        numbers = all(map(_checks.is_number, (decay, every, start)))
        self.is_constant = numbers and int(start) % int(every) == 0
        kept, gain = None if self.is_constant else ANYTHING, ANYTHING if debias else None
        self.expected = AverageState(ANYTHING, ANYTHING, kept, gain, ANYTHING, ANYTHING)
        self.leaf_treedef = jax.tree.structure(AverageState(None, None, None, None, 0, 0))  # type: ignore[arg-type]

    def init(self, params: optax.Params) -> AverageState:
        """See `average_params`."""
        state = init_leaves(lambda place, x: self.init_leaf(checked_leaf(place[0], x)), params, self.leaf_treedef)
        dtypes = [arithmetic_dtype(content(x).dtype) for x in jax.tree.leaves(state.codes)]
        real = jnp.finfo(arithmetic_dtype(*(d for d in dtypes if jnp.issubdtype(d, jnp.inexact)))).dtype
        return state._replace(
            step=jnp.zeros([], jnp.int32),
            # All of the first weights that `update` sees.
            weight=jnp.ones([], real),
            kept=None if self.is_constant else jnp.ones([], real),
            gain=jnp.zeros([], real) if self.debias else None,
        )

    def init_leaf(self, leaf: Leaf) -> AverageState:
        """The state of one leaf, without scalars."""
        full = arithmetic_dtype(leaf.dtype)
        coded = {Bfloat16: jnp.int16, Int8: jnp.int8}.get(type(self.storage), full)
        shapes = code_shapes(leaf, getattr(self.storage, "min_size", _MIN_SIZE), coded)
        # In full there are no rows.
        row = shapes.one if shapes.dtype == full else shapes.row
        parts = zeros_along(leaf, leaf.shape, shapes.dtype), zeros_along(leaf, row, jnp.float32)
        return AverageState(None, None, None, None, *parts)  # type: ignore[arg-type]

    def update(
        self, updates: optax.Updates, state: AverageState, params: optax.Params | None = None, **extra: object
    ) -> tuple[optax.Updates, AverageState]:
        """See `average_params`."""
        del extra
        check_state(state, self.expected)
        if params is None:
            raise ValueError("params must be given to update: average_params reads the weights, got None")
        leaves = Leaves(params)
        _check_params(state.codes, params)
        if not leaves.fit(unboxed(updates)):
            raise_mismatch(unboxed(params), unboxed(updates))
        step, weight = content(state.step), content(state.weight)
        rows = zip(*map(leaves.of, (params, updates, state.codes, state.unit)), strict=True)
        news = [self.update_leaf(row, weight, (step, i)) for i, row in enumerate(rows)]
        codes, unit = (leaves.to_tree([new[j] for new in news], (state.codes, state.unit)[j]) for j in (0, 1))
        bare = AverageState(step, weight, content(state.kept), content(state.gain), codes, unit)
        new = self.next_scalars(bare)
        return updates, new._replace(
            **{name: reboxed(getattr(new, name), getattr(state, name)) for name in ("step", "weight", "kept", "gain")}
        )

    def update_leaf(
        self, row: tuple[Entry, Entry, Entry, Entry], weight: jax.Array, number: tuple[jax.Array, int]
    ) -> tuple[Entry, Entry]:
        """Codes and unit of a leaf with the present weights in them."""
        weights, update, codes, unit = row
        if absent(weights) or absent(codes):
            return codes, unit
        average = _mixed(_read(codes, unit, weights), weights, weight)
        if not is_coded(codes):
            return average, unit
        storage = cast("Bfloat16 | Int8", self.storage)
        if storage.axis_names is None:
            check_whole(f"average_params in {type(storage).__name__}", average, "give the storage axis_names=()")
        moved = weights if absent(update) else weights.astype(jnp.float32) + update.astype(jnp.float32)
        step, i = number
        noise = stamp_of(_AVERAGE, storage.seed, i), step // jnp.asarray(self.every, step.dtype)
        return write(average, codes, unit, (weights, moved), noise)

    def next_scalars(self, state: AverageState) -> AverageState:
        """The state with its scalars after the step."""
        step, kept, gain, real = state.step, state.kept, state.gain, state.weight.dtype
        count = step + 1
        fresh = count <= jnp.asarray(self.start, step.dtype)
        due = (count % jnp.asarray(self.every, step.dtype) == 0) | fresh
        if kept is None:
            # In Python's float64: one minus a float32 near one would be off.
            power = float(cast(float, self.decay)) ** int(self.every)
            product, share = jnp.asarray(power, real), jnp.asarray(1 - power, real)
        else:
            product = kept * jnp.asarray(value_at(self.decay, step), real)
            share = 1 - product
            kept = jnp.where(due, 1, product)
        if gain is not None:
            total = product * gain + share
            # While nothing has a share yet the average is the weights.
            share = jnp.where(total > 0, share / jnp.where(total > 0, total, 1), 1)
            gain = jnp.where(fresh, 0, jnp.where(due, total, gain))
        weight = jnp.where(fresh, 1, jnp.where(due, share, 0)).astype(real)
        return state._replace(step=optax.safe_increment(step), weight=weight, kept=kept, gain=gain)


def _read(codes: jax.Array, unit: jax.Array, weights: jax.Array) -> jax.Array:
    return read(codes, unit, weights) if is_coded(codes) else codes


def _mixed(average: jax.Array, weights: jax.Array, weight: jax.Array) -> jax.Array:
    """The average with the present weights in it; exactly the one where their share is 0, the others where it is 1."""
    weights = weights.astype(average.dtype)
    mixed = average + weight.astype(average.dtype) * (weights - average)
    return jnp.where(weight == 1, weights, jnp.where(weight == 0, average, mixed))


def _checked_storage(storage: str | Storage) -> "Float32 | Bfloat16 | Int8":
    kept = resolve(storage)
    if isinstance(kept, ByLeaf):
        raise ValueError(
            f"storage must be the same for all leaves in average_params, got {_checks.shown(storage)}: give each "
            "leaf's optimizer in mo.by_path its own average_params"
        )
    if not isinstance(kept, Float32 | Bfloat16 | Int8):
        raise ValueError(f"storage must be 'float32', 'bfloat16' or 'int8' for averages of weights, got {kept!r}")
    if isinstance(kept, Bfloat16) and kept.rounding != "stochastic":
        raise ValueError(f"storage must be rounded stochastically: an average rounded to nearest stalls, got {kept!r}")
    return kept


def _paths(tree: PyTree) -> list[tuple[str, Leaf]]:
    """Name and leaf, for each leaf of a bare tree."""
    return [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _check_params(codes: PyTree, params: PyTree) -> None:
    """Raise unless the parameters are those of `init`."""
    there, here = ({path: jnp.shape(x) for path, x in _paths(unboxed(tree))} for tree in (codes, params))
    wrong = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
    if wrong or not Leaves(params).fit(unboxed(codes)):
        got = f"{wrong[0]} of shape {here.get(wrong[0])} for {there.get(wrong[0])}" if wrong else "other containers"
        raise StateMismatchError(f"params must be those of init, got {got}: averages begin anew with tx.init(params)")
