"""Bytes that collectives send: from the compiled program, from the arrays, and as the kernel counts them."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import optax

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)}|collective-\w+)(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective of a compiled program: its kind in XLA's words, and the bytes of its result on one device."""

    kind: str
    result: float


def collectives(program: str) -> list[Collective]:
    """The collectives in the text of an optimized program, each as often as it is written: loops are not unrolled.

    Raises:
      ValueError: If one is asynchronous, whose result holds its operand too, or of a type of unknown width.
    """
    found = []
    for result, kind, start in _OPERATION.findall(program):
        if start:
            raise ValueError(f"collectives must be synchronous to be counted, got {kind}{start}")
        found.append(Collective(kind, sum(_bytes(*array) for array in _ARRAY.findall(result))))
    return found


def sent(collective: Collective, devices: int) -> float:
    r"""Bytes that a device sends, of n devices in a ring, which is the least possible.

    An all-reduce of S bytes takes $2 S (n - 1) / n$: a reduce-scatter and an all-gather of half as many each.

    Raises:
      ValueError: If what is sent depends on more than the result, as for a permutation.

    Reference:
      Thakur et al., International Journal of High Performance Computing Applications 2005; in the notation of training:
      Rajbhandari et al., SC 2020, arXiv:1910.02054, section 7.
    """
    factors = {
        "all-reduce": 2 * (devices - 1) / devices,
        "all-gather": (devices - 1) / devices,
        "reduce-scatter": devices - 1.0,
    }
    if collective.kind not in factors:
        raise ValueError(f"kind must be one of {', '.join(map(repr, factors))}, got {collective.kind!r}")
    return factors[collective.kind] * collective.result


def gradient_bytes(params: optax.Params, devices: int) -> float:
    """Bytes that a device sends to average gradients like `params` over `devices`."""
    return sum(sent(Collective("all-reduce", x.size * x.dtype.itemsize), devices) for x in jax.tree.leaves(params))


def exchange_bytes(params: optax.Params, devices: int) -> float:
    """Bytes that a worker sends in an int8 exchange: a byte for each parameter and a float32 for each row."""
    own = sum(x.size + 4 * (x.shape[0] if x.ndim > 1 else 1) for x in jax.tree.leaves(params))
    return sent(Collective("all-gather", devices * own), devices)


def written_by_this_process() -> float:
    """Bytes that this process has given to the kernel in writes, among them those of gloo; NaN where nobody counts."""
    path = Path("/proc/self/io")
    if not path.exists():
        return math.nan
    return float(dict(line.split(": ") for line in path.read_text().splitlines())["wchar"])


def _bytes(kind: str, dims: str) -> int:
    if kind not in _WIDTHS:
        raise ValueError(f"types must be one of {', '.join(_WIDTHS)}, got {kind}")
    return _WIDTHS[kind] * math.prod(int(n) for n in dims.split(",") if n)
