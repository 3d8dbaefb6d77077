"""Finished optimizers, one file per family; each body is one visible `optax.chain`."""
