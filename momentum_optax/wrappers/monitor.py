"""`monitor` and `telemetry`: what the momentum of a run is doing, in a few numbers."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._export import serializable
from .._tree import absent, find_all, reboxed, to_trees, unboxed
from ..filters import Filter
from ..filters.fingerprints import difference, fingerprint, noted
from ..state.mismatch import check_state
from ..state.velocity import velocity
from ..storage.protocol import arithmetic_dtype
from ..storage.rows import row_axes
from ..transform import MomentumState
from .compress import CompressedState, field_name, flattened, is_kept, is_plain, slots_of

# So many elements are summed one by one, at most twice as many.
_LONGEST = 4096


@serializable
class Figures(NamedTuple):
    """What `monitor` measured last, in float32; see there. N entries are one for each velocity.

    Attributes:
      gradient_norm: Scalar.
      effective_learning_rate: Scalar.
      velocity_norm: N entries.
      cosine: N entries.
      quantization_error: N entries.
      stalled: N entries.
    """

    gradient_norm: Any
    effective_learning_rate: Any
    velocity_norm: Any
    cosine: Any
    quantization_error: Any
    stalled: Any


@serializable
class Memory(NamedTuple):
    """The response of a rule to a gradient that is 1 at every step, and to one that is its age; see `monitor`.

    Attributes:
      weights: Float32, K entries for K velocities: the sum of the gradients' weights in each velocity.
      moments: Float32, K entries: the sum of the weights times the gradients' ages, the newest one's being 1.
      age: Float32, K entries.
      gain: Float32 scalar.
      mean_lag: Float32 scalar.
    """

    weights: Any
    moments: Any
    age: Any
    gain: Any
    mean_lag: Any


@serializable
class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
      inner: The state of the monitored transformation.
      step: int32 scalar, the number of updates made.
      figures: `Figures`.
      memory: `Memory`; None unless the monitor was given a rule.
    """

    inner: Any
    step: Any
    figures: Figures
    memory: Any


def monitor(
    tx: optax.GradientTransformation, rule: Filter | None = None, *, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""The updates and velocities of `tx`, with a few numbers about its momentum in the state; `telemetry` reads them.

    Stored codes are those without a monitor to the bit, and so are float32 numbers unless XLA joins the float
    operations of the larger program in another way.

        tx = mo.monitor(optax.chain(optax.clip_by_global_norm(1.0), mo.sgd(0.1, rule, storage="int8")), rule, every=10)
        ...
        mo.telemetry(opt_state)      # {"velocity_norm": 3.2, "cosine": 0.41, "stalled": 0.02, ...}

    With g the gradients that the monitor is given, u the updates that it returns, $v \to v'$ a stored velocity before
    and after the step as it is read, and $\hat v$ what $v'$ would be without compression (the same step of `tx` from v
    in float32), all over every leaf with a gradient:

    * `gradient_norm`: $\|g\|$;
    * `effective_learning_rate`: $\|u\| / \|g\|$, the rate at which plain descent makes a step of this length. Around
      a whole optimizer its learning rate is part of it, around `scale_by_momentum` alone it is the factor before;
    * `velocity_norm`: $\|v'\|$;
    * `cosine`: $\langle g, v \rangle / (\|g\| \|v\|)$, how far the gradient agrees with those before it;
    * `quantization_error`: $\|v' - \hat v\| / \|\hat v\|$, what storing the velocity lost in this step;
    * `stalled`: the share of elements whose code (for bfloat16, its value) stayed as it was although
      $\hat v \ne v$. Rounded at random, as by default, a velocity still moves on average; rounded to nearest, an
      element that stalls again and again has stopped.

    From the rule's coefficients, its response to a gradient that is always 1 since the first update: with weights w and
    moments m of K entries, $w' = A w + B$ and $m' = A (m + w) + B$,

    * `gain`: $C w + D$, the sum of the gradients' weights in u before the learning rate; 1 if debiased. Times the
      learning rate it is `analysis.effective_learning_rate` on the way there;
    * `mean_lag`: $C m / (C w + D)$, the mean age of the gradients in u; it becomes `analysis.mean_lag`;
    * `age`: $m'/w' - 1$, the mean age of the gradients in each velocity after the step, 0 being that of the newest.

    Weights keep their signs, so that a mean age can be negative or beyond the oldest gradient. These three are exact
    under schedules. They follow a leaf that received a gradient at every step; the memory begins anew where a measured
    step starts from velocities of zero, as after a restart. A quotient by zero is 0.

    Squares are summed in float32 (a norm beyond 1e19 is infinite, one below 1e-23 may be 0). A NaN in the gradients
    makes NaN of that step's figures alone; put `guarded` around the monitor rather than into it. With `scope="leaf"`
    the figures of a step then count a leaf that skips it as one whose gradient is zero.

    Cost: a step that is not measured moves no byte more, but gradients that are made within a chain, by weight decay
    for example, are written out before the monitor: put it around the whole optimizer. A measured step is computed
    twice, once for the figures. On a CPU measure seldom: XLA copies the velocities at each step, and sums slowly.

    Args:
      tx: Any transformation with states of `scale_by_momentum` or `compress` in it. The figures of `compress` are those
        of the fields that it keeps.
      rule: The rule of the only `scale_by_momentum` in `tx`, for `gain`, `mean_lag` and `age`; None leaves them out.
        It is compared with the one that `tx` runs, where coefficients are not traced.
      every: Measure each step whose number is a multiple of this, a whole number from 1, and keep the figures between.

    Returns:
      A transformation whose state is a `MonitorState`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If `every` is out of range; at `init` if `tx` has no such state, or `rule` is not its rule, or the
        velocities are not like the parameters, as after `optax.flatten`; at `update` if a storage of your own cannot
        keep a leaf in full (see law 7 of `storage.protocol`).
    """
    _checks.transformation("tx", tx)
    if rule is not None and not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as heavy_ball(0.9) or None, got {_checks.shown(rule)}")
    _checks.integer("every", every, 1)
    run = optax.with_extra_args_support(tx)
    rule = None if rule is None else rule.pruned()

    def init(params: optax.Params) -> MonitorState:
        with noted() as rules:
            inner = tx.init(params)
        _check(inner, params, rule)
        if rule is not None and len(rules) == 1:
            _check_rule(rule, rules[0])
        count = len(_velocities(inner))
        figures = Figures(_zeros(), _zeros(), _zeros(count), _zeros(count), _zeros(count), _zeros(count))
        memory = None
        if rule is not None:
            K = rule.order
            memory = Memory(_zeros(K), _zeros(K), _zeros(K), _zeros(), _zeros())
        return MonitorState(inner, jnp.zeros([], jnp.int32), figures, memory)

    def update(
        updates: optax.Updates, state: MonitorState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, MonitorState]:
        anything: Any = ...
        check_state(state, MonitorState(anything, anything, anything, None if rule is None else anything))

        def step(inner: Any, updates: Any) -> tuple[Any, Any]:
            out, after = run.update(updates, inner, params, **extra)
            return out, after

        inner, figures, memory = state.inner, state.figures, state.memory
        if any(not absent(g) for g in _leaves(updates)[0]):
            due = True if every == 1 else state.step % every == 0
            figures, empty = _when(
                due, lambda: _measure(step, updates, inner), lambda: (state.figures, jnp.zeros([], bool))
            )
            if rule is not None:
                memory = _remember(rule, memory, empty, _momentum(inner), state.step)
        # What is measured reads what the step overwrites, and must not change how the step is compiled.
        updates, inner, figures = jax.lax.optimization_barrier((updates, inner, figures))
        out, inner = step(inner, updates)
        return out, MonitorState(inner, optax.safe_increment(state.step), figures, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def telemetry(opt_state: Any) -> dict[str, Any]:
    """The figures of a `monitor` in any optimizer state: chained, masked, injected, accumulated, ...

    Args:
      opt_state: A state, or any tree, that holds a state of `monitor`; the live one of an `nnx.Optimizer` too.

    Returns:
      A dictionary of numbers, for a progress bar or a log: those that `monitor` names, `bytes` of the monitored state,
      and `bytes_per_parameter` for parameters with a velocity (an int4 counts half a byte, as TPUs and GPUs keep it).
      Of several velocities each has its own entry, "cosine/0", "cosine/1", in the order of `velocity`; fields of
      `compress` have theirs by name, "cosine/mu". Figures of the second of several monitors begin with "1/". Python
      floats; under a transformation such as `jax.jit` traced scalars, and arrays where the state is batched.

    Raises:
      ValueError: If there is no state of `monitor`.
    """
    _checks.state("opt_state", opt_state)
    states = [state for _, state in find_all(unboxed(opt_state), MonitorState)]
    if not states:
        raise ValueError("opt_state must hold a state of monitor, got one without")
    found: dict[str, Any] = {}
    for i, state in enumerate(states):
        prefix = f"{i}/" if len(states) > 1 else ""
        found |= {prefix + name: value for name, value in _numbers(state).items()}
    return found


class _Velocities(NamedTuple):
    """A tree of codes, and the field of `compress` that they are; what is not compressed of that is None."""

    codes: Any
    field: str | None


def _leaves(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(unboxed(tree), is_leaf=absent)


def _zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def _is_observed(x: Any) -> bool:
    return isinstance(x, MomentumState) or is_kept(x)


def _momentum(state: Any) -> MomentumState:
    """The only state of `scale_by_momentum`."""
    (found,) = [x for _, x in flattened(state, _is_observed)[0] if isinstance(x, MomentumState)]
    return found


def _velocities(state: Any) -> list[_Velocities]:
    """The stored velocities in a state, and the fields that `compress` keeps."""
    found = []
    for path, node in flattened(state, _is_observed)[0]:
        if isinstance(node, MomentumState):
            found += [_Velocities(codes, None) for codes in node.velocity[0]]
        elif is_kept(node):
            slots, _, treedef = slots_of(node)
            codes = [None if is_plain(slot) else slot.parts[0][0] for slot in slots]
            found.append(_Velocities(treedef.unflatten(codes), field_name(path)))
    return found


def _decoded(state: Any) -> list[Any]:
    """The same velocities as they are read."""
    found: list[Any] = []
    for _, node in flattened(state, _is_observed)[0]:
        if isinstance(node, MomentumState):
            found += velocity(node)
        elif is_kept(node):
            slots, _, treedef = slots_of(node)
            values = [None if is_plain(slot) else slot.parts.decode(slot.parts)[0] for slot in slots]
            found.append(treedef.unflatten(values))
    return found


def _in_full(state: Any) -> Any:
    """`state` with its velocities in full, which the first part of every storage may hold: a step of it is exact."""
    pairs, treedef = flattened(state, _is_observed)
    return treedef.unflatten([_widened(node) if _is_observed(node) else node for _, node in pairs])


def _widened(node: Any) -> Any:
    """A state of `scale_by_momentum`, or a field that `compress` keeps, in full."""
    if isinstance(node, MomentumState):
        return node._replace(velocity=_with_first(node.velocity, velocity(node)))
    slots, layout, treedef = slots_of(node)
    wide = [
        slot if is_plain(slot) else slot._replace(parts=_with_first(slot.parts, slot.parts.decode(slot.parts)))
        for slot in slots
    ]
    return reboxed(to_trees(wide, treedef, layout), node)


def _with_first(parts: Any, values: tuple[Any, ...]) -> Any:
    return parts._replace(**{parts._fields[0]: values})


def _check(inner: Any, params: Any, rule: Filter | None) -> None:
    """Raise unless there is something to observe, and it belongs to `params` and `rule`."""
    ours = [x for _, x in find_all(inner, MomentumState, CompressedState)]
    if not ours:
        raise ValueError("tx must hold a state of scale_by_momentum or compress, got one without")
    found = _velocities(inner)
    structure = _leaves(params)[1]
    for codes, _ in found:
        if _leaves(codes)[1] != structure:
            got = _leaves(codes)[1]
            raise ValueError(f"tx must keep its velocities in trees like the parameters, {structure}, got {got}")
    momenta = [x for x in ours if isinstance(x, MomentumState)]
    if rule is not None and (len(momenta) != 1 or len(momenta[0].velocity[0]) != rule.order):
        orders = [len(x.velocity[0]) for x in momenta]
        raise ValueError(
            f"rule must be that of the only scale_by_momentum in tx, got order {rule.order} for states with {orders} "
            "velocities"
        )


def _check_rule(rule: Filter, running: dict[str, Any]) -> None:
    """Raise unless `rule` has the coefficients of the rule that runs."""
    problem = difference(running, fingerprint(rule))
    if problem:
        raise ValueError(f"rule must be the one that tx runs (or None, without gain, mean_lag and age): {problem}")


def _when(due: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """One of two, chosen now or by the compiled program."""
    return then() if due is True else jax.lax.cond(due, then, otherwise)


def _remember(rule: Filter, memory: Memory, empty: Any, state: MomentumState, count: Any) -> Memory:
    """The memory one step on; where the velocities are `empty` it begins anew."""
    step = count if state.step is None else state.step
    ages = [jnp.max(x) for x in jax.tree.leaves(state.age)]
    now = rule.at(step, jnp.max(jnp.stack(ages)) if ages else step)
    K = rule.order
    entries = jnp.stack([jnp.asarray(c, jnp.float32) for c in now.coefficients()])
    A, B, C, D = entries[: K * K].reshape(K, K), entries[K * K : -K - 1], entries[-K - 1 : -1], entries[-1]
    w, m = (jnp.where(empty, 0, x) for x in (memory.weights, memory.moments))
    gain = jnp.sum(C * w) + D
    lag = _quotient(jnp.sum(C * m), gain)
    weights, moments = (jnp.sum(A * x[None, :], axis=1) + B for x in (w, m + w))
    age = jnp.where(weights == 0, 0, _quotient(moments, weights) - 1)
    return Memory(weights, moments, age, gain if state.gain is None else jnp.ones_like(gain), lag)


def _measure(step: Callable[[Any, Any], tuple[Any, Any]], updates: Any, inner: Any) -> tuple[Figures, jax.Array]:
    """The figures of a step from `inner`, and whether all velocities were zero before it."""
    out, after = step(inner, updates)
    _, exact = step(_in_full(inner), updates)
    gradients, treedef = _leaves(updates)

    def of(tree: Any) -> list[Any]:
        leaves: list[Any] = treedef.flatten_up_to(unboxed(tree))
        return leaves

    moved = of(out)
    read = [_decoded(state) for state in (inner, after, exact)]
    *codes, wide = ([v.codes for v in _velocities(state)] for state in (inner, after, exact))
    if [x.dtype for x in jax.tree.leaves(wide)] != [x.dtype for x in jax.tree.leaves(read[0])]:
        raise ValueError(
            "the storage must keep velocities in full where the first of the parts to replace holds them so"
        )
    # For each velocity its leaves before and after, exactly after, and the codes before and after.
    columns = [tuple(map(of, trees)) for trees in zip(*read, *codes, strict=True)]
    rows = []
    for i, (g, u) in enumerate(zip(gradients, moved, strict=True)):
        if not absent(g):
            rows.append(_sums(g, u, [tuple(column[i] for column in leaves) for leaves in columns]))
    (gg, uu), *each = (sum(row[1:], row[0]) for row in zip(*rows, strict=True))
    n, vg, vv, dd, xx, ee, still, own = jnp.stack(each, axis=1) if each else _zeros(8, 0)
    norm, before = jnp.sqrt(gg), jnp.sqrt(vv)
    figures = Figures(
        gradient_norm=norm,
        effective_learning_rate=_quotient(jnp.sqrt(uu), norm),
        velocity_norm=jnp.sqrt(dd),
        cosine=_quotient(vg, jnp.sqrt(own) * before),
        quantization_error=_quotient(jnp.sqrt(ee), jnp.sqrt(xx)),
        stalled=_quotient(still, n),
    )
    return figures, jnp.all(vv == 0)


def _sums(g: Any, u: Any, velocities: list[tuple[Any, ...]]) -> list[jax.Array]:
    """For one leaf, two sums of squares, then for each velocity eight numbers; all in float32.

    One reduction gives all of them, so that the arrays are read once.
    """
    g, there = jnp.asarray(g), [not absent(v[0]) for v in velocities]
    terms = [_square(g), _square(jnp.asarray(u))]
    for v, after, exact, code, new in (v for v, is_there in zip(velocities, there, strict=True) if is_there):
        still = (code == new) & (exact != v)
        terms += [_product(g, v), _square(v), _square(after), _square(exact), _square(after - exact), still]
    gg, uu, *rest = _totals([jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in terms])
    rows, size = [jnp.stack([gg, uu])], jnp.float32(g.size)
    for is_there in there:
        rows.append(jnp.stack([size, *rest[:6], gg]) if is_there else _zeros(8))
        rest = rest[6:] if is_there else rest
    return rows


def _product(a: Any, b: Any) -> Any:
    dtype = arithmetic_dtype(a.dtype, b.dtype)
    return jnp.real(jnp.conj(a.astype(dtype)) * b.astype(dtype))


def _square(x: Any) -> Any:
    wide = x.astype(arithmetic_dtype(x.dtype))
    return jnp.square(jnp.real(wide)) + jnp.square(jnp.imag(wide)) if jnp.iscomplexobj(wide) else jnp.square(wide)


def _totals(arrays: list[jax.Array]) -> list[jax.Array]:
    """The sums of arrays of one shape, each read once: of rows first, since a long sum in float32 loses small terms."""
    shape = arrays[0].shape
    if shape and shape[-1] > 2 * _LONGEST:
        whole = shape[-1] // _LONGEST * _LONGEST
        rows = [x[..., :whole].reshape(*shape[:-1], -1, _LONGEST) for x in arrays]
        return [a + b for a, b in zip(_totals(rows), _totals([x[..., whole:] for x in arrays]), strict=True)]
    zeros = (jnp.float32(0),) * len(arrays)
    sums = jax.lax.reduce(
        tuple(arrays), zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), row_axes(shape)
    )
    return [jnp.sum(x) for x in sums]


def _quotient(a: Any, b: Any) -> jax.Array:
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _numbers(state: MonitorState) -> dict[str, Any]:
    """The figures of one monitor by name."""
    figures, memory = state.figures, state.memory
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((figures, memory))):
        figures, memory = jax.device_get((figures, memory))
    velocities = _velocities(state.inner)
    names = _labels(velocities)
    found = {name: getattr(figures, name) for name in Figures._fields[:2]}
    for name in Figures._fields[2:]:
        found |= _each(name, getattr(figures, name), names)
    if memory is not None:
        found |= {"gain": memory.gain, "mean_lag": memory.mean_lag}
        found |= _each("age", memory.age, [n for n, v in zip(names, velocities, strict=True) if v.field is None])
    total = sum(x.size * _bits(x.dtype) / 8 for x in jax.tree.leaves(state.inner))
    sizes = zip(*([0 if absent(x) else x.size for x in _leaves(v.codes)[0]] for v in velocities), strict=True)
    parameters = sum(map(max, sizes))
    found |= {"bytes": total} | ({"bytes_per_parameter": total / parameters} if parameters else {})
    return {
        name: float(x) if isinstance(x, np.ndarray | np.generic) and x.ndim == 0 else x for name, x in found.items()
    }


def _labels(velocities: list[_Velocities]) -> list[str]:
    """What tells the velocities apart: their numbers, or the fields of `compress`, where these are not the same."""
    count = itertools.count()
    names = [str(next(count)) if v.field is None else v.field for v in velocities]
    return names if len(set(names)) == len(names) else [str(i) for i in range(len(names))]


def _each(name: str, values: Any, suffixes: list[str]) -> dict[str, Any]:
    """An entry for each velocity; a lone one needs no suffix."""
    if len(suffixes) == 1:
        suffixes = [""]
    return {f"{name}/{suffix}" if suffix else name: values[..., i] for i, suffix in enumerate(suffixes)}


def _bits(dtype: Any) -> int:
    return int(jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize)
