"""Bytes that a chip holds and sends, for 1, 10 and 100 billion parameters on 8, 256 and 4096 chips.

    python -m benchmarks.paper_plan            # prints the tables
    python -m benchmarks.paper_plan --write    # writes them into docs/plan.md

Nothing is trained. The parameters are the shapes of a decoder-only transformer; an optimizer's state is what its own
`init` would make of them (`jax.eval_shape`), scales of rows included; what is sent follows from the sizes. What the
model leaves out is said in docs/plan.md. tests/benchmarks/test_paper_plan.py holds both against arrays and compiled
programs of small size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import momentum_optax as mo
from examples import command_line
from examples.demo_distributed import traffic

from . import _page
from ._page import table

PAGE, COMMAND = _page.DOCS / "plan.md", "benchmarks/paper_plan.py --write"
BEGIN, END = _page.begin(COMMAND), _page.END

CHIPS = (8, 256, 4096)
MEMORIES = (16, 80, 141)  # GB of a chip: TPU v5e; A100 or H100; H200
GROUPS = {8: 2, 256: 4, 4096: 8}  # in how many places the chips are, for DiLoCo
EVERY = (20, 500)  # steps between meetings: the README's, and the paper's
BYTES = {"float32": 4, "bfloat16": 2}


class Model(NamedTuple):
    """A decoder-only transformer with tied embeddings: layers, width, vocabulary; the rest follows."""

    layers: int
    width: int
    vocabulary: int = 50_304

    def params(self, dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, layers stacked; 12 x width^2 numbers a layer, and two norms."""
        n, d = self.layers, self.width
        shapes = {
            "attention_in": (n, d, 3 * d),
            "attention_out": (n, d, d),
            "embedding": (self.vocabulary, d),
            "mlp_in": (n, d, 4 * d),
            "mlp_out": (n, 4 * d, d),
            "norms": (n, 2, d),
        }
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in self.params().values())


MODELS = {"1B": Model(18, 2048), "10B": Model(31, 5120), "100B": Model(55, 12_288)}


def adamw(**storages: str) -> Callable[[], optax.GradientTransformation]:
    """AdamW with its moments in storages."""
    return lambda: mo.compress(optax.adamw(1e-3), storages) if storages else optax.adamw(1e-3)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    **{
        f"sgd, {name}": functools.partial(mo.sgd, 0.1, 0.9, storage=name)
        for name in ("float32", "bfloat16", "int8", "int4")
    },
    "adamw": adamw(),
    "adamw, mu int8": adamw(mu="int8"),
    "adamw, mu int8, nu uint8": adamw(mu="int8", nu="uint8"),
}


def size_of(tree: optax.OptState) -> float:
    """Bytes of arrays; two int4 in one, as GPUs and TPUs pack them."""
    four = mo.storage.int4().bytes_per_parameter
    return float(sum(x.size * (four if x.dtype == jnp.int4 else x.dtype.itemsize) for x in jax.tree.leaves(tree)))


def state_bytes(optimizer: str, params: optax.Params) -> float:
    """Bytes of the whole state of an optimizer."""
    return size_of(jax.eval_shape(OPTIMIZERS[optimizer]().init, params))


def outer_bytes(exchange: str, storage: str, params: optax.Params) -> float:
    """Bytes of the whole state of DiLoCo: anchor, velocity and, where the exchange is rounded, the residual."""
    return size_of(jax.eval_shape(mo.outer.diloco(storage=storage, exchange=exchange).init, params))


def held(strategy: str, weights: float, state: float, chips: int) -> tuple[float, float]:
    """Bytes on a chip: of the state, and of weights, gradients (as large) and state."""
    shares = {"replicated": (1, 1), "ZeRO-1": (1, chips), "fully sharded": (chips, chips)}
    of_weights, of_state = shares[strategy]
    return state / of_state, 2 * weights / of_weights + state / of_state


def sent(strategy: str, weights: float, chips: int) -> float:
    """Bytes that a chip sends in a step, by rings; gradients are as large as weights."""
    reduced, gathered, scattered = (
        traffic.sent(traffic.Collective(kind, result), chips)
        for kind, result in (("all-reduce", weights), ("all-gather", weights), ("reduce-scatter", weights / chips))
    )
    # Fully sharded, weights are gathered for the forward pass and again for the backward pass.
    return {"replicated": reduced, "ZeRO-1": scattered + gathered, "fully sharded": 2 * gathered + scattered}[strategy]


def met(exchange: str, params: optax.Params, groups: int) -> float:
    """Bytes that leave a group for a meeting of `groups`; each of its chips sends its share of them."""
    bytes_of = {"exact": traffic.gradient_bytes, "int8": traffic.exchange_bytes}[exchange]
    return bytes_of(params, groups)


def size(number: float) -> str:
    """Bytes with three digits, in units of 10^3, 10^6, 10^9 or 10^12."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= 0.9995 * unit:
            return f"{number / unit:#.3g}".removesuffix(".") + f" {name}"
    return f"{number / 1e3:.3g} k"


def cell(state: float, total: float) -> str:
    """State, total, and the smallest chip that holds the total."""
    fits = next((f"**{memory}**" for memory in MEMORIES if total <= memory * 1e9), "none")
    return f"{size(state)}, {size(total)}, {fits}"


def models_table() -> str:
    """The sizes of the models."""
    rows = []
    for name, model in MODELS.items():
        layer = 12 * model.width**2 * BYTES["float32"]
        rows.append([name, str(model.layers), str(model.width), f"{model.size / 1e9:.3f}", size(layer)])
    return table(["model", "layers", "width", "parameters, 10^9", "a layer's matrices in float32, bytes"], rows)


def memory_table(model: Model, dtype: str) -> str:
    """State, total, and the chip that holds it, for every optimizer, strategy and number of chips."""
    params = model.params(dtype)
    rows = []
    for optimizer in OPTIMIZERS:
        state, weights = state_bytes(optimizer, params), size_of(params)
        cells = [cell(*held("replicated", weights, state, 1))]
        cells += [cell(*held(name, weights, state, n)) for name in ("ZeRO-1", "fully sharded") for n in CHIPS]
        rows.append([optimizer, f"{state / model.size:.3f}", *cells])
    columns = ["replicated", *(f"{name}, {n}" for name in ("ZeRO-1", "fully sharded") for n in CHIPS)]
    return table(["optimizer", "state, bytes per parameter", *columns], rows)


def traffic_table(dtype: str) -> str:
    """Bytes that a chip sends in a step."""
    rows = []
    for name, model in MODELS.items():
        weights = size_of(model.params(dtype))
        for chips in CHIPS:
            cells = [size(sent(strategy, weights, chips)) for strategy in ("replicated", "ZeRO-1", "fully sharded")]
            rows.append([name, str(chips), *cells])
    return table(["model", "chips", "replicated", "ZeRO-1", "fully sharded"], rows)


def outer_table() -> str:
    """Bytes that leave a group in a step, and a chip of it."""
    rows = []
    for name, model in MODELS.items():
        params = model.params()
        for chips, groups in GROUPS.items():
            exact, small = (met(exchange, params, groups) for exchange in ("exact", "int8"))
            each = [exact, *(x / every for every in EVERY for x in (exact, small))]
            cells = [f"{size(x)} / {size(x / (chips // groups))}" for x in each]
            rows.append([name, f"{groups} x {chips // groups}", *cells])
    ways = [f"H = {every}, {exchange}" for every in EVERY for exchange in ("exact", "int8")]
    return table(["model", "groups x chips", "every step, exact", *ways], rows)


def outer_state_table() -> str:
    """Bytes per parameter that DiLoCo adds."""
    params = MODELS["1B"].params()
    rows = [
        [
            storage,
            *(f"{outer_bytes(exchange, storage, params) / MODELS['1B'].size:.3f}" for exchange in ("exact", "int8")),
        ]
        for storage in ("float32", "bfloat16", "int8", "int4")
    ]
    return table(["outer velocity", "exact exchange", "int8 exchange"], rows)


def left_whole(model: Model, chips: int) -> float:
    """The part of the parameters whose state `mo.sharding.zero1` cannot divide along an axis of `chips` chips."""
    whole = sum(x.size for x in model.params().values() if not any(n % chips == 0 for n in x.shape))
    return float(whole / model.size)


def whole_table() -> str:
    """`left_whole` for all."""
    rows = [[name, *(f"{left_whole(model, n):.1%}" for n in CHIPS)] for name, model in MODELS.items()]
    return table(["model", *(f"{n} chips" for n in CHIPS)], rows)


def markdown() -> str:
    """All tables, with headings."""
    parts = ["## The models\n", models_table()]
    for dtype in BYTES:
        parts.append(f"## What a chip holds: weights and gradients in {dtype}\n")
        for name, model in MODELS.items():
            parts += [f"### {name}, {dtype}: state, total, fits into GB\n", memory_table(model, dtype)]
    parts.append("## What a chip sends in a step\n")
    for dtype in BYTES:
        parts += [f"Bytes, weights and gradients in {dtype}:\n", traffic_table(dtype)]
    parts += [
        "## What leaves a group of chips in a step\n",
        "Bytes, of the whole group / of each of its chips:\n",
        outer_table(),
    ]
    parts += [
        "Bytes per parameter that DiLoCo keeps besides, divided among the chips of a group:\n",
        outer_state_table(),
    ]
    parts += ["## What one axis of chips cannot cut\n", whole_table()]
    return "\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    write: bool = False
    """replace the tables of docs/plan.md instead of printing"""


def main() -> None:
    """Print the tables, or write them into the page."""
    options = command_line.parse(Options, "benchmarks.paper_plan", __doc__ or "")
    text = markdown()
    if not options.write:
        print(text, end="")
        return
    _page.write(PAGE, COMMAND, text)


if __name__ == "__main__":
    main()
