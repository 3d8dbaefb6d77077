"""The paper plan: its page is what its program computes; its formulas are what small arrays hold and programs send."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import momentum_optax as mo
from benchmarks import paper_plan as plan
from examples.demo_distributed import traffic
from momentum_optax.distributed.specs import spread

P = PartitionSpec
ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plan.md").read_text()
# 16 and 8 divide every width; each row has 512 elements or more.
SMALL = plan.Model(layers=2, width=512, vocabulary=1024)


def section(heading):
    """The table under a heading of the page."""
    return re.search(rf"^#+ {re.escape(heading)}\n\n(?:[^|#\n].*\n\n)?((?:\|.*\n)+)", PAGE, re.M)[1]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


# The page.


@pytest.mark.slow
def test_the_page_is_what_the_script_computes():
    assert PAGE.split(plan.BEGIN)[1].split(plan.END)[0].strip() == plan.markdown().strip()


def test_tables_of_the_page_are_what_the_script_computes(monkeypatch):
    assert section("The models") == plan.models_table()
    assert section("What leaves a group of chips in a step") == plan.outer_table()
    assert section("What one axis of chips cannot cut") == plan.whole_table()
    assert section("What a chip sends in a step") == plan.traffic_table("float32")
    assert plan.traffic_table("bfloat16") in PAGE
    assert plan.outer_state_table() in PAGE
    # Those of the compressed AdamW take seconds each: one of them, and the others' rows without them.
    heading = "{}, {}: state, total, fits into GB".format
    assert section(heading("1B", "float32")) == plan.memory_table(plan.MODELS["1B"], "float32")
    for name in [name for name in plan.OPTIMIZERS if "mu int8" in name]:
        monkeypatch.delitem(plan.OPTIMIZERS, name)
    for name, model in plan.MODELS.items():
        for dtype in plan.BYTES:
            rows = section(heading(name, dtype)).splitlines()
            kept = [row for row in rows if "mu int8" not in row]
            assert kept == plan.memory_table(model, dtype).splitlines()
            assert len(rows) == len(kept) + 2


@pytest.mark.parametrize(("name", "billions"), [("1B", 1), ("10B", 10), ("100B", 100)])
def test_models_have_the_size_of_their_name(name, billions):
    model = plan.MODELS[name]
    matrices = 12 * model.layers * model.width**2
    assert model.size == matrices + 2 * model.layers * model.width + model.vocabulary * model.width
    assert abs(model.size / (billions * 1e9) - 1) < 0.01


def test_what_the_page_says_in_words_is_in_its_tables():
    one = {line.split(" | ")[0][2:]: line for line in section("1B, float32: state, total, fits into GB").splitlines()}
    assert one["adamw"].split(" | ")[2].endswith("**80**")
    assert one["adamw, mu int8"].split(" | ")[2].endswith("**16**")
    many = {
        line.split(" | ")[0][2:]: line.split(" | ")[6]
        for line in section("100B, float32: state, total, fits into GB").splitlines()
    }
    assert many["optimizer"] == "fully sharded, 8"
    assert many["sgd, float32"].endswith("none")
    assert all(many[f"sgd, {name}"].endswith("**141**") for name in ("bfloat16", "int8", "int4"))
    params = plan.MODELS["1B"].params()
    for groups, saved in ((2, 4), (4, 2), (8, 1)):
        ratio = plan.met("exact", params, groups) / plan.met("int8", params, groups)
        assert 0.99 * saved < ratio <= saved
    added = re.findall(r"^\| \w+ \| (\d+\.\d{3}) \| (\d+\.\d{3}) \|$", plan.outer_state_table(), re.M)
    assert (min(float(x) for row in added for x in row), max(float(x) for row in added for x in row)) == (4.504, 12)


# What is held.


def test_states_have_the_bytes_that_storages_declare():
    params = plan.MODELS["1B"].params()
    count = plan.MODELS["1B"].size
    for name in ("float32", "bfloat16", "int8", "int4"):
        declared = mo.storage.resolve(name).bytes_per_parameter * count
        # Three numbers for each row: all but the embedding have 2048 or more elements, as it has.
        rows = sum(x.size // x.shape[-1] for x in params.values())
        beside = {"int8": 12, "int4": 12}.get(name, 0) * rows
        assert 0 <= plan.state_bytes(f"sgd, {name}", params) - declared - beside < 300
    assert plan.state_bytes("adamw", params) == 8 * count + 4


@pytest.mark.parametrize(
    "optimizer", ["sgd, float32", "sgd, bfloat16", "sgd, int8", "sgd, int4", "adamw, mu int8, nu uint8"]
)
def test_a_device_holds_what_the_plan_says(optimizer, mesh):
    """Whole, divided with the parameters, and by `zero1`, as the shardings of each part of the state have it."""
    params = SMALL.params()
    tx = plan.OPTIMIZERS[optimizer]()
    state = jax.eval_shape(tx.init, params)
    whole = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
    cut = jax.tree.map(
        lambda p: NamedSharding(mesh, P(*("data" if d == p.ndim - 2 else None for d in range(p.ndim)))), params
    )
    cut["norms"] = NamedSharding(mesh, P(None, None, "data"))
    weights, of_state = plan.size_of(params), plan.size_of(state)

    def on_a_device(tree, shardings):
        return plan.size_of(
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), tree, shardings)
        )

    for strategy, of_params, of_parts in (
        ("replicated", whole, whole),
        ("ZeRO-1", whole, cut),
        ("fully sharded", cut, cut),
    ):
        parts = mo.sharding.state_shardings(tx, params, of_parts)
        here = on_a_device(state, parts)
        planned, total = plan.held(strategy, weights, of_state, 8)
        # Single numbers are whole everywhere: a few dozen bytes for each leaf.
        assert planned <= here <= planned + 60 * 6 + 4
        assert total <= here + 2 * on_a_device(params, of_params) <= total + 60 * 6 + 4


def test_a_state_that_zero1_made_is_divided_as_planned(mesh):
    tx = mo.sharding.zero1(mo.sgd(0.1, 0.9, storage="int8"), mesh, "data")
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), SMALL.params())
    state = jax.jit(tx.init)(jax.device_put(params, NamedSharding(mesh, P())))
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    planned, _ = plan.held("ZeRO-1", 0, plan.state_bytes("sgd, int8", SMALL.params()), 8)
    assert planned <= here <= planned + 60 * 6 + 4


@pytest.mark.parametrize("chips", [8, 12])
def test_what_zero1_leaves_whole_is_what_no_axis_of_is_divided(chips):
    mesh = type("Mesh", (), {"shape": {"data": chips}})
    whole = sum(x.size for x in SMALL.params().values() if spread(x.shape, P(), mesh, "data") == P(*[None] * x.ndim))
    assert plan.left_whole(SMALL, chips) == whole / SMALL.size
    assert (whole > 0) == (chips == 12)


# What is sent: by small compiled programs.


def sent_by(program):
    return sum(traffic.sent(one, 8) for one in traffic.collectives(program.as_text()))


def compiled(function, mesh, specs, out, *arguments):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(*arguments).compile()


X = jax.ShapeDtypeStruct((64, 256), jnp.float32)
W = jax.ShapeDtypeStruct((256, 128), jnp.float32)


def loss(w, x):
    return jnp.square(jnp.tanh(x @ w)).sum()


def test_replicated_gradients_are_reduced_to_all(mesh):
    found = compiled(lambda w, x: jax.lax.psum(jax.grad(loss)(w, x), "data"), mesh, (P(), P("data")), P(), W, X)
    assert sent_by(found) == plan.sent("replicated", 4 * W.size, 8) == 2 * 7 / 8 * 4 * W.size


def test_fully_sharded_weights_are_gathered_twice_and_gradients_scattered(mesh):
    def step(share, x):
        @jax.checkpoint  # so that the backward pass gathers again
        def of_share(share):
            return loss(jax.lax.all_gather(share, "data", tiled=True), x)

        return jax.value_and_grad(of_share)(share)

    # As written: where it drops the barrier between them, as for CPUs, XLA makes one of the two gathers.
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data")), check_vma=False)
    found = traffic.collectives(jax.jit(mapped).lower(W, X).as_text("hlo"))
    assert sorted(one.kind for one in found) == ["all-gather", "all-gather", "reduce-scatter"]
    assert sum(traffic.sent(one, 8) for one in found) == plan.sent("fully sharded", 4 * W.size, 8)
    assert plan.sent("fully sharded", 4 * W.size, 8) == 3 * 7 / 8 * 4 * W.size


def test_zero1_scatters_gradients_and_gathers_updates(mesh):
    """By hand as planned; by the partitioner for CPUs with an all-reduce instead of the reduce-scatter."""

    def step(velocity, x):
        share = jax.lax.psum_scatter(jax.grad(loss)(jnp.ones(W.shape), x), "data", tiled=True)
        velocity = 0.9 * velocity + share
        return velocity, jax.lax.all_gather(-0.1 * velocity, "data", tiled=True)

    found = compiled(step, mesh, (P("data"), P("data")), (P("data"), P()), W, X)
    assert sent_by(found) == plan.sent("ZeRO-1", 4 * W.size, 8) == 2 * 7 / 8 * 4 * W.size

    tx = mo.sharding.zero1(mo.sgd(0.1, 0.9), mesh, "data")
    whole, split = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
    w, x = (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in ((W, whole), (X, split)))

    def with_package(w, state, x):
        updates, state = tx.update(jax.grad(loss)(w, x), state, w)
        return optax.apply_updates(w, updates), state

    state = jax.eval_shape(jax.jit(tx.init), w)
    shardings = mo.sharding.state_shardings(mo.sgd(0.1, 0.9), w, split)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    found = jax.jit(with_package, out_shardings=(whole, shardings)).lower(w, state, x).compile()
    assert sent_by(found) == 3 * 7 / 8 * 4 * W.size


@pytest.mark.one_in(3)
@pytest.mark.parametrize("exchange", ["exact", "int8"])
def test_a_meeting_sends_what_the_plan_says(exchange):
    groups = 4
    mesh = jax.make_mesh((groups,), ("groups",), axis_types=(AxisType.Auto,), devices=jax.devices()[:groups])
    outer = mo.outer.diloco(exchange=exchange)
    params = {"b": jax.ShapeDtypeStruct((96,), jnp.float32), "w": jax.ShapeDtypeStruct((40, 96), jnp.float32)}

    def meet(params, state):
        return outer.sync(params, state, axis_name="groups")

    found = compiled(meet, mesh, (P(), P()), (P(), P()), params, jax.eval_shape(outer.init, params))
    bytes_sent = sum(traffic.sent(one, groups) for one in traffic.collectives(found.as_text()))
    # And what each group counts for: a number for each leaf from all others, and two sums.
    assert 0 < bytes_sent - plan.met(exchange, params, groups) <= 2 * 4 * 3 + 2 * 6


def test_numbers_have_three_digits_and_a_unit():
    texts = [plan.size(x) for x in (0.0, 12.0, 61_400, 999_499, 999_600, 1e9, 8.074e9, 80.0e9, 1.2e12)]
    assert texts == ["0 k", "0.012 k", "61.4 k", "999 k", "1.00 M", "1.00 G", "8.07 G", "80.0 G", "1.20 T"]
    assert plan.cell(1e6, 16e9) == "1.00 M, 16.0 G, **16**"
    assert plan.cell(1e6, 16.1e9) == "1.00 M, 16.1 G, **80**"
    assert plan.cell(1e6, 142e9) == "1.00 M, 142 G, none"


def test_a_write_replaces_the_tables_and_nothing_else(tmp_path, monkeypatch):
    page = tmp_path / "plan.md"
    page.write_text(f"before\n{plan.BEGIN}old\n{plan.END}after\n")
    monkeypatch.setattr(plan, "PAGE", page)
    monkeypatch.setattr(plan, "markdown", lambda: "new")
    monkeypatch.setattr("sys.argv", ["paper_plan.py", "--write"])
    plan.main()
    assert page.read_text() == f"before\n{plan.BEGIN}\nnew\n{plan.END}after\n"
