"""Matrices in parts on eight devices: the numbers of one, and the bytes and operations that were promised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import momentum_optax as mo
from benchmarks._collectives import sent

P, D = PartitionSpec, optax.contrib.MuonDimensionNumbers
LINE, GRID = ((8,), ("x",)), ((4, 2), ("data", "model"))
WIDE, STACK, HEADS = (8, 24), (8, 8, 24), (8, 4, 6)
# Shapes, mesh, split, dimension numbers, bytes received for each parameter and device in float32, and the share of the
# operations that a device does, times eight.
CASES = {
    "rows": ([WIDE] * 8, LINE, P("x"), None, 1.0, 1.0),
    "columns": ([WIDE] * 8, LINE, P(None, "x"), None, 1.0, 1.0),
    "both": ([WIDE] * 8, GRID, P("data", "model"), None, 1.0, 1.0),
    "one side over two axes": ([WIDE] * 8, GRID, P(None, ("model", "data")), None, 1.0, 1.0),
    "five on eight devices": ([WIDE] * 5, LINE, P("x"), None, 8 / 5, 8 / 5),
    "thirteen": ([WIDE] * 13, LINE, P("x"), None, 16 / 13, 16 / 13),
    # Each of four copies takes a quarter of the matrices: sent within two devices, gathered over four.
    "copies over a data axis": ([WIDE] * 8, GRID, P(None, "model"), None, 2 * 4 / 8 + 4 / 2, 1.0),
    "copies everywhere": ([WIDE] * 8, LINE, P(), None, 4.0, 1.0),
    "tall and wide": ([WIDE] * 8 + [(24, 8)] * 8, LINE, P("x"), None, 1.0, 1.0),
    "a scanned stack": ([STACK], LINE, P(None, "x"), D(1, 2), 1.0, 1.0),
    "experts": ([STACK] * 2, GRID, P("data", None, "model"), D(1, 2), 1.0, 1.0),
    "experts on their own devices": ([STACK], LINE, P("x"), D(1, 2), 0.0, 1.0),
    "heads": ([HEADS] * 8, GRID, P("data", "model"), D(0, (1, 2)), 1.0, 1.0),
    "within heads": ([HEADS] * 8, GRID, P("data", None, "model"), D(0, (1, 2)), 1.0, 1.0),
    "heads as inputs": ([HEADS] * 8, GRID, P(None, "data", "model"), D((0, 1), 2), 1.0, 1.0),
}
FAST = {"both", "copies over a data axis"}


def matrices(shapes):
    rng = np.random.default_rng(0)
    return {str(i): jnp.asarray(rng.normal(size=shape), jnp.float32) for i, shape in enumerate(shapes)}


def compiled(tx, tree, out=None):
    return jax.jit(lambda g: tx.update(g, optax.EmptyState())[0], out_shardings=out).lower(tree).compile()


def check(name, kind, dtype=None):
    shapes, (sizes, names), spec, numbers, most, share = CASES[name]
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))
    tree = matrices(shapes)
    placed = jax.device_put(tree, NamedSharding(mesh, spec))
    where = {} if kind == AxisType.Explicit else {"mesh": mesh, "specs": spec}
    alone = compiled(mo.orthogonalize(weight_dimension_numbers=numbers, dtype=dtype), tree)
    program = compiled(
        mo.orthogonalize(weight_dimension_numbers=numbers, dtype=dtype, **where), placed, NamedSharding(mesh, spec)
    )
    kinds, total = sent(program)
    assert kinds.get("all-to-all", 0) <= 2 * len(set(shapes))
    assert set(kinds) <= {"all-to-all", "all-gather"}
    parameters = sum(x.size for x in tree.values())
    assert total / parameters <= (most if dtype is None else most / 2) * 1.001
    if dtype is None:  # what eight devices of a CPU do in bfloat16 is converted first
        assert program.cost_analysis()["flops"] * 8 <= 1.1 * share * alone.cost_analysis()["flops"]
    got, expected = program(placed), alone(tree)
    for key, x in expected.items():
        assert got[key].sharding.is_equivalent_to(placed[key].sharding, x.ndim)
        np.testing.assert_allclose(got[key], x, rtol=0, atol=1e-5 if dtype is None else 0.05)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_a_direction_over_a_mesh_sends_what_it_must_and_is_that_of_one_device(name):
    check(name, AxisType.Auto)


FAST_ORDER = {"both", "within heads"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST_ORDER else pytest.mark.slow) for n in CASES])
def test_matrices_are_whole_and_in_order(name):
    """An orthogonalisation does not see in which order rows and columns are put together; sums along them do."""
    shapes, (sizes, names), spec, numbers, *_ = CASES[name]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    tree = matrices(shapes)

    def sums(x):
        return jnp.cumsum(jnp.cumsum(x, axis=-1), axis=-2)

    expected, _ = mo.matrices.on_matrices(sums, numbers).update(tree, optax.EmptyState())
    tx = mo.matrices.on_matrices(sums, numbers, mesh=mesh, specs=spec)
    got, _ = tx.update(jax.device_put(tree, NamedSharding(mesh, spec)), optax.EmptyState())
    for key, x in expected.items():
        np.testing.assert_allclose(got[key], x, rtol=0, atol=1e-4)


def polar(x):
    """The exact factor, of a singular value decomposition."""
    u, _, v = jnp.linalg.svd(x, full_matrices=False)
    return u @ v


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a scanned stack", "heads", "five on eight devices"])
def test_any_direction_takes_the_place_of_the_iteration(name):
    shapes, (sizes, names), spec, numbers, *_ = CASES[name]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    tree = matrices(shapes)
    for where in ({}, {"mesh": mesh, "specs": spec}):
        tx = mo.matrices.on_matrices(polar, numbers, **where)
        got, _ = jax.jit(tx.update)(tree, optax.EmptyState())
        for key, x in tree.items():
            batch = np.asarray(x) if name == "a scanned stack" else np.reshape(x, (1, x.shape[0], -1))
            u, _, v = np.linalg.svd(batch, full_matrices=False)
            np.testing.assert_allclose(got[key], np.reshape(u @ v, x.shape), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_types_with_explicit_axes_say_how_parameters_are_split(name):
    check(name, AxisType.Explicit)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "both", "copies over a data axis"])
def test_bfloat16_halves_what_is_sent(name):
    check(name, AxisType.Auto, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()], ids=str)
def test_without_specs_the_numbers_are_the_same_within_jit_and_outside(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tree = {**matrices([WIDE] * 3), "uneven": jnp.ones((5, 7))}
    placed = {k: jax.device_put(x, NamedSharding(mesh, P() if k == "uneven" else spec)) for k, x in tree.items()}
    expected, _ = mo.orthogonalize().update(tree, optax.EmptyState())
    tx = mo.orthogonalize(mesh=mesh)
    for update in (tx.update, jax.jit(tx.update)):
        got, _ = update(placed, optax.EmptyState())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, expected)
    outside, _ = tx.update(placed, optax.EmptyState())
    assert outside["0"].sharding.is_equivalent_to(placed["0"].sharding, 2)


def test_what_does_not_fit_a_mesh_is_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    for arguments, error, match in (
        ({"specs": P("x")}, ValueError, r"specs need the mesh whose axes they name: give mesh= too"),
        ({"mesh": "x"}, TypeError, "mesh must be a jax.sharding.Mesh, got 'x'"),
        ({"mesh": mesh, "specs": P("y")}, ValueError, r"specs must name axes of the mesh, \('x',\), got \['y'\]"),
        ({"mesh": mesh, "specs": {"a": 3}}, TypeError, "specs must hold PartitionSpecs or NamedShardings, got 3"),
    ):
        with pytest.raises(error, match=match):
            mo.muon(0.1, **arguments)
    tree = {"a": jnp.ones((4, 9))}
    with pytest.raises(ValueError, match=r"specs must split params\['a'\], of shape \(4, 9\), into equal parts, got P"):
        mo.orthogonalize(mesh=mesh, specs=P(None, "x")).update(tree, optax.EmptyState())
    with pytest.raises(ValueError, match=r"specs must be a tree like .*: it lacks params\['a'\] and has params\['b'\]"):
        mo.orthogonalize(mesh=mesh, specs={"b": P("x")}).update(tree, optax.EmptyState())
    with pytest.raises(ValueError, match=r"at most as many entries as params\['a'\] has axes, 2, got P"):
        mo.orthogonalize(mesh=mesh, specs=P(None, None, "x")).update(tree, optax.EmptyState())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_wide_and_a_tall_stack_on_two_devices_lie_in_memory_in_different_orders(dtype):
    """Which is how a transformer's hidden layers come, one leaf for each device."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tree = {k: x.astype(dtype) for k, x in matrices([(2, 16, 64), (2, 64, 16)]).items()}
    specs = {"0": P(None, None, "x"), "1": P(None, "x")}
    placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
    alone = compiled(mo.orthogonalize(weight_dimension_numbers=D(1, 2)), tree)(tree)
    split = compiled(mo.orthogonalize(weight_dimension_numbers=D(1, 2), mesh=mesh, specs=specs), placed)(placed)
    bound = 1e-5 if dtype == jnp.float32 else 0.02
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound), split, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("make", [mo.muon, mo.normuon])
def test_muon_under_zero1_is_that_of_one_device(make, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    params = {**matrices([WIDE] * 6), "bias": jnp.ones(8)}
    specs = {k: P() if k == "bias" else P(None, "model") for k in params}
    shares = mo.sharding.zero1_specs(params, mesh, "data", specs)
    where = {} if kind == AxisType.Explicit else {"mesh": mesh, "specs": shares}
    assert shares["0"] == P("data", "model")
    placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}

    def train(tx, params):
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for _ in range(3):
            u, state = update(params, state, params)
        return u, state

    alone, _ = train(make(0.1), params)
    with jax.set_mesh(mesh):
        split, state = train(mo.sharding.zero1(make(0.1, **where), mesh, "data", specs), placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), split, alone)
    (velocity,) = mo.velocity(state)
    assert velocity["0"].sharding.spec == P("data", "model")
