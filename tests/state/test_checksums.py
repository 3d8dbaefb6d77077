"""Checksums and descriptions: one changed bit is found in every dtype, one changed entry of a description too."""

import copy
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.state.checkpoint import CheckpointError, check, describe, fields, migrate, rules_of

WIDTHS = {
    "bool": 1, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32, "int64": 64, "uint64": 64,
    "float16": 16, "float32": 32, "float64": 64, "complex64": 64, "complex128": 128, "bfloat16": 16,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "int4": 4, "uint4": 4, "int2": 2,
}  # fmt: skip
ON_DEVICE = ("bool", "int8", "uint16", "int32", "float16", "float32", "complex64", "bfloat16", "float8_e5m2", "int4")


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def from_bits(name, rows):
    """An array whose elements have these bits, of which a row holds as many bytes as an element."""
    dtype = numpy_dtype(name)
    if WIDTHS[name] == 1:
        return (rows[:, 0] & 1).astype(bool)
    if WIDTHS[name] < 8:
        values = (rows[:, 0].astype(np.int64)) & (2 ** WIDTHS[name] - 1)
        if name.startswith("int"):
            values = values - (values >> (WIDTHS[name] - 1)) * 2 ** WIDTHS[name]
        return values.astype(dtype)
    return np.ascontiguousarray(rows).view(dtype).reshape(len(rows))


def sums(state):
    return {path: entry.get("checksum") for path, entry in describe(state)["fields"].items()}


@pytest.mark.parametrize("name", WIDTHS)
def test_every_single_bit_of_an_array_of_the_host_counts(name):
    width = WIDTHS[name]
    rows = np.random.default_rng(0).integers(0, 256, (3, max(width // 8, 1)), np.uint8)
    flipped = {"whole": from_bits(name, rows)}
    for place in range(3):
        for bit in range(width):
            other = rows.copy()
            other[place, bit // 8] ^= np.uint8(1 << bit % 8)
            flipped[f"{place}/{bit}"] = from_bits(name, other)
    found = sums({k.replace("/", "-"): x for k, x in flipped.items()})
    assert len(found) == 3 * width + 1
    # Each from the whole, and each from each other: two flips of one bit in two places are two states.
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_an_array_of_the_device_has_the_checksum_of_the_same_array_of_the_host(name):
    rows = np.random.default_rng(1).integers(0, 256, (6, max(WIDTHS[name] // 8, 1)), np.uint8)
    rows[:, -1] &= 0x3F  # no NaN, whose bits a device may change
    host = from_bits(name, rows).reshape(2, 3)
    assert describe({"x": host}) == describe({"x": jnp.asarray(host)})


def test_eight_bytes_count_alike_on_host_and_device():
    x = np.random.default_rng(2).normal(size=(2, 3))
    with jax.enable_x64(True):
        for dtype in (np.float64, np.complex128, np.int64, np.uint64):
            host = (abs(x) * 2.0**40 * (1 + 1j if dtype is np.complex128 else 1)).astype(dtype)
            assert describe({"x": host}) == describe({"x": jnp.asarray(host)})


@pytest.mark.parametrize("order", ["<i8", ">i8", ">f4"])
def test_byte_order_and_layout_in_memory_do_not_count(order):
    x = np.arange(12, dtype=order[1:]).reshape(3, 4) * 3**9
    assert describe(x) == describe(x.astype(order)) == describe(np.asfortranarray(x))


def test_whole_numbers_of_any_size():
    numbers = [0, 1, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 10**40]
    numbers += [10**40 ^ (1 << bit) for bit in range(132)]
    found = sums({str(x): x for x in numbers})
    assert len(set(found.values())) == len(numbers)
    assert describe(3)["fields"] == describe(np.int32(3))["fields"]
    assert describe(2**40)["fields"] == describe(np.int64(2**40))["fields"]
    assert describe(2**64)["fields"]["."]["dtype"] == "int"
    # The counter that the high word alone tells from 0.
    assert sums(np.int64(2**32)) != sums(np.int64(0))
    check(json.loads(json.dumps(describe({"tokens": 2**70}))), {"tokens": 2**70})
    with pytest.raises(CheckpointError, match=r"^tokens must have the checksum"):
        check(describe({"tokens": 2**70}), {"tokens": 2**70 + 2**33})


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_each_bit_of_a_key_counts(implementation):
    data = jax.random.key_data(jax.random.key(0, impl=implementation))
    keys = {"whole": jax.random.wrap_key_data(data, impl=implementation)}
    for i in range(data.size):
        for bit in range(32):
            flipped = data.at[i].set(data[i] ^ np.uint32(1 << bit))
            keys[f"{i}-{bit}"] = jax.random.wrap_key_data(flipped, impl=implementation)
    assert len(set(sums(keys).values())) == len(keys)


@pytest.mark.parametrize("bad", ["x", object(), np.array(["x"]), np.array([None]), np.datetime64(1, "s")])
def test_what_has_no_bits_to_sum_is_named(bad):
    with pytest.raises(TypeError, match=r"^state must hold arrays and numbers, got .* at a/b"):
        describe({"a": {"b": bad}})
    with pytest.raises(CheckpointError, match=r"^a must be an array or a number, got"):
        mo.checkpoint.from_fields({"a": bad}, {"a": 1.0})


# Descriptions.

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


@pytest.mark.parametrize(
    ("migrations", "message"),
    [
        ({0: 3}, r"migrations must hold a function from version 0, got 3"),
        ({"0": dict}, r"migrations must have whole numbers as keys, got '0'"),
        ({0.5: dict}, r"migrations must have whole numbers as keys, got 0\.5"),
        ({True: dict}, r"migrations must have whole numbers as keys, got True"),
        ({-1: dict}, r"migrations must have whole numbers as keys, got -1"),
        ([dict], r"migrations must map versions to functions, got \["),
        (dict, r"migrations must map versions to functions, got <class"),
    ],
)
def test_migrations_that_are_none_are_named(migrations, message):
    state = {"a": jnp.ones(3)}
    with pytest.raises(CheckpointError, match=message):
        migrate(state, describe(state), state, migrations)


# Rules.

PARAMS = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
OPTIMIZERS = {
    "sgd": lambda decay: mo.sgd(0.1, decay),
    "scheduled": lambda decay: mo.sgd(0.1, optax.linear_schedule(0.5, decay, 100)),
    "dampened": lambda decay: mo.sgd(0.1, decay, dampening=0.5),
    "lion": lambda decay: mo.lion(0.1, 0.9, decay),
    "muon": lambda decay: mo.muon(0.1, decay),
    "torch": lambda decay: mo.interop.torch_sgd(lr=0.1, momentum=decay),
    "guarded": lambda decay: mo.guarded(mo.sgd(0.1, mo.nesterov(decay), storage="int8"), "leaf"),
    "restart": lambda decay: mo.adaptive_restart(mo.nesterov(decay)),
    "accumulated": lambda decay: mo.accumulated(mo.ema(decay), 4),
    "partition": lambda decay: optax.partition({"a": mo.sgd(0.1, decay), "b": mo.sgd(0.1, 0.8)}, {"w": "a", "b": "b"}),
    "compress": lambda decay: mo.compress(optax.chain(mo.sgd(0.1, decay), optax.scale_by_adam()), {"mu"}, "bfloat16"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_rule_of_the_same_order_is_noticed(name):
    make = OPTIMIZERS[name]
    abstract = jax.eval_shape(make(0.9).init, PARAMS)
    layout = json.loads(json.dumps(describe(abstract, rules=rules_of(make(0.9), PARAMS))))
    check(layout, abstract, rules=rules_of(make(0.9), PARAMS))
    # The states have one form, so that nothing else could notice.
    check(layout, jax.eval_shape(make(0.91).init, PARAMS))
    with pytest.raises(CheckpointError, match=r"^rule 0 of the checkpoint is another one: .* must be .*, got .*"):
        check(layout, abstract, rules=rules_of(make(0.91), PARAMS))


def test_rules_are_compared_by_their_coefficients():
    def compare(saved, now):
        check(describe({}, rules=saved), {}, rules=now)

    ball = mo.heavy_ball(0.9)
    compare(ball, [ball])
    compare(ball, mo.heavy_ball(lambda t: 0.9))  # a schedule that is constant is the number
    compare(mo.heavy_ball(jnp.float32(0.9)), ball)
    with pytest.raises(CheckpointError, match=r"B\[0\] must be 0\.1\d*, got 1$"):
        compare(ball, mo.ema(0.9))
    # What a leaf does first.
    with pytest.raises(CheckpointError, match=r"B\[0\] must be 0\.5 at step 0, got 1"):
        compare(mo.heavy_ball(0.9, dampening=0.5, first_step="gradient"), mo.heavy_ball(0.9, dampening=0.5))
    # What a schedule does late.
    with pytest.raises(CheckpointError, match=r"A\[0\]\[0\] must be 0\.9 at step 1000, got 0\.8"):
        compare(mo.heavy_ball(lambda t: jnp.where(t < 200, 0.9, 0.8)), mo.heavy_ball(lambda t: 0.9))
    with pytest.raises(CheckpointError, match=r"the order must be 2, got 1"):
        compare(ball, mo.aggregated((0.5, 0.9)))
    with pytest.raises(CheckpointError, match=r"of 2 rules, got 1"):
        compare(ball, [ball, ball])
    with pytest.raises(CheckpointError, match=r"described with rules= to compare them, got none"):
        check(describe({}), {}, rules=ball)
    with pytest.raises(TypeError, match=r"rules must be what rules_of gives, a Filter or a list of them, got 0\.9"):
        describe({}, rules=0.9)
    # What is traced is unknown, and agrees with anything; inside, schedules are numbers all the same.
    seen = []

    def inside(decay):
        seen.extend(rules_of(mo.scale_by_momentum(mo.heavy_ball(lambda t: decay * (t + 1))), PARAMS))
        seen.extend(rules_of(mo.sgd(0.1, optax.linear_schedule(0.5, 0.9, 100)), PARAMS))
        return decay

    jax.jit(inside)(0.5)
    assert seen[0]["A"][0][0] == [None] * 10
    np.testing.assert_allclose(seen[1]["A"][0][0][-1], 0.9, rtol=1e-6)
    compare(seen[:1], ball)


@pytest.mark.parametrize("name", ["sgd", "scheduled", "dampened", "lion", "muon", "torch", "guarded", "restart"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_monitor_notices_a_rule_that_is_not_the_one_inside(name, compiled):
    rules = {
        "sgd": mo.heavy_ball,
        "scheduled": lambda decay: mo.heavy_ball(optax.linear_schedule(0.5, decay, 100)),
        "dampened": lambda decay: mo.heavy_ball(decay, dampening=0.5, first_step="gradient"),
        "lion": lambda decay: mo.lion_mix(0.9, decay),
        "muon": mo.muon_mix,
        "torch": mo.heavy_ball,
        "guarded": mo.nesterov,
        "restart": mo.nesterov,
    }  # fmt: skip

    def init(rule):
        tx = mo.monitor(OPTIMIZERS[name](0.9), rule)
        return (jax.jit(tx.init) if compiled else tx.init)(PARAMS)

    init(rules[name](0.9))
    with pytest.raises(ValueError, match=r"^rule must be the one that tx runs .*must be .*, got") as error:
        init(rules[name](0.95))
    assert len(str(error.value)) < 300


def test_a_monitor_takes_a_traced_rule_as_it_is():
    def init(decay):
        return mo.monitor(mo.sgd(0.1, decay), mo.heavy_ball(0.5)).init(PARAMS)

    jax.jit(init)(0.9)


def test_fields_of_an_optimizer_with_rules_survive_json():
    state = mo.sgd(0.1, 0.9).init(PARAMS)
    layout = describe(state, rules=mo.heavy_ball(0.9))
    assert json.loads(json.dumps(layout)) == layout
    assert fields(state).keys() <= layout["fields"].keys()
