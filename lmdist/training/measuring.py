"""The nats of a text by a model, read as streams that the ranks share out, and by the unigram model of another text.

Training validates by it, and lmdist-evaluate measures. This module knows no files and no checkpoints.

Shapes: V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import IGNORED, summed_nats
from lmdist.signals import StopRequest
from lmdist.text.token_files import Tokens
from lmdist.training.data import Streams
from lmdist.training.distributed import World
from lmdist.training.metrics import NatsTotal

COUNTED_AT_ONCE = 1 << 20
"""Tokens: a training text may be larger than the memory."""


@torch.no_grad()
def evaluate(
    model: LanguageModel, tokens: Tokens | np.ndarray, streams: int, window: int, world: World, stop: StopRequest | None = None
) -> NatsTotal:
    """Return the summed nats of `tokens`, read as `streams` streams divided over the ranks; a `stop` request cuts it short."""
    was_training = model.training
    model.eval()
    nats = NatsTotal(world)
    # A rank reads entire streams. If the ranks do not divide their number, some read one more; no rank waits for another.
    part = slice(world.rank * streams // world.size, (world.rank + 1) * streams // world.size)
    batches = Streams(tokens, streams, window)
    state = model.initial_state(part.stop - part.start)
    for step in range(batches.steps_per_epoch if part.stop > part.start else 0):
        if stop and stop.requested:
            break
        batch = batches.batch(step, part)
        inputs, targets = batch.tensors_on(world.device)
        hidden, state = model(inputs, state)
        nats.add(summed_nats(hidden, model.projection, targets), int((batch.targets != IGNORED).sum()))
    model.train(was_training)
    return nats


def unigram_nats(train: Tokens | np.ndarray, tokens: Tokens | np.ndarray, vocabulary_size: int) -> float:
    """Return nats per token of the unigram model of `train`, with add-one smoothing."""
    counts = counts_of(train, vocabulary_size) + 1
    nats = -np.log(counts / counts.sum())
    return float(nats @ counts_of(tokens, vocabulary_size) / len(tokens))


def counts_of(tokens: Tokens | np.ndarray, vocabulary_size: int) -> np.ndarray:
    """Return how often each token of the vocabulary occurs, (V) int64."""
    counts = np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocabulary_size)
    return counts
