"""Numbers that are known about momentum, reproduced with this package.

    python -m benchmarks.published_numbers

Four experiments, every rule taken from the package and run in float64, each row beside the number that is known:

- restarts: Nesterov's rule with FISTA's momentum on a quadratic of 200 curvatures between 1e-4 and 1, steps until the
  loss is 1e-10 of its start; without restarts, with those of O'Donoghue and Candes (2015, arXiv:1204.3982), with a
  constant decay, and plain descent. Other starts than the first differ by a third, so their range is given too.
- aggregated momentum: steps per factor e on quadratics at the best constant rate, for AggMo (Lucas et al., 2019,
  arXiv:1804.00325), heavy balls of fixed decay and the optimal one.
- regression: batches of one in the two-point model of Kidambi et al. (2018, arXiv:1803.05591): steps per factor e of
  the mean square error at the best coefficients, from the exact operator on second moments, and its slope over the
  condition number.
- local minima: f(x) = x^2/20 + 1 - cos 2x from 4000 starts on [-12, 12], the same final descent for all: the share that
  ends in the lowest basin. Fixed rate, matched effective rate and matched number of gradients against random restarts.

Prints a table and writes benchmarks/published_numbers.json. Takes half a minute.
"""

from tqdm import tqdm

from .. import _run
from .._run import Row
from .aggregated import aggregated
from .local_minima import MINIMA, local_minima
from .regression import regression
from .restarts import restarts

EXPERIMENTS = {"restarts": restarts, "aggregated": aggregated, "regression": regression, "local minima": local_minima}
RUNS = 25 + 16 + 20 + 7 * len(MINIMA) + 2


def table(rows: list[Row]) -> str:
    """The rows in print."""
    columns = {
        "experiment": "{experiment}",
        "case": "{case}",
        "measured": "{measured:.5g}",
        "known": "{known:.5g}",
        "allowed": "{tolerance:.2g}",
        "": "{verdict}",
    }
    verdicts = ("" if abs(row["measured"] - row["known"]) <= row["tolerance"] else "differs" for row in rows)
    return _run.table(columns, [row | {"verdict": verdict} for row, verdict in zip(rows, verdicts, strict=True)])


def main() -> None:
    """Run everything, print the table, write the file."""
    run = _run.Run("published_numbers", __doc__, _run.Options)
    with tqdm(total=RUNS, unit="run", leave=False) as bar:
        rows = [entry for experiment in EXPERIMENTS.values() for entry in experiment(bar)]
    print(table(rows))
    run.write({"rows": rows})


if __name__ == "__main__":
    main()
