"""`lion` and `signum` against Optax's."""

import jax
import numpy as np
import optax
import pytest
from stepping import final

import momentum_optax as mo


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (mo.lion(0.01, 0.8, 0.95, weight_decay=0.1), optax.lion(0.01, 0.8, 0.95, weight_decay=0.1)),
        (mo.lion(0.01), optax.lion(0.01)),
        (mo.signum(0.01, 0.8), optax.signum(0.01, 0.8)),
        (mo.signum(optax.linear_schedule(0.1, 0.0, 50)), optax.signum(optax.linear_schedule(0.1, 0.0, 50))),
    ],
    ids=["lion", "lion's defaults", "signum", "signum's defaults"],
)
def test_sign_methods_are_optax_s_over_a_hundred_steps(ours, theirs):
    # Signs are the same or not: a single one that differed would be 0.02 here. Then at most 4 ulps of the sums.
    got, expected = final(ours), final(theirs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=4 * 2**-23), got, expected)


def test_a_negative_weight_decay_is_refused():
    with pytest.raises(ValueError, match="weight_decay must be in"):
        mo.lion(0.1, weight_decay=-1.0)
