"""Sizes of the language model."""

import dataclasses

from .data import VOCABULARY


@dataclasses.dataclass(frozen=True)
class Config:
    """The size of a model.

    Attributes:
      vocabulary: Number of tokens.
      width: Features of a token, a multiple of `heads`.
      layers: Blocks of attention and a hidden layer of four times the width.
      heads: Of the attention.
      length: The most tokens that the model sees.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, {self.heads}, got {self.width}")


CONFIGS = {
    # 0.1 million parameters, for tests and sweeps.
    "tiny": Config(VOCABULARY, width=64, layers=2, heads=2, length=64),
    # 0.8 million.
    "small": Config(VOCABULARY, width=128, layers=4, heads=4, length=128),
    # 124 million, the smallest model of Radford et al., "Language models are unsupervised multitask learners", 2019.
    "gpt2-small": Config(50257, width=768, layers=12, heads=12, length=1024),
}
