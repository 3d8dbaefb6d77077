"""Descriptions: each changed entry is named."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.state.checkpoint import CheckpointError, check, describe, migrate

STATE = {"a": np.arange(3, dtype=np.int64), "b": optax.TraceState(trace=jnp.ones((2, 3))), "count": 7}
REPLACEMENTS = (None, True, False, 3, -1, 2**40, 1.5, float("nan"), "x", [], [1], {}, {"a": 1}, b"x", (3,))


def places(node, path=()):
    """The paths of all entries of a description."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield (*path, key)
        if isinstance(node[key], dict | list):
            yield from places(node[key], (*path, key))


def changed(description, path, new):
    """The description with another entry at `path`; without it if `new` is Ellipsis."""
    other = copy.deepcopy(description)
    *above, last = path
    node = other
    for key in above:
        node = node[key]
    if new is ...:
        del node[last]
    else:
        node[last] = new
    return other


def whole():
    return json.loads(json.dumps(describe(STATE, version=1, rules=[mo.nesterov(0.9), mo.ema(lambda t: 0.5)])))


PLACES = list(places(whole()))


@pytest.mark.parametrize("path", PLACES, ids=lambda path: "/".join(map(str, path)))
def test_each_changed_entry_of_a_description_is_named_or_makes_no_difference(path):
    rules = [mo.nesterov(0.9), mo.ema(lambda t: 0.5)]
    description = whole()
    check(description, STATE, version=1, rules=rules)
    for new in (..., *REPLACEMENTS):
        bad = changed(description, path, new)
        try:
            check(bad, STATE, version=1, rules=rules)
        except CheckpointError as error:
            message = str(error)
            assert len(message) < 300
            # An empty mapping in the place of `fields` lacks the first of them.
            field = path[1] if path[0] == "fields" and len(path) > 1 else path[0].removesuffix("s")
            assert field in message or (path == ("fields",) and message.startswith("a must be"))
        else:
            # Unknown coefficients agree with any, and without its flag a description that has checksums is whole.
            unknown = path[0] == "rules" and new is None
            assert bad == description or unknown or path == ("checksums",)


@pytest.mark.parametrize(
    "path", [path for path in PLACES if path[0] != "rules"], ids=lambda path: "/".join(map(str, path))
)
def test_migrate_names_what_is_no_description_too(path):
    description = whole()
    for new in (..., *REPLACEMENTS):
        bad = changed(description, path, new)
        try:
            again = migrate(STATE, bad, STATE, {1: lambda leaves: leaves})
        except CheckpointError as error:
            said = str(error)
        else:
            said = ""
            assert jax.tree.all(jax.tree.map(np.array_equal, again, STATE))
        assert len(said) < 300


def test_one_lost_checksum_is_noticed_where_it_was_the_only_one():
    description = describe({"a": jnp.ones(3)})
    del description["fields"]["a"]["checksum"]
    with pytest.raises(CheckpointError, match=r"a checksum.*, got None at fields/a/checksum"):
        check(description, {"a": jnp.zeros(3)})
    # Of shapes alone, nothing has a checksum, and nothing is missed.
    shapes = describe({"a": jax.ShapeDtypeStruct((3,), jnp.float32), "b": jnp.ones(2)})
    assert shapes["checksums"] is False
    check(shapes, {"a": jnp.zeros(3), "b": jnp.zeros(2)})
