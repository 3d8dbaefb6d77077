"""Specifications of the parts of a state, by hand."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from momentum_optax.distributed.specs import axes_of, names_in, restricted, spec_of_part, spread


@pytest.mark.parametrize(
    ("shape", "of_param", "spec", "expected"),
    [
        ((8, 4), (8, 4), P("x", "y"), P(("x",), ("y",))),
        ((8, 1), (8, 4), P("x", "y"), P(("x",), None)),
        ((1, 1), (8, 4), P("x", "y"), P(None, None)),
        ((8, 4), (8, 4), P(("x", "y")), P(("x", "y"), None)),
        ((8, 4), (8, 4), P(), P(None, None)),
        ((8,), (8, 4), P("x"), P()),
        ((), (8, 4), P("x"), P()),
    ],
    ids=str,
)
def test_a_part_is_split_along_the_axes_that_it_has_in_full(shape, of_param, spec, expected):
    assert spec_of_part(shape, of_param, spec) == expected


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((8, 3), P(), P(("x",), None)),
        ((3, 8), P(), P(None, ("x",))),
        ((8, 8), P("y"), P(("y", "x"), None)),
        # 4 of the first axis are split in two already; the next axis has room.
        ((4, 8), P("y"), P(("y",), ("x",))),
        ((3, 5), P(), P(None, None)),
        ((0, 8), P(), P(None, ("x",))),
        ((), P(), P()),
    ],
    ids=str,
)
def test_a_share_is_cut_along_the_first_axis_that_the_devices_divide(shape, spec, expected):
    mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"))
    assert spread(shape, spec, mesh, "x") == expected


def test_axes_and_their_names():
    spec = P("x", None, ("y", "z"))
    assert axes_of(spec, 4) == [("x",), (), ("y", "z"), ()]
    assert names_in(spec) == {"x", "y", "z"}
    assert restricted(axes_of(spec, 3), {"x", "z"}) == P(("x",), None, ("z",))
    assert restricted(axes_of(spec, 3), set()) == P(None, None, None)
