"""A small language model: any optimizer of the package on English text, with checkpoints.

    python -m examples.lm --help

`data` has the text, `config` the sizes, `model` the transformer. `settings` is what a run depends on, `optimizers` and
`placement` make it, `training` runs it with the help of `checkpoints`, and `figure` draws it.
"""
