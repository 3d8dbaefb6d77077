"""The tables: for the terminal and, the same lines, for docs/storage.md."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

from .._paired import holm
from .._run import Row

LOSSES = {
    "autoencoder": "squared error per image",
    "wide": "squared error per image",
    "lm": "nats per token",
    "gru": "nats per character",
    "cnn": "nats per image",
}
TITLES = {
    "autoencoder": "deep autoencoder",
    "wide": "wide autoencoder",
    "lm": "language model",
    "gru": "character GRU",
    "cnn": "MNIST CNN",
}
OPTIMIZERS = {
    "nesterov": "Nesterov",
    "adamw": "AdamW",
    "lion": "Lion",
    "muon": "Muon",
    "adam": "Adam",
    "signum": "Signum",
}
NARROW = ("bfloat16", "int8", "int8, uint8", "int4")
PEERS = ("two passes", "8-bit dynamic")


def by_setting(rows: list[Row]) -> dict[tuple[str, str, float], dict[str, Row]]:
    """The rows of each task, optimizer and decay, by storage."""
    found: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["optimizer"], row["decay"]), {})[row["storage"]] = row
    return found


def values(row: Row, key: str) -> np.ndarray:
    """An entry for each seed, NaN where a run diverged."""
    return np.array(row[key], float)


def added(row: Row, full: Row) -> np.ndarray:
    """For each seed the loss less that of float32."""
    more: np.ndarray = values(row, "losses") - values(full, "losses")
    return more


def diverges(row: Row, full: Row) -> bool:
    """Whether half of the seeds end beyond half as much again as the worst of float32, or nowhere."""
    return not np.median(values(row, "losses")) <= 1.5 * values(full, "losses").max()


def significant(rows: list[Row], storages: Sequence[str], level: float = 0.05) -> tuple[int, int, int]:
    """How many losses are compared with float32's, how many differ at this level, and how many after Holm's correction.

    By Student's t of the differences between runs of one seed, both sides.
    """
    pairs = [(of[name], of["float32"]) for of in by_setting(rows).values() for name in storages if name in of]
    found = [stats.ttest_1samp(added(*pair), 0).pvalue for pair in pairs]
    return len(found), int(np.sum(np.less(found, level))), int(np.sum(np.less(holm(found), level)))


def loss_lines(rows: list[Row]) -> Iterator[str]:
    """Losses in float32, and what the others add to them: mean of pairs and its standard error."""
    yield from _head("task", "optimizer", "decay", "loss, float32", *NARROW)
    for setting, of in by_setting(rows).items():
        full = of["float32"]
        yield _line(
            *_names(*setting), f"{values(full, 'losses').mean():.3f}", *(_added(of.get(name), full) for name in NARROW)
        )


def _added(row: Row | None, full: Row) -> str:
    if row is None:
        return ""
    if diverges(row, full):
        return "diverges"
    more = added(row, full)
    return f"{more.mean():+.3f} ± {more.std(ddof=1) / np.sqrt(len(more)):.3f}"


def error_lines(rows: list[Row]) -> Iterator[str]:
    """Relative errors of the stored velocity: mean over steps, and of int8 in the first step and in steps 5 to 21."""
    narrow = [name for name in NARROW if name != "int8, uint8"]
    yield from _head("task", "optimizer", "decay", *narrow, *PEERS, "int8, first step", "int8, steps 5 to 21")
    for setting, of in by_setting(rows).items():
        cells = [_mean(of.get(name), "tree_errors") for name in (*narrow, *PEERS)]
        yield _line(*_names(*setting), *cells, *(_mean(of["int8"], f"{when}_errors") for when in ("first", "early")))


def direction_lines(rows: list[Row]) -> Iterator[str]:
    """Cosines of the updates to float32's, mean over steps, and the longest step over float32's longest."""
    yield from _head("task", "optimizer", "decay", *NARROW)
    for setting, of in by_setting(rows).items():
        if setting[1] != "nesterov":
            cells = [_both(of.get(name)) for name in NARROW]
            yield _line(*_names(*setting), *cells)


def _both(row: Row | None) -> str:
    if row is None:
        return ""
    longest = values(row, "longest").max()
    return f"{values(row, 'cosines').mean():.3f}, {longest:.{1 if longest < 10 else 0}f}"


def column_lines(directions: list[Row]) -> Iterator[str]:
    """For each optimizer and storage: cosines in columns of each share, and the longest step there."""
    shares = list(dict.fromkeys(row["share"] for row in directions))
    yield from _head("optimizer", "storage", *(f"{share:g}" for share in shares))
    for optimizer, storage in dict.fromkeys((row["optimizer"], row["storage"]) for row in directions):
        here = [row for row in directions if (row["optimizer"], row["storage"]) == (optimizer, storage)]
        steps = optimizer == "adam"
        cells = [f"{row['cosine']:.2f}" + (f", {row['longest']:.1f}" if steps else "") for row in here]
        yield _line(OPTIMIZERS[optimizer], storage, *cells)


def regression_lines(regression: list[Row], ratios: Sequence[float]) -> Iterator[str]:
    """For each optimizer and storage: the relative error of the weights of each group of targets, median over seeds."""
    yield from _head("optimizer", "storage", *(f"{ratio:g}" for ratio in ratios))
    for row in regression:
        yield _line(OPTIMIZERS[row["optimizer"]], row["storage"], *(_short(np.median(of)) for of in row["errors"]))


def tables(document: Row) -> Iterator[str]:
    """All of them."""
    rows, columns = document["rows"], document["columns"]
    for title, lines in (("losses", loss_lines), ("errors", error_lines), ("directions", direction_lines)):
        yield from ("", title, "", *(lines(rows) if rows else ()))
    if columns:
        yield from ("", "columns", "", *column_lines(columns["directions"]), "", "regression", "")
        yield from regression_lines(columns["regression"], columns["ratios"])


def _names(task: str, optimizer: str, decay: float) -> tuple[str, str, str]:
    return TITLES[task], OPTIMIZERS[optimizer], f"{decay:g}"


def _mean(row: Row | None, key: str) -> str:
    return "" if row is None else _short(values(row, key).mean())


def _short(value: float) -> str:
    """Two significant digits below 1."""
    if not np.isfinite(value):
        return "diverges"
    return f"{value:.3f}" if 0.01 <= value < 1 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _head(*cells: str) -> tuple[str, str]:
    return _line(*cells), "|" + "---|" * len(cells)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
