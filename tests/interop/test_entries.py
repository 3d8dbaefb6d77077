"""Entries of another library matched with parameters: names, layouts, tensors."""

import jax.numpy as jnp
import numpy as np
import pytest
from conformance import assert_bit_equal
from interop.live_states import NAMES, take, torch_state

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("layout", "theirs", "ours"),
    [
        ("linear", (2, 3), (3, 2)),
        ("conv1d", (2, 3, 4), (4, 3, 2)),
        ("conv2d", (2, 3, 4, 5), (4, 5, 3, 2)),
        ("conv3d", (2, 3, 4, 5, 6), (4, 5, 6, 3, 2)),
        ((2, 0, 1), (2, 3, 4), (4, 2, 3)),
    ],
)
def test_layouts_are_flaxs(layout, theirs, ours):
    buffer = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
    there = {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [{"params": [0]}]}
    state = interop.torch_sgd(momentum=0.9).init({"w": jnp.zeros(ours)})
    state = interop.from_torch(state, there, {"w": 0}, layouts={"w": layout})
    (v,) = mo.velocity(state)
    # Element by element: out, in and space change places, nothing is flipped.
    axes = {"linear": "oi,io", "conv1d": "oix,xio", "conv2d": "oixy,xyio", "conv3d": "oixyz,xyzio"}.get(
        layout, "abc,cab"
    )
    np.testing.assert_array_equal(v["w"], np.einsum(axes.replace(",", "->"), buffer))
    back = interop.to_torch(state, there, {"w": 0}, layouts={"w": layout})
    np.testing.assert_array_equal(back["state"][0]["momentum_buffer"], buffer)


class Tensor:
    """What of a PyTorch tensor is looked at."""

    def __init__(self, value, dtype="torch.float32", on_device=True):
        self.value, self.dtype, self.on_device = value, dtype, on_device

    def detach(self):
        return Tensor(self.value, self.dtype, True)

    def cpu(self):
        return Tensor(self.value, self.dtype, False)

    def float(self):
        return Tensor(self.value, "torch.float32", self.on_device)

    def __array__(self, dtype=None, copy=None):
        if self.on_device or self.dtype == "torch.bfloat16":
            raise TypeError("NumPy cannot read this")
        return self.value


def test_tensors_of_any_device_and_of_bfloat16_are_read():
    there = torch_state()
    plain = take(there)
    for dtype in ("torch.float32", "torch.bfloat16"):
        wrapped = {i: {"momentum_buffer": Tensor(e["momentum_buffer"], dtype)} for i, e in there["state"].items()}
        assert_bit_equal(take({**there, "state": wrapped}), plain)


@pytest.mark.parametrize("layout", ["lin", [1, 0], (1.0, 0), (1, 1), (0, 2)])
def test_a_layout_is_a_name_or_a_permutation(layout):
    with pytest.raises(
        ValueError, match=r"layouts\['head'\] must be 'linear', .* or a permutation such as \(1, 0\), got"
    ):
        take(layouts={"head": layout})


def test_names_must_give_each_parameter_once():
    there = torch_state()
    there["param_groups"][0]["params"] = [0, 1]
    del there["state"][2]
    with pytest.raises(ValueError, match="names must give each parameter once"):
        take(there, NAMES | {"head": 1})
    with pytest.raises(ValueError, match=r"names has the parameter 5, which is not there \(0, 1\)"):
        take(there, NAMES | {"head": 5})
