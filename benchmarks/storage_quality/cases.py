"""What is compared: every task with every optimizer, decay and storage."""

from typing import NamedTuple

import momentum_optax as mo

from .bases import BASES, Kept
from .reference import Dynamic, Reference

AUTOENCODERS = ("autoencoder", "wide")
# Of tasks that do not have five.
SEEDS = {"lm": 3}


class Case(NamedTuple):
    """One row."""

    task: str
    base: str
    decay: float
    storage: str


def storages(task: str, base: str, decay: float) -> dict[str, Kept]:
    """The storages in which an optimizer trains a task."""
    table: dict[str, Kept] = {name: name for name in ("float32", "bfloat16", "int8")}
    if base == "adamw":
        table["int8, uint8"] = {"mu": "int8", "nu": "uint8"}
    # Made for decays of about 0.9, and refused by Muon.
    if decay <= 0.9 or (task in AUTOENCODERS and base in {"nesterov", "lion"} and decay <= 0.99):
        table["int4"] = "int4"
    if base == "nesterov" and task in AUTOENCODERS and decay <= 0.99:
        table |= {"two passes": Reference(), "8-bit dynamic": Dynamic()}
    if task == "autoencoder":
        # All its leaves are smaller than what these compress by default.
        whole: dict[str, Kept] = {"int8": mo.storage.int8(min_size=1), "int4": mo.storage.int4(min_size=1)}
        table |= {name: storage for name, storage in whole.items() if name in table}
    return table


def cases(tasks: tuple[str, ...], *, quick: bool = False) -> list[Case]:
    """All rows in order; `quick` has one decay of each optimizer."""
    return [
        Case(task, base, decay, name)
        for task in tasks
        for base in BASES
        for decay in BASES[base].decays.get(task, ())[: 1 if quick else None]
        for name in storages(task, base, decay)
    ]
