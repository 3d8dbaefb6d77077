"""Wrappers: transformations that look at gradients, or at the state or updates of other optimizers."""
