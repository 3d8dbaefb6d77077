"""Requirements of the dialects: steps that another one cannot take are refused with the reason."""

import pytest
from interop.recipe_pairs import rate

from momentum_optax.interop import Recipe, equivalent_hyperparameters


@pytest.mark.parametrize(
    ("source", "target", "match"),
    [
        (Recipe("aggmo", lr=0.1), "torch_sgd", "only a rule of order 1 has a quasi-hyperbolic form, got order 2"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7), "torch_sgd", r"its nu, 0.7, must be 1 \(heavy ball\)"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7), "caffe_sgd", "its nu, 0.7, must be 1: a heavy ball"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7), "aggmo", "for two velocities"),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "mass", "must be above 0 and its nu, 1, below 1"),
        (Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.95), "mass", "it would need kappa_t 0.48"),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "lion", "it takes the sign of the update"),
        (Recipe("lion"), "torch_sgd", "it takes no sign of the update"),
        (Recipe("lion"), "signum", "its nu, 0.909091, must be 1"),
        (Recipe("torch_sgd", lr=0.1, momentum=0.9), "muon_sum", "a momentum without a learning rate"),
        (Recipe("torch_sgd", weight_decay=0.1), "keras_sgd", "it has no coupled weight decay"),
        (Recipe("timm_sgdw", weight_decay=0.1), "torch_sgd", "it has no decoupled weight decay"),
        (Recipe("torch_sgd", maximize=True), "keras_sgd", "it cannot maximize"),
        (Recipe("torch_sgd", lr=lambda t: 0.1, momentum=0.9), "keras_sgd", "no momentum of keras_sgd makes up for it"),
        (
            Recipe("keras_sgd", learning_rate=rate, momentum=0.9, nesterov=True),
            "torch_sgd",
            "no momentum of torch_sgd makes up for it",
        ),
    ],
)
def test_what_has_no_equivalent_is_refused_with_the_reason(source, target, match):
    with pytest.raises(ValueError, match=match):
        equivalent_hyperparameters(source, target)
