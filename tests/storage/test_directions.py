"""Storages of what Muon orthogonalises: int4 is refused and int8 warned of, however the storage is said."""

import jax
import jax.numpy as jnp
import optax
import pytest

import momentum_optax as mo

PARAMS = {"embed": jnp.ones((4, 2)), "layer": {"kernel": jnp.ones((2, 6)), "bias": jnp.ones(6)}}
NUMBERS = mo.matrices.excluding("embed")
OBJECTS = {"bfloat16": mo.storage.bfloat16(), "int8": mo.storage.int8(min_size=1), "int4": mo.storage.int4(min_size=1)}
# A storage by its name, as an object, for a leaf by patterns of paths, and by a function of path and shape.
WAYS = {
    "name": lambda name: name,
    "object": lambda name: OBJECTS[name],
    "patterns": lambda name: {"layer/kernel": name, ".*": "float32"},
    "function": lambda name: lambda path, leaf: name if path == "layer/kernel" else "float32",
}


def optax_s_muon():
    return optax.contrib.muon(0.1, muon_weight_dimension_numbers=NUMBERS)


def by_hand(momentum):
    """The parts of Muon in a chain, for the kernel alone."""
    alone = {"embed": False, "layer": {"kernel": True, "bias": False}}
    return optax.masked(optax.chain(momentum, mo.orthogonalize(), mo.matrices.scale_by_shape()), alone)


def is_kernel(path, leaf):
    return leaf.shape == (2, 6)


def of_field(path, leaf):
    """As `is_kernel`, of the velocity and of Optax's momentum."""
    return path[-1].key == "kernel"


def by_field(name, make):
    return lambda storage: mo.compress(make(), {name: storage})


def by_predicate(make, predicate=is_kernel):
    return lambda storage: mo.compress(make(), predicate, storage)


def ours(make, **options):
    return lambda: make(0.1, weight_dimension_numbers=NUMBERS, **options)


def with_storage(make):
    return lambda storage: ours(make, storage=storage)()


# The ways to Muon's momentum in a storage that can be noticed; a chain by hand cannot.
ROUTES = {
    "muon": with_storage(mo.muon),
    "normuon": with_storage(mo.normuon),
    "injected": lambda storage: optax.inject_hyperparams(mo.muon, static_args=("storage", "weight_dimension_numbers"))(
        0.1, storage=storage, weight_dimension_numbers=NUMBERS
    ),
    "compress optax.contrib.muon": by_field("mu", optax_s_muon),
    "compress optax.contrib.muon by predicate": by_predicate(optax_s_muon),
    # The velocity of one that keeps it in full: the field of float32.
    "compress muon": by_field("values", ours(mo.muon)),
    "compress muon by predicate": by_predicate(ours(mo.muon), of_field),
    "compress normuon by predicate": by_predicate(ours(mo.normuon)),
    "compress optax.trace before orthogonalize": by_field("trace", lambda: by_hand(optax.trace(0.95))),
    "compress optax.trace before orthogonalize by predicate": by_predicate(lambda: by_hand(optax.trace(0.95))),
    "compress a momentum before orthogonalize by predicate": by_predicate(
        lambda: by_hand(mo.scale_by_momentum(mo.muon_mix(0.95)))
    ),
}
CASES = [(route, way) for route in ROUTES for way in (["name"] if "predicate" in route else WAYS)]


@pytest.mark.parametrize(("route", "way"), CASES)
def test_int4_is_refused_and_int8_warned_of(route, way):
    def first_step(name):
        tx = ROUTES[route](WAYS[way](name))
        return jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS))

    with pytest.raises(ValueError, match=r"storage must not be int4 here: .*take 'bfloat16' or 'int8'") as caught:
        first_step("int4")
    assert len(str(caught.value)) < 300
    with pytest.warns(UserWarning, match=r"storage int8 turns the orthogonalised direction .* Take 'bfloat16'") as seen:
        first_step("int8")
    assert all(len(str(x.message)) < 300 for x in seen)
    first_step("bfloat16")


def test_muon_itself_is_checked_before_its_first_step():
    for route in ("muon", "normuon", "injected"):
        for name in ("patterns", "function"):
            with pytest.raises(ValueError, match="storage must not be int4 here"):
                jax.eval_shape(ROUTES[route](WAYS[name]("int4")).init, PARAMS)
    for make in (mo.muon, mo.normuon):
        with pytest.raises(ValueError, match="storage must not be int4 here"):
            make(0.1, storage="int4")


def test_what_comes_behind_orthogonalize_or_beside_it_may_be_kept_in_any_storage():
    few = OBJECTS["int4"]
    behind = optax.chain(mo.orthogonalize(), mo.scale_by_momentum(mo.heavy_ball(0.9), storage=few))
    compressed_behind = mo.compress(optax.chain(mo.orthogonalize(), optax.trace(0.9)), {"trace"}, few)
    beside = optax.partition(
        {"a": mo.orthogonalize(), "b": mo.scale_by_momentum(mo.heavy_ball(0.9), storage=few)}, {"a": "a", "b": "b"}
    )
    params = {"a": jnp.ones((2, 6)), "b": jnp.ones((2, 6))}
    for tx in (behind, compressed_behind, beside):
        state = jax.eval_shape(lambda tx=tx: tx.update(params, tx.init(params), params))[1]
        assert any(x.dtype == jnp.int4 for x in jax.tree.leaves(state))


def test_other_parameters_may_be_kept_in_any_storage():
    few = OBJECTS["int4"]
    patterns = {"layer/kernel": "bfloat16", ".*": few}
    for kept in (patterns, lambda path, leaf: patterns.get(path, few)):
        state = jax.eval_shape(mo.compress(optax_s_muon(), {"mu": kept}).init, PARAMS)
        codes = [x for x in jax.tree.leaves(state) if x.dtype in (jnp.int4, jnp.bfloat16)]
        # Of the embedding, which is Adam's; of the kernel; and of the bias, Adam's too.
        assert sorted((x.dtype.name, x.shape) for x in codes) == [
            ("bfloat16", (2, 6)),
            ("int4", (4, 2)),
            ("int4", (6,)),
        ]
