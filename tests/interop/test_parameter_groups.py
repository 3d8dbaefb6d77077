"""Parameter groups of PyTorch's as `optax.partition` or as a chain of masks."""

import jax
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal
from interop.live_states import LAYOUTS, NAMES, PARAMS, go_on, grads, torch_state

import momentum_optax as mo

interop = mo.interop


GROUPS = {
    "body": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "bias": {"lr": 0.2, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    "head": {"lr": 0.3},
}


LABELS = {"dense": {"kernel": "body", "bias": "bias"}, "head": "head"}


CONVERTED = {
    "partition": lambda groups: optax.partition({k: interop.torch_sgd(**v) for k, v in groups.items()}, LABELS),
    "chain of masks": lambda groups: optax.chain(
        *(
            optax.masked(interop.torch_sgd(**v), jax.tree.map(lambda label, k=k: label == k, LABELS))
            for k, v in groups.items()
        )
    ),
}


every_way = pytest.mark.parametrize("way", CONVERTED)


def grouped_state(**changes):
    """A state dictionary with a group for each parameter, whose rate is an array as a tensor would be."""
    there = torch_state(**{"_2": None, **changes})
    settings = [GROUPS["body"], GROUPS["bias"], GROUPS["head"]]
    there["param_groups"] = [
        {"params": [i], "momentum": 0, "dampening": 0, **group, "lr": np.float32(group["lr"]), "fused": None}
        for i, group in enumerate(settings)
    ]
    return there


def torch_steps(there, seeds):
    """PyTorch's documented steps from a state dictionary, in NumPy float64; a list of updates by number."""
    buffers = {i: np.float64(entry["momentum_buffer"]) for i, entry in there["state"].items()}
    params = {
        0: np.float64(PARAMS["dense"]["kernel"]).T,
        1: np.float64(PARAMS["dense"]["bias"]),
        2: np.float64(PARAMS["head"]),
    }
    out = []
    for seed in seeds:
        g = grads(seed)
        arrays = {0: np.float64(g["dense"]["kernel"]).T, 1: np.float64(g["dense"]["bias"]), 2: np.float64(g["head"])}
        moved = {}
        for group in there["param_groups"]:
            (i,) = group["params"]
            d = arrays[i] + group.get("weight_decay", 0) * params[i]
            if group["momentum"]:
                first = i not in buffers
                b = d if first else group["momentum"] * buffers[i] + (1 - group["dampening"]) * d
                buffers[i] = b
                d = d + group["momentum"] * b if group.get("nesterov") else b
            moved[i] = -group["lr"] * d
        out.append(moved)
    return out


@every_way
@pytest.mark.parametrize("pending", [(), ("_0",), ("_1",)], ids=["all", "body pending", "bias pending"])
def test_parameter_groups_come_into_a_partition_and_go_on_as_in_pytorch(way, pending):
    there = grouped_state(**dict.fromkeys(pending))
    tx = CONVERTED[way](GROUPS)
    state = interop.from_torch(tx.init(PARAMS), there, NAMES, layouts=LAYOUTS)
    ours, after = go_on(tx, state, (1, 2))
    for u, expected in zip(ours, torch_steps(there, (1, 2)), strict=True):
        np.testing.assert_allclose(u["dense"]["kernel"].T, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(u["dense"]["bias"], expected[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(u["head"], expected[2], rtol=1e-5, atol=1e-6)
    back = interop.to_torch(state, {"state": {}, "param_groups": there["param_groups"]}, NAMES, layouts=LAYOUTS)
    # Without dampening a first step is the same from a buffer of zeros, and is not told apart from one.
    zero = {1: {"momentum_buffer": np.zeros(3, np.float32)}} if "_1" in pending else {}
    assert_bit_equal(back["state"], there["state"] | zero)
    assert back["param_groups"] == there["param_groups"]
    # The group without momentum has no buffer there either.
    assert sorted(interop.to_torch(after, there, NAMES, layouts=LAYOUTS)["state"]) == [0, 1]


@every_way
def test_a_group_without_momentum_takes_no_buffer(way):
    there = grouped_state(_2={"momentum_buffer": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="head is masked in opt_state, and its entry has a velocity"):
        interop.from_torch(CONVERTED[way](GROUPS).init(PARAMS), there, NAMES, layouts=LAYOUTS)


def test_groups_that_all_have_a_momentum_but_two_in_one_chain_are_told_apart():
    both = {key: {"lr": 0.1, "momentum": 0.9} for key in GROUPS}
    tx = optax.chain(CONVERTED["partition"](both), interop.torch_sgd(lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="opt_state must hold one velocity per parameter, got two for 'dense/"):
        interop.to_torch(tx.init(PARAMS), torch_state(), NAMES, layouts=LAYOUTS)
