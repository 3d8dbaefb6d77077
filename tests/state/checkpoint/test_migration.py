"""Migrations: older formats and versions, other optimizers and storages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conformance import assert_bit_equal
from state.checkpoint.orbax_runs import BYTES, PARAMS, P, abstract, gradients, placed, saved, small_run, with_shardings

import momentum_optax as mo
from momentum_optax.state.checkpoint import CheckpointError, check, describe, fields, formats, from_fields, migrate


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


def test_leaves_that_are_no_mapping_are_named():
    for leaves in ([1], None):
        with pytest.raises(TypeError, match="leaves must be a mapping from paths to arrays, as fields gives, got"):
            from_fields(leaves, {"a": jnp.ones(3)})


def renamed(target, leaves):
    """From a format in which the step had another name."""
    assert "2/step" in target
    return {k.replace("/count", "/step"): x for k, x in leaves.items()}


def narrowed(leaves):
    """From a version in which codes came in a wider type."""
    return {k: x.astype(jnp.int8) if "/codes/" in k and x.ndim else x for k, x in leaves.items()}


def same(leaves):
    return leaves


@pytest.fixture
def older(monkeypatch):
    """A state of format 2 and version 2, its description, what it becomes, and the state that this is."""
    state = small_run()["opt_state"]
    leaves = {
        k.replace("/step", "/count"): x.astype(jnp.int16) if x.dtype == jnp.int8 else x
        for k, x in fields(state).items()
    }
    layout, target = describe(leaves, version=2), abstract(mo.sgd(0.1, 0.9, storage=BYTES))
    assert_bit_equal(migrate(state, describe(state), target), state)
    monkeypatch.setattr(formats, "FORMAT", 3)
    monkeypatch.setattr(formats, "UPGRADES", {2: renamed})
    return leaves, layout, target, state


def test_an_older_format_and_an_older_version_become_todays(older, monkeypatch):
    leaves, layout, target, state = older
    seen = []

    def noted(what, function):
        return lambda *given: (seen.append(what), function(*given))[1]

    monkeypatch.setattr(formats, "UPGRADES", {2: noted("format 2", renamed)})
    steps = {1: same, 2: noted("version 2", narrowed), 3: noted("version 3", same)}
    assert_bit_equal(migrate(leaves, layout, target, steps), state)
    assert seen == ["format 2", "version 2", "version 3"]


def test_an_older_state_without_a_way_to_todays_is_refused(older, monkeypatch):
    older, layout, target, _ = older
    with pytest.raises(CheckpointError, match=r"have format 3, got 2: migrate"):
        check(layout, target)
    with pytest.raises(CheckpointError, match=r"must hold a function from version 3, got \[2, 4\]"):
        migrate(older, layout, target, {2: narrowed, 4: same})
    with pytest.raises(CheckpointError, match=r"have version 1 or an older one, got 2"):
        migrate(older, layout, target, {0: same})
    with pytest.raises(CheckpointError, match=r"2/velocity/codes/0/b must be int8\[64\], got int16\[64\]"):
        migrate(older, layout, target, {2: same})
    with pytest.raises(TypeError, match=r"migration from version 2 must return a mapping from paths, got None"):
        migrate(older, layout, target, {2: lambda leaves: None})
    with pytest.raises(CheckpointError, match=r"^2/count must have the checksum"):
        migrate(older | {"2/count": older["2/count"] + 1}, layout, target, {2: narrowed})
    monkeypatch.setattr(formats, "UPGRADES", {})
    with pytest.raises(CheckpointError, match=r"must hold a function from format 2, got \[\]"):
        migrate(older, layout, target)


@pytest.mark.parametrize(("order", "largest"), [(1, 118), (2, 118), (1, 127)])
def test_one_byte_velocities_of_the_first_format_become_todays(order, largest):
    # Squares of codes up to 118, and beyond them of 1 + (4^t - 1) / 64, times a scale for each row and a gain.
    c = np.random.default_rng(0).integers(-largest, largest + 1, (8, 512)).astype(np.int8)
    scale, one = np.float32(10.0 ** np.arange(-4, 4)).reshape(8, 1), np.ones((1, 1), np.float32)
    small = {"scale": scale, "body": 118 * one, "reach": scale, "margin": one, "stamp": np.full((1, 1), 7, np.uint32)}
    # Parameters may have the name of a part.
    w = "body/0/w"
    old = {f"velocity/{name}/0/{w}": x for name, x in small.items()}
    for k in range(order):
        old |= {f"velocity/codes/{k}/{w}": np.roll(c, k, 1), f"velocity/gain/{k}/{w}": (1 + 9 * k) * one}
    old |= {f"params/{w}": np.ones(3, np.float32)}
    tx = mo.scale_by_momentum(mo.aggregated((0.5, 0.9)[:order]), storage="int8")
    target = tx.init({"body": [{"w": jnp.zeros((8, 512))}]})
    new = dict(formats.UPGRADES[1]({}, old))
    assert new.pop(f"params/{w}") is old[f"params/{w}"]
    state = from_fields({"step": target.step, **new}, target)
    for k, read in enumerate(mo.velocity(state)):
        code = np.float64(np.roll(c, k, 1))
        tail = np.sign(code) * (1 + (4.0 ** np.maximum(abs(code) - 118, 0) - 1) / 64)
        root = np.where(abs(code) <= 118, code / 118, tail)
        exact = (1 + 9 * k) * scale * root * abs(root)
        error = np.linalg.norm(read["body"][0]["w"] - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert np.all(error < 0.03)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_four_bit_velocities_of_the_first_format_become_todays(scale):
    # Squares of codes up to 6, and 4 for the next one, times a scale for each row and a gain; no scale before step 1.
    c = np.random.default_rng(0).integers(-6, 7, (8, 512)).astype(np.int8)
    c[:, ::64] = 7
    scale, one = scale * np.float32(10.0 ** np.arange(-4, 4)).reshape(8, 1), np.ones((1, 1), np.float32)
    small = {"scale": scale, "reach": scale, "margin": one, "stamp": np.full((1, 1), 7, np.uint32)}
    # Parameters may have the name of a part.
    w = "margin/0/w"
    old = {f"velocity/{name}/0/{w}": x for name, x in small.items()}
    for k in range(2):
        old |= {f"velocity/codes/{k}/{w}": jnp.asarray(np.roll(c, k, 1)).astype(jnp.int4)}
        old |= {f"velocity/gain/{k}/{w}": (1 + 9 * k) * one}
    # And a leaf in full.
    old |= {f"velocity/{name}/0/b": 0 * one for name in small} | {"velocity/stamp/0/b": np.zeros((1, 1), np.uint32)}
    old |= {f"velocity/{name}/{k}/b": (k + 1) * one for name in ("codes", "gain") for k in range(2)}
    target = mo.scale_by_momentum(mo.aggregated((0.5, 0.9)), storage="int4").init(
        {"margin": [{"w": jnp.zeros((8, 512))}], "b": jnp.zeros((1, 1))}
    )
    state = from_fields({"step": target.step, **formats.UPGRADES[1]({}, old)}, target)
    for k, read in enumerate(mo.velocity(state)):
        code = np.float64(np.roll(c, k, 1))
        exact = (1 + 9 * k) * scale * np.where(code == 7, 4, code * abs(code) / 36)
        # Both roundings, of which the old one is read with a noise of up to half a code.
        error = np.linalg.norm(read["margin"][0]["w"] - exact, axis=1)
        assert np.all(error <= 0.25 * np.linalg.norm(exact, axis=1))
        assert read["b"] == k + 1


@pytest.mark.slow
def test_another_optimizer_and_another_storage_become_ours_on_a_mesh(tmp_path):
    byte = mo.storage.int8(min_size=512)
    theirs, ours, small = optax.sgd(0.1, 0.9), mo.sgd(0.1, 0.9), mo.sgd(0.1, 0.9, storage=byte)
    old = theirs.init(PARAMS)
    for t in range(3):
        _, old = theirs.update(gradients(t), old)
    path = saved(tmp_path / "ckpt", old)
    with ocp.CheckpointManager(path) as manager:
        layout = manager.restore(0, args=ocp.args.Composite(layout=ocp.args.JsonRestore())).layout
        # Without a target: lists and dictionaries in place of the tuples.
        plain = manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    assert isinstance(plain, list)
    _, shardings = placed((2, 4))
    target = with_shardings(abstract(small), mo.sharding.state_shardings(small, PARAMS, shardings))

    to_bytes = jax.jit(lambda state: mo.convert(state, byte, like=abstract(small)))

    def from_optax(leaves):
        return fields(to_bytes(mo.interop.from_optax(ours.init(PARAMS), from_fields(leaves, abstract(theirs)))))

    with pytest.raises(CheckpointError, match=r"^0 must be an EmptyState, got a TraceState"):
        check(layout, target)
    state = migrate(plain, layout, target, {0: from_optax})
    assert_bit_equal(state, to_bytes(mo.interop.from_optax(ours.init(PARAMS), old)))
    assert state[2].velocity.codes[0]["w"].sharding.spec == P("data", "model")
    # Three steps of the heavy ball in NumPy, and a byte's error.
    v = np.zeros((16, 64))
    for t in range(3):
        v = 0.9 * v + np.asarray(gradients(t)["w"], np.float64)
    (got,) = mo.velocity(state)
    assert np.linalg.norm(got["w"] - v) < 0.03 * np.linalg.norm(v)
