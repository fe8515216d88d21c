"""Whether a step graph answers as torch does: shapes, values, and perplexity on held-out text.

The values are compared at rows and lengths that no one chose for the graph, from a state that is not zero; and a text read
at once is compared with the same text read word by word. Differences are measured against the size of what is compared.
A graph that differs raises MismatchError, and export.py then writes nothing. This module does not know how the graph was
made.

Shapes: B rows, T words, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lmdist.data import IGNORED, Streams
from lmdist.errors import DataError
from lmdist.metrics import perplexity
from lmdist.model import LanguageModel
from lmdist_export.sampler import State, StepGraph

TOLERANCE = 1e-4
"""The largest difference allowed, as a part of the largest value compared, or of 1 where all are smaller."""
SHAPES = ((1, 1), (1, 7), (3, 20), (5, 1))
HELD_OUT_ROWS = 16
HELD_OUT_WORDS = 10_000
LOGITS_AT_ONCE = 2**23  # numbers in the logits of one piece of held-out text: 32 MiB


class MismatchError(RuntimeError):
    """The graph does not answer as torch does: a defect in lmdist, or in onnxruntime on this machine."""


def check_values(graph: StepGraph, model: LanguageModel) -> dict[str, float]:
    """The largest differences of logits and states from torch, and of step by step from prefill."""
    random = np.random.default_rng(0)
    largest = {"logits": 0.0, "next_h": 0.0, "next_c": 0.0, "step_by_step": 0.0}
    for rows, length in SHAPES:
        tokens = random.integers(0, model.vocabulary_size, (rows, length))
        h = random.uniform(-1, 1, (rows, sum(model.layer_sizes))).astype(np.float32)
        state = h, 2 * h[::-1]  # a cell is not bound by 1 as h is
        logits, after = graph.step(tokens, state)
        expected_logits, expected_after = torch_step(model, tokens, state)
        if not np.isfinite(expected_logits).all():
            raise DataError("the logits of the model are not finite, so its weights are of no trained model")
        pairs = {
            "logits": (logits, expected_logits),
            "next_h": (after[0], expected_after[0]),
            "next_c": (after[1], expected_after[1]),
        }
        if length > 1:
            pairs["step_by_step"] = word_by_word(graph, tokens, state), logits
        for name, (found, expected) in pairs.items():
            where = f"{name} for {rows} rows of {length} words"
            largest[name] = max(largest[name], difference(where, found, expected))
    return largest


def check_perplexity(graph: StepGraph, model: LanguageModel, split: str, tokens: NDArray[np.integer]) -> dict[str, Any]:
    """Perplexity by torch and by onnxruntime of the first words of `tokens`, read as a few streams side by side."""
    tokens = tokens[:HELD_OUT_WORDS]
    rows = min(HELD_OUT_ROWS, len(tokens))
    window = max(1, min(64, LOGITS_AT_ONCE // (rows * model.vocabulary_size)))
    zeros = np.zeros((rows, sum(model.layer_sizes)), np.float32)
    ours, theirs = (zeros, zeros), (zeros, zeros)
    our_nats = their_nats = 0.0
    for inputs, targets in pieces(tokens, rows, window):
        logits, ours = graph.step(inputs, ours)
        our_nats += summed_nats(logits, targets)
        logits, theirs = torch_step(model, inputs, theirs)
        their_nats += summed_nats(logits, targets)
    found, expected = perplexity(our_nats / len(tokens)), perplexity(their_nats / len(tokens))
    difference("perplexity on held-out text", np.array([found]), np.array([expected]))
    return {"split": split, "tokens": len(tokens), "torch": expected, "onnxruntime": found}


def pieces(tokens: NDArray[np.integer], rows: int, window: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Inputs and targets, (B, T) each, of `tokens` cut into `rows` streams, as in training."""
    streams = Streams(tokens, rows, window)
    for step in range(streams.steps_per_epoch):
        batch = streams.batch(step, slice(0, rows))
        yield batch.inputs.numpy(), batch.targets.numpy()


def torch_step(model: LanguageModel, tokens: NDArray[np.int64], state: State) -> tuple[NDArray[np.float32], State]:
    """What `StepGraph.step` gives, by torch."""
    with torch.inference_mode():
        h, c = (torch.from_numpy(np.ascontiguousarray(part)) for part in state)
        hidden, (h, c) = model(torch.from_numpy(tokens), (h, c))  # (B, T, H)
        return model.logits(hidden).numpy(), (h.numpy(), c.numpy())


def word_by_word(graph: StepGraph, tokens: NDArray[np.int64], state: State) -> NDArray[np.float32]:
    """The logits (B, T, V) of `tokens` (B, T), read one word at a time."""
    steps = []
    for place in range(tokens.shape[1]):
        logits, state = graph.step(tokens[:, place : place + 1], state)  # (B, 1, V)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def summed_nats(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Negative log-probability of `targets` (B, T), holes left out, by `logits` (B, T, V)."""
    rows = torch.from_numpy(logits).flatten(0, 1)  # (B*T, V)
    columns = torch.from_numpy(targets).flatten()  # (B*T)
    return functional.cross_entropy(rows, columns, ignore_index=IGNORED, reduction="sum").item()


def difference(what: str, found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """The largest difference, against the size of the values; raises MismatchError beyond the tolerance."""
    if found.shape != expected.shape:
        raise MismatchError(f"{what}: the shape is {found.shape} by onnxruntime and {expected.shape} by torch")
    largest = float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not largest <= TOLERANCE:  # not `>`: a difference that is no number must not pass
        raise MismatchError(f"{what}: the largest difference from torch is {largest:.2g}; allowed is {TOLERANCE:.2g}")
    return largest
