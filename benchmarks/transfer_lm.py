"""Settings moved to larger batches by published rules, against settings tuned anew, on a small language model.

    python -m benchmarks.transfer_lm --plot docs/figures/transfer_lm.png --write

The model and the text of `benchmarks.board`, AdamW, SGD with Nesterov's momentum and Lion. With a batch of 2 windows
the learning rate is the best of six. Then the batch is 4 and 16 times as large, and there are as many times fewer
steps: the same windows in the same order. Each rule of `mo.tuning.transfer` for that base gives learning rate, decay
and weight decay; Adam's second decay is taken to the same power, or its distance from 1 times the same factor, as the
rule does with the first one. Against that stands the best of twelve: six learning rates, at the old decays and at the
old half-lives in tokens, weight decay moved with them. What is tuned is chosen by validation loss with a seed of which
no result is reported. Reported is the final test loss of the other seeds less that of the tuned settings from the same
seeds, with the 95 % interval of Student's t.

Rows are written batch by batch, and a run that is stopped goes on where it was: the same command again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import WRITABLE, whole_number
from examples.lm import data

from . import _page, _run
from ._language import Problem, Reader, Setting, Trainer, held_out, problems, schedule
from ._paired import difference
from ._run import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = Setting(batch=2, steps=1600, marks=1)
TOY = Setting(8, 1, 1, length=8, batch=1, steps=32, marks=1, held_out=8)
BATCHES = (1, 4, 16)
SELECTION_SEED = 1000
# Learning rates to try: over the centre of a base at its old batch, and over the old rate at new ones.
OLD_FACTORS, NEW_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0), (1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
PAGE, COMMAND = _page.DOCS / "transfer.md", "python -m benchmarks.transfer_lm --write"
TUNED = "tuned anew"
# Okabe and Ito's, told apart under every common colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")

# The numbers of a run, arrays with an axis of runs in front.
Numbers: TypeAlias = dict[str, np.ndarray]


class Candidate(NamedTuple):
    """Settings of a run.

    Attributes:
      rate: The learning rate.
      rule: The rule, with one velocity.
      weight_decay: Decoupled.
      second: The decay of Adam's second moment; 0 for other bases.
    """

    rate: float
    rule: mo.Filter
    weight_decay: float
    second: float = 0.0

    @property
    def decay(self) -> float:
        """That of the rule."""
        return float(mo.analysis.poles(self.rule)[0].real)


class Base(NamedTuple):
    """An optimizer.

    Attributes:
      old: Its settings at the old batch, with the centre of the learning rates.
      kind: What `mo.tuning.transfer` calls it.
      keeps: The rules of transfer for it.
      make: The transformation between the gradients and the learning rate.
    """

    old: Candidate
    kind: str
    keeps: tuple[str, ...]
    make: Callable[[mo.Filter, jax.Array], optax.GradientTransformation]


BASES = {
    "AdamW": Base(
        Candidate(2e-3, mo.ema(0.95), 0.1, 0.99),
        "adam",
        ("trajectory", "square_root_rate", "half_life_tokens"),
        lambda rule, second: optax.scale_by_adam(rule.A[0][0], second),
    ),
    "SGD": Base(
        Candidate(0.1, mo.nesterov(0.9), 0.0),
        "sgd",
        ("trajectory", "linear_rate", "square_root_rate", "half_life_tokens"),
        lambda rule, second: mo.scale_by_momentum(rule),
    ),
    "Lion": Base(
        Candidate(2e-4, mo.lion_mix(0.95, 0.98), 1.0),
        "norm",
        ("bound", "bound_fixed_decay", "half_life_tokens"),
        lambda rule, second: optax.chain(mo.scale_by_momentum(rule), optax.scale_by_sign()),
    ),
}


def moved(base: Base, old: Candidate, keep: str, batch: int) -> Candidate:
    """The settings for a batch so many times as large, by a rule of transfer."""
    new = mo.tuning.transfer(old.rule, old.rate, base=base.kind, keep=keep, batch=batch, weight_decay=old.weight_decay)
    # What happens to the second decay is what the rule does to the first.
    second = 1 - batch * (1 - old.second) if keep == "square_root_rate" else old.second**batch
    return Candidate(new.learning_rate, new.rule, new.weight_decay, second if old.second else 0.0)


def grid(base: Base, old: Candidate, batch: int) -> list[Candidate]:
    """What is tried anew: the learning rates, at the old decays and at the old half-lives in tokens."""
    if batch == 1:
        return [old._replace(rate=old.rate * factor) for factor in OLD_FACTORS]
    shorter = moved(base, old, "half_life_tokens", batch)
    found = []
    for like in (shorter._replace(rule=old.rule, second=old.second), shorter):
        for factor in NEW_FACTORS:
            rate = old.rate * factor
            found.append(like._replace(rate=rate, weight_decay=shorter.weight_decay * shorter.rate / rate))
    return found


def numbers(candidates: Sequence[Candidate]) -> Numbers:
    """Their numbers, for a program that is compiled once for all of them."""
    rows = []
    for candidate in candidates:
        A, B, C, D = candidate.rule.matrices()
        fixed = (candidate.rate, candidate.weight_decay, candidate.second)
        rows.append([*fixed, float(A[0, 0]), float(B[0]), float(C[0]), float(D)])
    names = ("rate", "weight_decay", "second", "A", "B", "C", "D")
    return dict(zip(names, np.asarray(rows, np.float32).T, strict=True))


def trainer_of(base: Base, setting: Setting) -> Trainer:
    """Runs of a base with the numbers of `numbers`."""

    def make(given: dict[str, jax.Array]) -> tuple[optax.GradientTransformation, Reader]:
        rule = mo.Filter(*(given[name] for name in "ABCD"))
        tx = optax.chain(
            base.make(rule, given["second"]),
            optax.add_decayed_weights(given["weight_decay"]),
            optax.scale_by_learning_rate(schedule(given["rate"], setting.steps)),
        )
        return tx, lambda state, params: params

    return Trainer(make, setting)


def merged(problem: Problem, batch: int) -> Problem:
    """The same windows in the same order, in batches so many times as large."""
    seeds, steps, size, length = problem.batches.shape
    return problem._replace(batches=problem.batches.reshape(seeds, steps // batch, size * batch, length))


def row(name: str, batch: int, way: str, candidate: Candidate, losses: np.ndarray) -> Row:
    """A row of the results."""
    return {
        "base": name,
        "batch": batch,
        "way": way,
        "learning_rate": round(candidate.rate, 12),
        "decay": round(candidate.decay, 12),
        "second_decay": round(candidate.second, 12),
        "weight_decay": round(candidate.weight_decay, 12),
        "losses": [round(float(x), 6) for x in losses],
    }


def measure(name: str, batch: int, setting: Setting, seeds: int, old: Candidate) -> list[Row]:
    """The rows of a base at a batch so many times the old one: tuned settings first, then every rule of transfer."""
    base, texts = BASES[name], data.splits()
    larger = dataclasses.replace(setting, batch=setting.batch * batch, steps=setting.steps // batch)
    trainer = trainer_of(base, larger)

    def final(candidates: Sequence[Candidate], seeds: Sequence[int], text: np.ndarray) -> np.ndarray:
        problem = merged(problems(setting, seeds), batch)
        return trainer.curves(numbers(candidates), problem, held_out(setting, text))[:, -1]

    tried = grid(base, old, batch)
    losses = final(tried, [SELECTION_SEED] * len(tried), texts.validation)
    ways = {TUNED: tried[int(np.argmin(losses))]}
    ways |= {keep: moved(base, old, keep, batch) for keep in base.keeps if batch > 1}
    rows = [row(name, batch, way, one, final([one] * seeds, range(seeds), texts.test)) for way, one in ways.items()]
    rows[0]["validation"] = [round(float(x), 6) for x in losses]
    return rows


def cells_of(entry: Row, tuned: Row) -> list[str]:
    """A row in the table."""
    losses = np.array(entry["losses"])
    gap = ""
    if entry is not tuned:
        found = difference(entry["losses"], tuned["losses"])
        gap = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
        gap = gap if found.low <= 0 <= found.high else f"**{gap}**"
    second = f", {entry['second_decay']:.3g}" if entry["second_decay"] else ""
    way = entry["way"] if entry["way"] == TUNED else f"`{entry['way']}`"
    loss = f"{losses.mean():.3f} ± {losses.std(ddof=1):.3f}"
    return [entry["base"], str(entry["batch"]), way, f"{entry['learning_rate']:.3g}",
            f"{entry['decay']:.3g}{second}", loss, gap]  # fmt: skip


def tuned_of(rows: Sequence[Row], entry: Row) -> Row:
    """The tuned settings at the batch of a row."""
    return next(r for r in rows if (r["base"], r["batch"], r["way"]) == (entry["base"], entry["batch"], TUNED))


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    head = ["base", "batch", "settings", "learning rate", "decay", "test loss", "less tuned (95 %)"]
    return _page.table(head, [cells_of(entry, tuned_of(rows, entry)) for entry in rows])


def draw(rows: Sequence[Row]) -> "Figure":
    """A panel for each base: the differences to tuned settings, with their intervals, at each batch."""
    # Not pyplot: a bare figure is drawn by Agg and changes no setting of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    bases = list(dict.fromkeys(entry["base"] for entry in rows))
    figure = Figure(figsize=(3.4 * len(bases), 3.4), layout="constrained")
    panels = figure.subplots(1, len(bases), squeeze=False)[0]
    for axes, name in zip(panels, bases, strict=True):
        for i, (keep, color) in enumerate(zip(BASES[name].keeps, COLORS, strict=False)):
            here = [entry for entry in rows if (entry["base"], entry["way"]) == (name, keep)]
            gaps = [difference(entry["losses"], tuned_of(rows, entry)["losses"]) for entry in here]
            places = [BATCHES.index(entry["batch"]) + 0.12 * (i - 1.5) for entry in here]
            reach = np.array([[gap.mean - gap.low, gap.high - gap.mean] for gap in gaps]).T.reshape(2, -1)
            means = [gap.mean for gap in gaps]
            axes.errorbar(places, means, reach, fmt="o", color=color, capsize=3, markersize=4, label=keep)
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set(title=name, xlim=(0.5, len(BATCHES) - 0.5))
        axes.set_xticks(range(1, len(BATCHES)), [f"x {batch}" for batch in BATCHES[1:]])
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("test loss less that of tuned settings")
    figure.supxlabel("batch, new over old", fontsize=10)
    return figure


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    seeds: Annotated[int, whole_number(2, 1000)] = 4
    """runs of each setting"""
    plot: Annotated[Path | None, WRITABLE] = None
    """draw the differences to this file"""
    write: bool = False
    """replace the table of docs/transfer.md"""
    quick: bool = False
    """runs of a toy: to see that it runs"""


def main() -> None:
    """Run the batches that are missing, print the table, write the file, and the page if that was asked for."""
    run = _run.Run("transfer_lm", __doc__, Options)
    setting = TOY if run.options.quick else SMALL
    settings = {"seeds": run.options.seeds, **dataclasses.asdict(setting)}
    rows = _run.rows_before(run.path, settings)
    bar = tqdm([(name, batch) for name in BASES for batch in BATCHES], unit="batch", leave=False)
    for name, batch in bar:
        if any((entry["base"], entry["batch"]) == (name, batch) for entry in rows):
            continue
        old = BASES[name].old
        if batch > 1:
            old = old._replace(rate=next(e for e in rows if (e["base"], e["batch"]) == (name, 1))["learning_rate"])
        rows += measure(name, batch, setting, run.options.seeds, old)
        run.write({"settings": settings, "rows": rows}, indent=None)
    text = markdown(rows)
    print(text, end="")
    if run.options.write:
        _page.write(PAGE, COMMAND, text)
    if run.options.plot:
        draw(rows).savefig(run.options.plot, dpi=120)


if __name__ == "__main__":
    main()
