"""`by_path`: optimizers, or multiples of hyperparameters, by regular expressions over the paths of parameters."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias, cast

import jax
import optax

from .. import _checks
from .._paths import compiled, first_match
from .._tree import is_box
from .._typing import KeyPath, Number, PyTree
from ..filters.coefficients import Scalar

Make: TypeAlias = Callable[..., optax.GradientTransformation]


def by_path(
    patterns: Mapping[str, optax.GradientTransformation | Mapping[str, Number]],
    make: Make | None = None,
    **hyperparameters: object,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer for each parameter by its path, or one optimizer with multiples of its hyperparameters.

        mo.by_path({"embed/.*": mo.sgd(0.1), r".*/(bias|scale)": mo.signum(1e-3, 0.9), ".*": mo.sgd(0.1, 0.9)})
        mo.by_path(
            {"embed/.*": {"learning_rate": 10.0}, r".*/(bias|scale)": {"weight_decay": 0.0}, ".*": {}},
            mo.sgd, learning_rate=schedule, momentum=0.9, weight_decay=1e-4,
        )

    A path is a parameter's keys, names of fields and indices joined by slashes, "layers/0/kernel", without boxes of
    Flax. The first pattern that matches the whole of it counts. `optax.partition` does the rest: each optimizer sees
    its parameters alone, so that norms over a tree, as in clipping, are those of its part; put these outside.

    In the second form `make` is called once for each pattern, with the hyperparameters times the multiples: numbers,
    scalar arrays, and schedules at every step. To inject them, inject into a function around `by_path`:

        def make(learning_rate):
            return mo.by_path({"embed/.*": {"learning_rate": 10.0}, ".*": {}}, mo.sgd, learning_rate=learning_rate)

        tx = optax.inject_hyperparams(make)(learning_rate=0.1)

    Args:
      patterns: From regular expressions to optimizers; or, with `make`, to multiples of hyperparameters by name.
      make: A function that returns an optimizer, such as `mo.sgd`.
      hyperparameters: Arguments of `make` by name; those with a multiple are numbers, scalar arrays or schedules.

    Returns:
      A transformation whose state is Optax's `PartitionState`, with one entry for each pattern, in their order.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If there is no pattern, one is not a regular expression, or a multiple has no hyperparameter; at
        `init` and `update` if no pattern matches a parameter's path.
    """
    if not isinstance(patterns, Mapping):
        raise TypeError(f"patterns must map regular expressions to optimizers, got {_checks.shown(patterns)}")
    if not patterns:
        raise ValueError("patterns must have at least one entry, such as '.*', got none")
    tried = tuple(compiled("patterns", pattern) for pattern in patterns)
    txs: list[optax.GradientTransformation] = []
    for pattern, value in patterns.items():
        tx = value if make is None else _made(pattern, value, make, hyperparameters)
        if make is None and isinstance(value, Mapping):
            raise TypeError(
                f"make must be a function such as mo.sgd for multiples of hyperparameters, as at {pattern!r}, got None"
            )
        _checks.transformation(f"patterns[{pattern!r}]", tx)
        txs.append(cast(optax.GradientTransformation, tx))
    if make is None and hyperparameters:
        raise TypeError(f"make must be a function that takes {', '.join(hyperparameters)}, got None")
    labels = [_label(i, pattern) for i, pattern in enumerate(patterns)]
    partition = optax.partition(dict(zip(labels, txs, strict=True)), functools.partial(_labels, tried, labels))
    return optax.with_extra_args_support(partition)


def _label(i: int, pattern: str) -> str:
    """A key for states that every checkpoint takes: the number of a pattern and its letters."""
    return f"{i}_" + re.sub(r"\W+", "_", pattern).strip("_")


def _labels(tried: tuple[re.Pattern[str], ...], labels: list[str], params: PyTree) -> PyTree:
    """The label of each parameter; one for a box."""

    def label(path: KeyPath, leaf: PyTree) -> str:
        return labels[first_match("patterns", tried, path)]

    # A gradient of None too: its parameter has a label.
    return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda x: x is None or is_box(x))


def _made(pattern: str, multiples: object, make: Make, hyperparameters: Mapping[str, object]) -> object:
    """The optimizer of a pattern: `make` of the multiplied hyperparameters."""
    if not callable(make):
        raise TypeError(f"make must be a function that returns an optimizer, got {_checks.shown(make)}")
    if not isinstance(multiples, Mapping):
        raise TypeError(
            f"patterns[{pattern!r}] must map hyperparameters to multiples, since there is make, got "
            f"{_checks.shown(multiples)}"
        )
    missing = [str(name) for name in multiples if name not in hyperparameters]
    if missing:
        raise ValueError(f"patterns[{pattern!r}] must name hyperparameters that are given, got {', '.join(missing)}")
    times = {name: _times(name, hyperparameters[name], factor) for name, factor in multiples.items()}
    return make(**{**hyperparameters, **times})


def _times(name: str, value: object, factor: Number) -> Scalar:
    """A hyperparameter times a number."""
    _checks.constant(f"the multiple of {name}", factor, "(-inf, inf)")
    _checks.scalar(name, value)
    if _checks.is_schedule(value):
        schedule = cast(optax.Schedule, value)
        return lambda step: factor * schedule(step)
    return cast(Scalar, factor * cast(float, value))
