"""`monitor`: a few numbers about the momentum of a run, measured while it runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import Leaves, absent
from .._typing import PyTree
from ..filters import Filter
from ..filters.fingerprints import difference, fingerprint, noted
from ..state.mismatch import ANYTHING, check_state
from .figures import Figures, Step, measure, no_figures
from .observed import check_observable, only_momentum, stored_velocities
from .rule_memory import Memory, advance, no_memory


@serializable
class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
      inner: The state of the monitored transformation.
      step: int32 scalar, the number of updates made.
      figures: `Figures`.
      memory: `Memory`; None unless the monitor was given a rule.
    """

    inner: optax.OptState
    step: jax.Array
    figures: Figures
    memory: Memory | None


def monitor(
    tx: optax.GradientTransformation, rule: Filter | None = None, *, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Run `tx` unchanged and keep a few numbers about its momentum in the state; `telemetry` reads them.

    Stored codes are bit-equal to those without a monitor, and so are float32 numbers unless XLA fuses the float
    operations of the larger program differently.

        tx = mo.monitor(optax.chain(optax.clip_by_global_norm(1.0), mo.sgd(0.1, rule, storage="int8")), rule, every=10)
        ...
        mo.telemetry(opt_state)      # {"velocity_norm": 3.2, "cosine": 0.41, "stalled": 0.02, ...}

    Let g be the gradients that the monitor is given, u the updates that it returns, $v \to v'$ a decoded velocity
    before and after the step, and $\hat v$ the $v'$ of a step without compression (the same step of `tx` from v in
    float32). Over all leaves with a gradient:

    * `gradient_norm`: $\|g\|$;
    * `effective_learning_rate`: $\|u\| / \|g\|$, the learning rate at which plain descent makes a step of this length.
      Around a whole optimizer it includes the learning rate; around `scale_by_momentum` alone it is the factor before;
    * `velocity_norm`: $\|v'\|$;
    * `cosine`: $\langle g, v \rangle / (\|g\| \|v\|)$, the agreement of the gradient with those before it;
    * `quantization_error`: $\|v' - \hat v\| / \|\hat v\|$, the relative error of storing the velocity in this step;
    * `stalled`: the share of elements whose code (in bfloat16, whose value) did not change although $\hat v \ne v$.
      With stochastic rounding, the default, a velocity still moves on average; rounded to nearest, an element that
      stalls repeatedly has stopped.

    From the rule's coefficients, its response to a gradient that is always 1 since the first update: with weights w and
    moments m of K entries, $w' = A w + B$ and $m' = A (m + w) + B$,

    * `gain`: $C w + D$, the sum of the gradients' weights in u before the learning rate; 1 if debiased. Times the
      learning rate it is `analysis.effective_learning_rate` on the way there;
    * `mean_lag`: $C m / (C w + D)$, the mean age of the gradients in u; it becomes `analysis.mean_lag`;
    * `age`: $m'/w' - 1$, the mean age of the gradients in each velocity after the step, 0 being that of the newest.

    Weights keep their signs, so that a mean age can be negative or beyond the oldest gradient. These three are exact
    under schedules. They describe a leaf that received a gradient at every step; the sums restart where a measured step
    starts from velocities of zero, as after a restart. A quotient by zero is 0.

    Squares are summed in float32 (a norm beyond 1e19 is infinite, one below 1e-23 may be 0). A NaN in the gradients
    affects that step's figures only; put `guarded` around the monitor rather than inside it. With `scope="leaf"`
    the figures of a step then count a leaf that skips it as one whose gradient is zero.

    Cost: a step that is not measured moves no additional bytes, but gradients that are computed within a chain, by
    weight decay for example, are written to memory before the monitor: put it around the whole optimizer. A measured
    step is computed twice, once for the figures. On CPU measure rarely: XLA copies the velocities at each step, and
    sums slowly.

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
        velocities are not like the parameters, as after `optax.flatten`; at `update` if a custom storage cannot keep a
        leaf in full precision (see law 7 of `storage.protocol`).
    """
    _checks.transformation("tx", tx)
    if rule is not None and not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as heavy_ball(0.9) or None, got {_checks.shown(rule)}")
    _checks.integer("every", every, 1)
    return _monitor(optax.with_extra_args_support(tx), None if rule is None else rule.pruned(), int(every))


def _monitor(
    tx: optax.GradientTransformationExtraArgs, rule: Filter | None, every: int
) -> optax.GradientTransformationExtraArgs:
    """`monitor` of checked arguments."""

    def init(params: optax.Params) -> MonitorState:
        with noted() as rules:
            inner = tx.init(params)
        check_observable(inner, params, rule)
        if rule is not None and len(rules) == 1:
            _check_rule(rule, rules[0])
        memory = None if rule is None else no_memory(rule.order)
        return MonitorState(inner, jnp.zeros([], jnp.int32), no_figures(len(stored_velocities(inner))), memory)

    def update(
        updates: optax.Updates, state: MonitorState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, MonitorState]:
        check_state(state, MonitorState(ANYTHING, ANYTHING, ANYTHING, None if rule is None else ANYTHING))

        def step(inner: optax.OptState, updates: optax.Updates) -> tuple[optax.Updates, optax.OptState]:
            out, after = tx.update(updates, inner, params, **extra)
            return out, after

        inner, figures, memory = state.inner, state.figures, state.memory
        if any(not absent(g) for g in Leaves(updates).values):
            figures, empty = _measured_when_due(step, updates, state, every)
            if rule is not None and memory is not None:
                memory = advance(rule, memory, empty, only_momentum(inner), state.step)
        # The figures read buffers that the step overwrites, and must not change how the step is compiled.
        updates, inner, figures = jax.lax.optimization_barrier((updates, inner, figures))
        out, inner = step(inner, updates)
        return out, MonitorState(inner, optax.safe_increment(state.step), figures, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _measured_when_due(
    step: Step, updates: optax.Updates, state: MonitorState, every: int
) -> tuple[Figures, jax.Array]:
    """The figures of a step whose number is a multiple of `every`, else the last ones; see `measure`."""
    if every == 1:
        return measure(step, updates, state.inner)
    measured: tuple[Figures, jax.Array] = jax.lax.cond(
        state.step % every == 0,
        lambda: measure(step, updates, state.inner),
        lambda: (state.figures, jnp.zeros([], bool)),
    )
    return measured


def _check_rule(rule: Filter, running: dict[str, PyTree]) -> None:
    """Raise unless `rule` has the coefficients of the rule that runs."""
    problem = difference(running, fingerprint(rule))
    if problem:
        raise ValueError(f"rule must be the one that tx runs (or None, without gain, mean_lag and age): {problem}")
