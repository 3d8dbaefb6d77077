"""A line of the table."""

from typing import Protocol

from .._run import Row


class Bar(Protocol):
    """A progress bar, as of tqdm."""

    def update(self) -> object:
        """One more is done."""


def row(experiment: str, case: str, measured: float, known: float, tolerance: float, **more: object) -> Row:
    """One line of the table; `tolerance` is the allowed distance from the known number."""
    return {
        "experiment": experiment,
        "case": case,
        "measured": round(float(measured), 6),
        "known": known,
        "tolerance": tolerance,
        **more,
    }
