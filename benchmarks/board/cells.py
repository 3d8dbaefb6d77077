"""The cells of the board: a base, a memory behind it, and a storage of the base's momentum."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import optax

import momentum_optax as mo
from examples.lm.model import matrices

from .._language import Reader, Setting, schedule

# Learning rates to try, over the centre of the base.
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
# Half-life of every memory, and period of those that have one, as a share of the run; and a longer one for comparison.
HALF_LIFE, LONGER = 0.02, 0.05
SLOW = ("primal averaging, 5 %", "EMA-Nesterov, 5 %")

Transformation: TypeAlias = optax.GradientTransformation


class Base(NamedTuple):
    """An optimizer, compared with itself.

    Attributes:
      centre: The learning rate that `FACTORS` multiply.
      make: The optimizer for a schedule of the learning rate, a storage and a setting.
      storages: What else than float32 its momentum is kept in.
      decays: Whether the learning rate falls to zero, as a cosine, or stays after its warm-up.
    """

    centre: float
    make: Callable[[optax.Schedule, str, Setting], Transformation]
    storages: tuple[str, ...] = ()
    decays: bool = True


def adamw(rate: optax.Schedule, storage: str, setting: Setting) -> Transformation:
    """AdamW with a second moment for short runs; "int8, uint8" keeps that one in a byte too."""
    del setting
    tx = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
    fields = dict(zip(("mu", "nu"), storage.split(", "), strict=False))
    return tx if storage == "float32" else mo.compress(tx, fields)


def muon(rate: optax.Schedule, storage: str, setting: Setting) -> Transformation:
    """Muon for the kernels of the blocks, scaled so that AdamW, for the other parameters, takes the same rate."""
    return mo.muon(
        rate,
        weight_dimension_numbers=matrices(setting.config),
        scale="rms",
        weight_decay=0.1,
        others=adamw(rate, "float32", setting),
        storage=storage,
    )


def sgd(rate: optax.Schedule, storage: str, setting: Setting) -> Transformation:
    """SGD with Nesterov's momentum."""
    del setting
    return mo.sgd(rate, 0.9, nesterov=True, storage=storage)


def lion(rate: optax.Schedule, storage: str, setting: Setting) -> Transformation:
    """Lion with its paper's decays for language models."""
    del setting
    return mo.lion(rate, 0.95, 0.98, weight_decay=1.0, storage=storage)


BASES = {
    "AdamW": Base(4e-3, adamw, ("bfloat16", "int8", "int8, uint8")),
    "Muon": Base(8e-3, muon, ("bfloat16", "int8")),
    "SGD": Base(0.4, sgd, ("bfloat16", "int8")),
    "Lion": Base(8e-4, lion, ("bfloat16", "int8")),
    "AdamW, constant rate": Base(4e-3, adamw, decays=False),
}


class Memory(NamedTuple):
    """What is put around a base.

    Attributes:
      around: The optimizer with the memory.
      read: The point to evaluate.
    """

    around: Callable[[Transformation], Transformation]
    read: Reader


def memories(steps: int) -> dict[str, Memory]:
    """All of them by name, for runs of so many steps."""
    decay, slow = (float(mo.tuning.decay_from_half_life(share * steps)) for share in (HALF_LIFE, LONGER))
    period = max(1, round(HALF_LIFE * steps))

    def behind(rule: mo.Filter) -> Memory:
        return Memory(
            lambda tx: mo.with_momentum(tx, rule),
            # Nesterov's own look-ahead, of SGD, is in the state too.
            lambda state, params: mo.eval_params(state, params, path="momentum"),
        )

    return {
        "none": Memory(lambda tx: tx, lambda state, params: params),
        "primal averaging": behind(mo.primal_averaging(decay, 0.7)),
        "EMA-Nesterov": behind(mo.ema_nesterov(decay, 0.6)),
        "outer Nesterov": behind(mo.outer_nesterov(period, 0.68, 0.37)),
        "Lookahead": behind(mo.lookahead(period, 0.5)),
        "average": Memory(lambda tx: optax.chain(tx, mo.average_params(decay)), mo.averaged_params),
        SLOW[0]: behind(mo.primal_averaging(slow, 0.7)),
        SLOW[1]: behind(mo.ema_nesterov(slow, 0.6)),
    }


class Cell(NamedTuple):
    """A line of the board; the names are those of `BASES`, `memories` and the base's storages."""

    base: str
    memory: str
    storage: str

    @property
    def rates(self) -> list[float]:
        """The learning rates to try."""
        return [BASES[self.base].centre * factor for factor in FACTORS]

    @property
    def reference(self) -> "Cell":
        """What it is compared with: the base without memory, in float32."""
        return Cell(self.base, "none", "float32")

    def optimizer(self, rate: jax.Array | float, setting: Setting) -> tuple[Transformation, Reader]:
        """The optimizer with this peak of the learning rate, and the point to evaluate."""
        base, memory = BASES[self.base], memories(setting.steps)[self.memory]
        tx = base.make(schedule(rate, setting.steps, base.decays), self.storage, setting)
        return memory.around(tx), memory.read


def cells() -> list[Cell]:
    """All in the order in which they are run: bases alone, base by base memories and storages, and what is slow."""
    references = [Cell(name, "none", "float32") for name in BASES]
    quick = [memory for memory in memories(1) if memory not in ("none", *SLOW)]
    others = []
    for name, base in BASES.items():
        others += [Cell(name, memory, "float32") for memory in quick]
        others += [Cell(name, "none", storage) for storage in base.storages]
    return references + others + [Cell(name, memory, "float32") for name in BASES for memory in SLOW]
