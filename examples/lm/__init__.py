"""A small language model: any optimizer of the package on English text, with checkpoints.

    python -m examples.lm --help

`data` has the text, `model` the transformer.
"""
