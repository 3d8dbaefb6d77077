"""Optimized programs of XLA as text: their operations, and how many of them run."""

import re
from typing import NamedTuple

import jax


class Instruction(NamedTuple):
    """A line of an optimized program."""

    name: str
    kind: str
    op: str
    operands: list[str]
    called: str


_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
# These name or regroup buffers; nothing runs.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id"}


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of an optimized program, and the name of its entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = header.group(2)
            entry = current if header.group(1) else entry
            computations[current] = []
        elif current and (found := _LINE.match(line)):
            name, kind, op, rest = found.groups()
            called = re.search(r"calls=%?([\w.\-]+)", rest)
            operands = [rest] if op == "parameter" else re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            computations[current].append(Instruction(name, kind, op, operands, called.group(1) if called else ""))
    return computations, entry


def kernels_of(program: jax.stages.Compiled) -> int:
    """The operations of the entry of a compiled program; asynchronous ones count once."""
    computations, entry = parse(program.as_text() or "")
    return sum(runs(instruction) for instruction in computations[entry])


def runs(instruction: Instruction) -> bool:
    """Whether an operation of an entry runs: it is none that names or regroups buffers, or waits for another one."""
    return instruction.op not in _FREE and not instruction.op.endswith("-done")
