"""Runs with this package over the cases; used by the tests and by the script that records."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden.cases import HANDOVER, RECORDED, STEPS, flatten, gradient, start

import momentum_optax as mo


def arguments(case):
    """The dialect's arguments, with tables as schedules; numbers for a step that is known, as it is outside jit."""

    def table_lookup(table, step):
        return jnp.asarray(table)[step] if isinstance(step, jax.core.Tracer) else float(table[int(step)])

    return dict(case.arguments) | {
        name: functools.partial(table_lookup, table) for name, table in case.scheduled.items()
    }


def transformation(case, **options):
    """The dialect of a case."""
    return getattr(mo.interop, case.dialect)(**arguments(case), **options)


def run(tx, case, params, opt_state, steps, *, to_ours=lambda tree: tree, to_torch=lambda tree: tree):
    """The recorded parameters over `steps`, and the last parameters and state; arrays are PyTorch's at either end."""
    recorded = []
    params = jax.tree.map(jnp.asarray, to_ours(params))
    for t in steps:
        g = gradient(to_torch(jax.tree.map(np.asarray, params)), t, case.ascends)
        updates, opt_state = tx.update(to_ours(g), opt_state, params)
        params = mo.apply_updates(params, updates)
        if t + 1 in RECORDED:
            recorded.append(flatten(to_torch(jax.tree.map(np.asarray, params))))
    return np.array(recorded), to_torch(jax.tree.map(np.asarray, params)), opt_state


def our_first_half(case, dtype):
    """The parameters and the state at the hand-over."""
    return _first_half(transformation(case), case, dtype)[1:]


def our_run(case, dtype):
    """The recorded parameters of all steps, and the parameters and the state at the hand-over."""
    tx = transformation(case)
    first, params, opt_state = _first_half(tx, case, dtype)
    second, _, _ = run(tx, case, params, opt_state, range(HANDOVER, STEPS))
    return np.concatenate([first, second]), params, opt_state


def _first_half(tx, case, dtype):
    params = start(dtype)
    return run(tx, case, params, tx.init(jax.tree.map(jnp.asarray, params)), range(HANDOVER))
