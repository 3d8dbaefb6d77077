"""The table of wrappers, for tests that hold of all of them; `wrappers/test_conformance.py` checks it against `mo`."""

from typing import Any, NamedTuple

import optax
from conformance import RULES

import momentum_optax as mo
from momentum_optax.filters import velocity_only_readout


class Row(NamedTuple):
    """A wrapper: the public function, a transformation from `(rule, storage)`, if a NaN skips its step, its rules."""

    function: Any
    build: Any
    skips: bool = False
    rules: tuple[str, ...] = tuple(RULES)


def around(function, *arguments, **options):
    """A row for `function(scale_by_momentum(...), ...)`."""
    return Row(function, lambda rule, s: function(mo.scale_by_momentum(rule, storage=s), *arguments, **options))


def instead(function, *arguments):
    """A row for `function(rule, ..., storage=)`."""
    return Row(function, lambda rule, s: function(rule, *arguments, storage=s))


# The update of these is a function of the new velocity.
FROM_VELOCITY = tuple(name for name, build in RULES.items() if velocity_only_readout(build().pruned()) is not None)

WRAPPERS = {
    "accumulated": instead(mo.accumulated, 2)._replace(rules=FROM_VELOCITY),
    "guarded": around(mo.guarded)._replace(skips=True),
    "guarded by leaf": around(mo.guarded, "leaf")._replace(skips=True),
    "restart by gradient": instead(mo.adaptive_restart),
    "restart by leaf": instead(mo.adaptive_restart, "gradient", "leaf"),
    "restart by loss": instead(mo.adaptive_restart, "function"),
    "scheduled restart": around(mo.scheduled_restart, 2),
    "cautious by count": around(mo.cautious, "count"),
    "cautious by mean": around(mo.cautious, "mean"),
    "cautious by sign bit": around(mo.cautious, "sign_bit"),
    "with momentum": Row(mo.with_momentum, lambda rule, s: mo.with_momentum(optax.scale(-0.5), rule, storage=s)),
    "monitor": Row(mo.monitor, lambda rule, s: mo.monitor(mo.scale_by_momentum(rule, storage=s), rule, every=2)),
}
