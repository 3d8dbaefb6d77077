"""The rules of the demo; decays as published, not tuned."""

import momentum_optax as mo

# SGD is the heavy ball of decay zero, which stores no velocity.
RULES: dict[str, mo.Filter] = {
    "sgd": mo.heavy_ball(0.0),
    "heavy_ball": mo.heavy_ball(0.9),
    "nesterov": mo.nesterov(0.9),
    "quasi_hyperbolic": mo.quasi_hyperbolic(0.999, 0.7),
    "aggregated": mo.aggregated((0.0, 0.9, 0.99)),
}
