"""Row-sparse momentum against dense momentum: the papers' loops in float64, `optax.sgd`, and exact powers."""

import fractions
import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals, own_jit, pointers
from jax.experimental import sparse
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import momentum_optax as mo
from momentum_optax.embeddings import RowSparseState
from momentum_optax.state.mismatch import StateMismatchError
from tests.rules.oracles import TABLE

ROWS, WIDTH, STEPS = 12, 3, 40
RNG = np.random.default_rng(5)
# Few rows at a time, some of them twice; the last rows hardly ever, so that gaps are long.
PICKED = [RNG.choice(ROWS, 4, p=np.geomspace(1, 1e-2, ROWS) / np.geomspace(1, 1e-2, ROWS).sum()) for _ in range(STEPS)]
SIGNAL = RNG.normal(size=(STEPS, 4, WIDTH))
START = RNG.normal(size=(ROWS, WIDTH))
# One velocity, of a rule whose update reads the gradient too; two, of which one is the last gradient.
RULES = {str(row): row for row in TABLE}
RULES = {name: RULES[name] for name in ("nesterov", "pid")}


def dense(step):
    """The gradient of the whole table at a step."""
    out = np.zeros((ROWS, WIDTH))
    np.add.at(out, PICKED[step], SIGNAL[step])
    return out


def followed(opt, table):
    """The values read before each step, and table and state after all of them; one compilation."""
    state = opt.init(table)

    def step(carry, x):
        rows, g = x
        seen = opt.read(*carry, jnp.arange(ROWS))
        return opt.update(*carry, g, rows), seen

    signal = (jnp.asarray(np.array(PICKED)), jnp.asarray(SIGNAL, table.dtype))
    (table, state), seen = jax.jit(lambda c, s: jax.lax.scan(step, c, s))((table, state), signal)
    return np.asarray(seen), table, state


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", RULES)
def test_what_is_read_is_dense_momentum_of_the_papers_loop_at_every_step(name, x64):
    row = RULES[name]
    replayed = map(dense, range(STEPS))
    expected, _ = row.run(lambda _: next(replayed), START, STEPS)
    opt = mo.row_sparse(row.make(), row.learning_rate)
    seen, table, state = followed(opt, jnp.asarray(START))
    np.testing.assert_allclose(seen, [START, *expected[:-1]], rtol=0, atol=1e-12)
    assert abs(np.asarray(table) - expected[-1]).max() > 1e-3, "no row is behind: nothing to catch up"
    table, state = opt.flush(table, state)
    np.testing.assert_allclose(table, expected[-1], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(state.last, np.full(ROWS, STEPS))


def test_a_scheduled_rate_is_the_rate_before_the_rule(x64):
    def rate(step):
        return 1.0 - 0.02 * step

    tx = optax.chain(optax.scale_by_learning_rate(rate), mo.scale_by_momentum(mo.nesterov(0.9)))
    table = jnp.asarray(START)

    def step(carry, g):
        u, state = tx.update(g, carry[1])
        return (carry[0] + u, state), carry[0]

    signal = jnp.asarray([dense(t) for t in range(STEPS)])
    _, expected = jax.jit(lambda t, g: jax.lax.scan(step, (t, tx.init(t)), g))(table, signal)
    seen, _, _ = followed(mo.row_sparse(mo.nesterov(0.9), rate), jnp.asarray(START))
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_large_table_is_that_of_optax_sgd():
    shape, share, steps, rate, decay = (50_000, 256), 0.01, 30, 0.1, 0.9
    n = int(share * shape[0])
    rng = np.random.default_rng(0)
    signal = rng.integers(shape[0], size=(steps, n)), rng.normal(size=(steps, n, shape[1])).astype(np.float32)
    start = jax.random.normal(jax.random.key(1), shape)
    opt, sgd = mo.row_sparse(mo.heavy_ball(decay), rate), optax.sgd(rate, decay)

    def sparse_step(carry, x):
        rows, g = x
        values = opt.read(*carry, rows)
        return opt.update(*carry, g + 0.1 * values, rows), values[0]

    def dense_step(carry, x):
        (table, state), (rows, g) = carry, x
        values = table[rows]
        u, state = sgd.update(jnp.zeros(shape).at[rows].add(g + 0.1 * values), state)
        return (optax.apply_updates(table, u), state), values[0]

    def run(step, init):
        return jax.jit(lambda s: jax.lax.scan(step, (s, init(s)), signal))(start)

    (table, state), seen = run(sparse_step, opt.init)
    (expected, _), wanted = run(dense_step, sgd.init)
    behind = abs(table - expected).max()
    table, _ = jax.jit(opt.flush)(table, state)
    # A dense step rounds the table once, the velocity twice; an error of v counts rate / (1 - decay) = 1 time.
    largest = float(abs(expected).max())
    bound = steps * (largest + 2 * 10.0) * 2.0**-24
    assert float(abs(table - expected).max()) < bound < 1e-3 < behind
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=bound)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("decay", [0.9, 0.999999, -0.5, 0.0])
def test_any_number_of_missed_steps_is_exact_to_rounding(decay):
    # From one update of size 1 at step 0: v = 1, then steps without a gradient. Rational powers, or their limit.
    opt = mo.row_sparse(mo.heavy_ball(decay), 1.0)
    table = jnp.zeros((2, 1))
    table, begin = jax.jit(opt.update)(table, opt.init(table), jnp.ones((1, 1)), jnp.array([1]))
    flush, a = jax.jit(opt.flush), fractions.Fraction(decay)
    for missed in (0, 1, 2, 7, 1000, 10**6, 2**31 - 2):
        after, state = flush(table, begin._replace(step=jnp.int32(1 + missed)))
        if missed <= 1000:
            power, moved = float(a**missed), 1 + float(a * (1 - a**missed) / (1 - a))
        else:
            power = np.exp(missed * np.log1p(decay - 1)) if decay > 0 else 0.0
            moved = 1 + decay * (1 - power) / (1 - decay)
        # 31 products of numbers rounded once, and as many sums.
        np.testing.assert_allclose(after, [[0.0], [-moved]], rtol=64 * 2.0**-24)
        for v in state.velocity:
            np.testing.assert_allclose(v, [[0.0], [power]], rtol=64 * 2.0**-24, atol=1e-37)
        assert len(state.velocity) == (decay != 0)


OPT = mo.row_sparse(mo.heavy_ball(0.9), 0.5)


@jax.jit
def by_rows(table, state, gradient, rows):
    return OPT.update(table, state, gradient, rows)


def begun():
    """A table and its state with some rows behind."""
    table = jnp.asarray(START, jnp.float32)
    state = OPT.init(table)
    for t in range(3):
        table, state = by_rows(table, state, jnp.asarray(SIGNAL[t], jnp.float32), jnp.asarray(PICKED[t]))
    return table, state


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)


@pytest.mark.slow
def test_a_bcoo_gradient_with_rows_repeated_and_padding_is_its_dense_form():
    table, state = begun()
    indices = np.array([[5], [2], [5], [ROWS], [ROWS]])
    data = np.random.default_rng(6).normal(size=(5, WIDTH)).astype(np.float32)
    whole = np.zeros((ROWS, WIDTH), np.float32)
    whole[5], whole[2] = data[0] + data[2], data[1]
    gradient = sparse.BCOO((jnp.asarray(data), jnp.asarray(indices)), shape=(ROWS, WIDTH))
    # What JAX itself makes of a dense gradient, padded.
    padded = jax.jit(lambda x: sparse.BCOO.fromdense(x, n_dense=1, nse=5))(jnp.asarray(whole))
    assert np.sum(np.asarray(padded.indices) >= ROWS) == 3
    padded = sparse.BCOO((padded.data, padded.indices), shape=(ROWS, WIDTH))  # without its flags: one program for both
    expected = by_rows(table, state, jnp.asarray(whole[[2, 5, 0, 0]]), jnp.array([2, 5, ROWS, ROWS]))
    update = jax.jit(OPT.update)
    close(update(table, state, gradient), expected)
    close(update(table, state, padded), expected)
    close(by_mask(table, state, jnp.asarray(whole), jnp.asarray(np.isin(np.arange(ROWS), [2, 5]))), expected)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("active", [0, 1, 4, 5, 12])
def test_a_mask_may_hold_more_or_fewer_rows_than_usual(active):
    table, state = begun()
    rng = np.random.default_rng(7)
    gradient, order = rng.normal(size=(ROWS, WIDTH)).astype(np.float32), rng.permutation(ROWS)
    mask = np.zeros(ROWS, bool)
    mask[order[:active]] = True
    got = by_mask(table, state, jnp.asarray(gradient), jnp.asarray(mask))
    assert by_mask._cache_size() == 1
    close(
        got,
        by_rows(table, state, jnp.asarray(gradient[order]), jnp.asarray(np.where(mask, np.arange(ROWS), ROWS)[order])),
    )
    np.testing.assert_array_equal(np.asarray(got[1].last) == 4, mask)
    assert got[1].step == 4


@jax.jit
def by_mask(table, state, gradient, mask):
    return OPT.update(table, state, gradient, mask=mask, size=4)


def test_many_rows_are_taken_in_parts(monkeypatch):
    table, state = begun()
    rows, g = jnp.array([11, 3, 3, 0]), jnp.asarray(np.random.default_rng(8).normal(size=(4, WIDTH)), jnp.float32)
    expected = by_rows(table, state, g, rows)
    # Three different rows: two parts of two.
    monkeypatch.setattr(importlib.import_module("momentum_optax.embeddings"), "_AT_ONCE", 2)
    close(jax.jit(functools.partial(OPT.update))(table, state, g, rows), expected)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(expected[1].last) == 4), [0, 3, 11])


def test_rows_that_are_none_read_nan_and_are_not_written():
    table, state = begun()
    values = jax.jit(OPT.read)(table, state, jnp.array([[0, -1], [ROWS, 3]]))
    assert values.shape == (2, 2, WIDTH)
    np.testing.assert_array_equal(np.isnan(values[..., 0]), [[False, True], [True, False]])
    g = jnp.ones((4, WIDTH))
    expected = by_rows(table, state, g, jnp.array([0, ROWS, ROWS, 3]))
    close(by_rows(table, state, g, jnp.array([0, -1, ROWS + 7, 3])), expected)
    assert [i for i in range(ROWS) if expected[1].last[i] == 4] == [0, 3]
    nothing = jax.jit(OPT.update)(table, state, jnp.zeros((0, WIDTH)), jnp.zeros(0, jnp.int32))
    assert_bit_equal(nothing, (table, state._replace(step=jnp.int32(4))))


def test_rows_left_alone_are_not_touched_and_flush_is_idempotent():
    table, state = begun()
    after, new = by_rows(table, state, jnp.ones((4, WIDTH)), jnp.array([1, 2, 1, 2]))
    others = [i for i in range(ROWS) if i not in (1, 2)]
    assert_bit_equal((after[others, :], new.last[jnp.array(others)]), (table[others, :], state.last[jnp.array(others)]))
    flush = jax.jit(OPT.flush)
    flushed = flush(after, new)
    assert_bit_equal(flush(*flushed), flushed)
    assert_bit_equal(jax.jit(OPT.read)(*flushed, jnp.arange(ROWS)), flushed[0])


def test_a_row_may_occur_often_in_narrow_gradients_and_be_named_in_few_bits():
    # A sum of ones in eight bits of mantissa stops at 256. Places left over are moved beyond the end of the table,
    # which eight bits cannot name.
    opt, n = mo.row_sparse(mo.heavy_ball(0.9), 0.5), 3000
    table = jnp.zeros((300, 2))
    rows = jnp.asarray([7] * n + [100], jnp.int8)
    table, state = jax.jit(opt.update)(table, opt.init(table), jnp.ones((n + 1, 2), jnp.bfloat16), rows)
    expected = np.zeros((300, 2))
    expected[[7, 100]] = [[0.5 * n], [0.5]]
    np.testing.assert_array_equal(table, -expected)
    np.testing.assert_array_equal(state.velocity[0], expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_types_never_drift(dtype):
    opt = mo.row_sparse(mo.aggregated((0.5, 0.9)), lambda step: 0.1 / (step + 1))
    table = jnp.zeros((ROWS, 2, 2), dtype)
    state = opt.init(table)
    assert all(v.dtype == jnp.promote_types(jnp.float32, dtype) for v in state.velocity)
    g, rows = jnp.ones((5, 2, 2), jnp.float32), jnp.zeros(5, jnp.int32)
    for changed in (
        jax.eval_shape(opt.update, table, state, g, rows),
        jax.eval_shape(opt.flush, table, state),
        jax.eval_shape(lambda t, s, m: opt.update(t, s, t, mask=m, size=2), table, state, jnp.zeros(ROWS, bool)),
    ):
        assert avals(changed) == avals((table, state))
    assert jax.eval_shape(opt.read, table, state, rows).dtype == dtype


def test_a_donated_step_writes_in_place_compiles_once_and_resumes_to_the_bit():
    table = jnp.asarray(START, jnp.float32)
    carry = (table, OPT.init(table))
    found = pointers(carry)
    assert len(set(found)) == len(found)
    step = own_jit(OPT.update, donate_argnums=(0, 1))
    for t in range(9):
        carry = step(*carry, jnp.asarray(SIGNAL[t], jnp.float32), jnp.asarray(PICKED[t]))
        if t == 4:
            carry = jax.tree.map(lambda x: jnp.array(np.asarray(x)), carry)
    assert step._cache_size() == 1
    again = (table := jnp.asarray(START, jnp.float32), OPT.init(table))
    for t in range(9):
        again = step(*again, jnp.asarray(SIGNAL[t], jnp.float32), jnp.asarray(PICKED[t]))
    assert_bit_equal(again, carry)


def test_a_compiled_step_holds_no_more_than_its_rows():
    rows, width, n = 4096, 64, 32
    table = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    state = jax.eval_shape(OPT.init, table)
    g, some = jax.ShapeDtypeStruct((n, width), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    compiled = jax.jit(OPT.update, donate_argnums=(0, 1)).lower(table, state, g, some).compile()
    memory = compiled.memory_analysis()
    size = 4 * rows * width
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < 8 * 4 * n * width < size / 8


def by_parts(way):
    """A step and a flush of a table whose rows are on four devices."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    here, size = P("x"), ROWS // 4
    split = RowSparseState(P(), (here,), here)

    def step(table, state, g, mask):
        if way == "mask":
            return OPT.update(table, state, g, mask=mask, size=2)
        return OPT.update(table, state, g, jnp.where(mask, jnp.arange(size), size))

    local = jax.shard_map(step, mesh=mesh, in_specs=(here, split, here, here), out_specs=(here, split))
    return jax.jit(local), jax.jit(jax.shard_map(OPT.flush, mesh=mesh, in_specs=(here, split), out_specs=(here, split)))


@pytest.mark.parametrize("way", ["rows", "mask"])
def test_types_do_not_drift_under_shard_map(way):
    table = jnp.asarray(START, jnp.float32)
    carry = table, OPT.init(table)
    step, flush = by_parts(way)
    assert avals(jax.eval_shape(step, *carry, table, jnp.ones(ROWS, bool))) == avals(carry)
    assert avals(jax.eval_shape(flush, *carry)) == avals(carry)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rows", "mask"])
def test_a_table_in_parts_under_shard_map_is_the_whole_one(way):
    table = jnp.asarray(START, jnp.float32)
    step, flush = by_parts(way)
    got = expected = table, OPT.init(table)
    for i in range(3):
        g, mask = jnp.full((ROWS, WIDTH), i + 1.0), jnp.arange(ROWS) % 5 == i
        got, expected = step(*got, g, mask), by_mask(*expected, g, mask)
    close(flush(*got), jax.jit(OPT.flush)(*expected))


def test_tables_and_rates_under_vmap_are_single_ones():
    rates = jnp.array([0.1, 0.5])
    tables = jnp.stack([jnp.asarray(START, jnp.float32)] * 2)
    rows = jnp.asarray(np.array(PICKED[:2]))
    g = jnp.asarray(SIGNAL[:2], jnp.float32)

    def run(rate, table, rows, g):
        opt = mo.row_sparse(mo.heavy_ball(0.9), rate)
        return opt.flush(*opt.update(table, opt.init(table), g, rows))

    together, _ = jax.jit(jax.vmap(run))(rates, tables, rows, g)
    for i in range(2):
        expected = START.copy()
        np.add.at(expected, PICKED[i], -float(rates[i]) * SIGNAL[i])
        np.testing.assert_allclose(together[i], expected, rtol=1e-5, atol=1e-6)


def test_table_and_state_that_a_file_gave_back_are_taken_as_numpys():
    table, state = begun()
    rows, mask = np.array([1, 2, 11, ROWS]), np.isin(np.arange(ROWS), [1, 2, 11])
    g = np.ones((ROWS, WIDTH), np.float32)
    restored = jax.tree.map(np.asarray, (table, state))

    @jax.jit
    def once():
        by_mask = OPT.update(*restored, g, mask=list(mask), size=4)
        return OPT.update(*restored, g[:4], rows), by_mask, OPT.flush(*restored), OPT.read(*restored, rows)

    expected = by_rows(table, state, jnp.asarray(g[:4]), jnp.asarray(rows))
    values, moved = jax.jit(OPT.read)(table, state, rows), jax.jit(OPT.flush)(table, state)
    close(once(), (expected, expected, moved, values))


@pytest.mark.parametrize("shape", [(ROWS + 2, WIDTH), (ROWS, WIDTH + 1), (ROWS, WIDTH, 1)])
def test_a_table_of_another_shape_than_that_of_the_state_is_refused(shape):
    _, state = begun()
    table, rows = jnp.ones(shape), jnp.array([0])
    for call in (
        lambda: OPT.read(table, state, rows),
        lambda: OPT.update(table, state, table[:1], rows),
        lambda: OPT.flush(table, state),
    ):
        with pytest.raises(StateMismatchError, match=r"the state must be of a table of shape .*, got arrays of shapes"):
            call()


def test_what_would_be_dropped_is_refused():
    table, state = begun()
    rows, mask = jnp.arange(ROWS), jnp.ones(ROWS, bool)
    with pytest.raises(ValueError, match="size is the number of rows of a mask, got 2 without one"):
        OPT.update(table, state, table, rows, size=2)
    with pytest.raises(TypeError, match="gradient must be an array or a BCOO array, got None"):
        OPT.update(table, state, None, rows)
    for options in ({"rows": rows}, {"mask": mask, "size": 2}):
        with pytest.raises(TypeError, match="the gradient of a real table must be real, got complex64"):
            OPT.update(table, state, table * 1j, **options)
    with pytest.raises(ValueError, match=r"table must have at least one row, got shape \(0, 3\)"):
        OPT.init(jnp.ones((0, WIDTH)))


def test_what_cannot_be_is_refused():
    table, state = begun()
    g, rows = jnp.ones((2, WIDTH)), jnp.array([0, 1])
    mask = jnp.ones(ROWS, bool)
    with pytest.raises(ValueError, match="rule must have numbers as coefficients"):
        mo.row_sparse(mo.heavy_ball(lambda step: 0.9), 0.1)
    with pytest.raises(TypeError, match="rule must be a Filter"):
        mo.row_sparse(0.9, 0.1)
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got -1"):
        mo.row_sparse(mo.ema(0.9), -1)
    with pytest.raises(TypeError, match="table must be an array with a dtype of"):
        OPT.init(jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(TypeError, match="an axis of rows"):
        OPT.init(jnp.zeros(()))
    with pytest.raises(TypeError, match="rows must be integers, got float32"):
        OPT.read(table, state, jnp.ones(3))
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\), got \(3, 3\)"):
        OPT.update(table, state, jnp.ones((3, WIDTH)), rows)
    with pytest.raises(ValueError, match="rows or mask must say"):
        OPT.update(table, state, jnp.ones((ROWS, WIDTH)))
    with pytest.raises(ValueError, match="rows must be None with a mask"):
        OPT.update(table, state, g, rows, mask=mask, size=2)
    with pytest.raises(ValueError, match="size must be given with a mask"):
        OPT.update(table, state, table, mask=mask)
    with pytest.raises(TypeError, match="mask must be of bool"):
        OPT.update(table, state, table, mask=rows, size=2)
    with pytest.raises(ValueError, match=r"one entry for each row, \(12,\), got \(3,\)"):
        OPT.update(table, state, table, mask=jnp.ones(3, bool), size=2)
    with pytest.raises(ValueError, match="must have the table's shape"):
        OPT.update(table, state, g, mask=mask, size=2)
    with pytest.raises(ValueError, match=r"sparse rows alone .* n_dense=0"):
        OPT.update(table, state, sparse.BCOO((jnp.ones(1), jnp.zeros((1, 2), jnp.int32)), shape=(ROWS, WIDTH)))
    with pytest.raises(ValueError, match="rows must be None for a BCOO"):
        OPT.update(table, state, sparse.BCOO((g, rows[:, None]), shape=(ROWS, WIDTH)), rows)


def test_the_table_of_the_documentation_is_that_of_the_committed_file():
    root = pathlib.Path(__file__).parents[1]
    page = (root / "docs" / "batches-and-rows.md").read_text()
    document = json.loads((root / "benchmarks" / "row_sparse.json").read_text())
    assert document["shape"] == [50_000, 256]
    rows = {(row["share"], row["way"]): row for row in document["rows"]}
    for share in sorted({share for share, _ in rows}):
        row, masked = rows[share, "rows"], rows[share, "dense gradient, mask"]
        low, high = row["quartiles"]
        faster, low, high, other = (
            f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (row["times_faster"], low, high, masked["times_faster"])
        )
        assert f"| {share:.1%} | {faster} ({low} to {high}) | {other} |" in page
    assert rows[0.01, "rows"]["quartiles"][0] > 5
    assert rows[0.3, "rows"]["quartiles"][1] < 1, "the text says that it does not help there"
