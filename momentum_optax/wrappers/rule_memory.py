"""`Memory` of `monitor`: gain, mean lag and ages, from the coefficients of a rule alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._export import serializable
from .._typing import Condition, Count
from ..filters import Filter
from ..transform import MomentumState
from .figures import quotient, zeros


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

    weights: jax.Array
    moments: jax.Array
    age: jax.Array
    gain: jax.Array
    mean_lag: jax.Array


def no_memory(order: int) -> Memory:
    """The `Memory` of a rule with `order` velocities before the first step."""
    return Memory(zeros(order), zeros(order), zeros(order), zeros(), zeros())


def advance(rule: Filter, memory: Memory, empty: Condition, state: MomentumState, count: Count) -> Memory:
    """The memory one step later; where the velocities are `empty` it restarts from zero.

    Args:
      rule: The rule, with K velocities.
      memory: Its memory.
      empty: Whether all velocities are zero.
      state: The state of `scale_by_momentum`.
      count: The number of the step for a state that counts none.
    """
    step = count if state.step is None else state.step
    ages = [jnp.max(x) for x in jax.tree.leaves(state.age)]
    now = rule.at(step, jnp.max(jnp.stack(ages)) if ages else step)
    K = rule.order
    entries = jnp.stack([jnp.asarray(c, jnp.float32) for c in now.coefficients()])
    A, B, C, D = entries[: K * K].reshape(K, K), entries[K * K : -K - 1], entries[-K - 1 : -1], entries[-1]
    w, m = (jnp.where(empty, 0, x) for x in (memory.weights, memory.moments))
    gain = jnp.sum(C * w) + D
    lag = quotient(jnp.sum(C * m), gain)
    weights, moments = (jnp.sum(A * x[None, :], axis=1) + B for x in (w, m + w))
    age = jnp.where(weights == 0, 0, quotient(moments, weights) - 1)
    return Memory(weights, moments, age, gain if state.gain is None else jnp.ones_like(gain), lag)
