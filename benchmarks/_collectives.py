"""What a compiled program sends between devices: its collectives, and the bytes of their results on one device."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\((.*)")
_ARRAY = re.compile(r"(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\]")


class Sent(NamedTuple):
    """The number of collectives by kind, and the bytes of what one device receives."""

    kinds: dict[str, int]
    bytes: int


def sent(program: Any) -> Sent:
    """Count the collectives of a compiled program; a loop counts once."""
    kinds: Counter[str] = Counter()
    total = 0
    for result, kind, start, _ in _COLLECTIVE.findall(program.as_text()):
        sizes = [_size(*array) for array in _ARRAY.findall(result)]
        # The start of an asynchronous gather or permutation has its operand among its results.
        if start and kind in ("all-gather", "collective-permute"):
            sizes = sizes[len(sizes) // 2 :]
        kinds[kind] += 1
        total += sum(sizes)
    return Sent(dict(kinds), total)


def _size(dtype: str, dims: str) -> int:
    """Bytes of an array."""
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
