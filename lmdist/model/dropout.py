"""Dropout as in AWD-LSTM: where it acts, with which probability, and the masks of a step.

The places are those of Merity et al. 2018 (arXiv:1708.02182). A mask over vectors is locked: one for all tokens of a sequence
(Gal and Ghahramani 2016, arXiv:1512.05287). Masks are drawn on the CPU outside the model, each for the rows of the whole
global batch, of which a rank takes its own. So they are a pure function of (seed, step, row), the same on any number of ranks,
in any number of parts and on any device, and the LSTM layers remain single calls of oneDNN or cuDNN. A model that is given no
masks drops nothing.

Shapes: G global batch size, B batch size, T tokens, V vocabulary, H hidden size, M the sum of the sizes of the masked vectors,
N the sum of the sizes of the masked matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmdist.settings import ModelSettings

LEVELS = 1 << 16
"""A mask is drawn from 16 bits a number, so probabilities are multiples of 1 / LEVELS; the scale is exact for them."""


class Masks(NamedTuple):
    """What dropout keeps in a step: 1 is kept, 0 is dropped, as uint8. What is never dropped takes no space."""

    rows: Tensor
    """Of each sequence, the inputs of each layer and the outputs of the last one, side by side, (B, M)."""
    words: Tensor
    """Of the vocabulary, (V) or (0)."""
    weights: Tensor
    """The recurrent weights of each layer, one after another, (N)."""

    def to(self, device: torch.device) -> Masks:
        """Return the masks on a device; copies to a GPU run while it still computes the previous batch."""
        if device.type == "cpu":
            return self
        return Masks(*(mask.pin_memory().to(device, non_blocking=True) for mask in self))


class Dropout:
    """Where a model has dropout, with which probability; its masks, and their application."""

    def __init__(self, settings: ModelSettings, vocabulary_size: int, matrices: Sequence[torch.Size]) -> None:
        """`matrices` are the shapes of the layers' recurrent weights."""
        self.row_rates = [rounded(rate) for rate in settings.vector_dropouts]
        self.row_sizes = [
            size if rate else 0
            for size, rate in zip([settings.embedding_size, *settings.layer_sizes], self.row_rates, strict=True)
        ]
        self.word_rate = rounded(settings.dropout_embedding)
        self.num_words = vocabulary_size if self.word_rate else 0
        self.weight_rate = rounded(settings.weight_dropout)
        self.weight_sizes = [shape.numel() if self.weight_rate else 0 for shape in matrices]

    def draw(self, seed: int, step: int, global_batch: int, part: slice) -> Masks:
        """Return the masks of step number `step` for the sequences `part` of the global batch."""
        random = np.random.SFC64(np.random.SeedSequence(seed % (1 << 64), spawn_key=(step,)))
        rows = [
            keep(random, (global_batch, size), rate)[part] for size, rate in zip(self.row_sizes, self.row_rates, strict=True)
        ]
        words = keep(random, (self.num_words,), self.word_rate)
        weights = keep(random, (sum(self.weight_sizes),), self.weight_rate)
        return Masks(torch.cat(rows, dim=1), words, weights)

    def drop_words(self, vectors: Tensor, tokens: Tensor, masks: Masks | None) -> Tensor:
        """Drop the vectors (B, T, E) of some words, wherever they occur among the tokens (B, T)."""
        if masks is None or not self.word_rate:
            return vectors
        return drop(vectors, masks.words[tokens].unsqueeze(2), self.word_rate)

    def drop_vectors(self, vectors: Tensor, place: int, masks: Masks | None) -> Tensor:
        """Drop numbers of the inputs (B, T, I) of layer `place`, or of the last layer's outputs, place -1."""
        if masks is None or not self.row_rates[place]:
            return vectors
        return drop(vectors, masks.rows.split(self.row_sizes, dim=1)[place].unsqueeze(1), self.row_rates[place])

    def drop_weights(self, matrix: Tensor, layer: int, masks: Masks | None) -> Tensor:
        """Drop numbers of the recurrent weights of a layer, for all sequences and tokens of a step the same."""
        if masks is None or not self.weight_rate:
            return matrix
        return drop(matrix, masks.weights.split(self.weight_sizes)[layer].view_as(matrix), self.weight_rate)


def rounded(rate: float) -> float:
    """Return the multiple of 1 / LEVELS next to a probability, below 1."""
    return min(round(rate * LEVELS), LEVELS - 1) / LEVELS


def keep(random: np.random.SFC64, shape: tuple[int, ...], rate: float) -> Tensor:
    """Return a random mask as uint8, each number 0 with probability `rate` and else 1."""
    size = math.prod(shape)
    bits = random.random_raw(-(-size // 4)).view(np.uint16)[:size]
    return torch.from_numpy((bits >= round(rate * LEVELS)).view(np.uint8)).view(shape)


def drop(values: Tensor, kept: Tensor, rate: float) -> Tensor:
    """Return the values where `kept` is 1, scaled so that their expected sum stays the same, and 0 elsewhere."""
    # In two products: a scale rounded to bf16 would be off by up to 0.4 % for all values alike.
    return (values * kept.to(values.dtype)).mul_(1 / (1 - rate))
