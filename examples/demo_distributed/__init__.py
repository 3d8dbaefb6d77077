"""The demo of several processes: workers that meet rarely, the bytes that they send, and the cost of killing one.

    python -m examples.demo_distributed --help

`__main__` is the command line; `launcher` runs the workers of a training run, each with a `job`; `processes` starts and
ends them. `worker` is the program of each: it follows one of the `strategies`, with the computations of `training`;
`measured` and `traffic` count their cost, `checkpoint` writes files that a kill cannot damage. `report` prints and
draws.
"""
