"""Whether a bundle answers as torch does: shapes, values, and perplexity on held-out text.

The values are compared at rows and lengths that no one chose for the graph, from a state that is not zero; and a text read
at once is compared with the same text read word by word. Differences are measured against the size of what is compared.
A graph that differs raises MismatchError, and export.py then writes nothing. Weights of 8 and 4 bits differ by what they are:
there the perplexity decides. This module does not know how the graph was made.

Shapes: B rows, T words, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lmdist.errors import DataError, UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import IGNORED
from lmdist.perplexity import perplexity
from lmdist.training.data import Streams
from lmdist_export.sampling.sampler import LOGITS_AT_ONCE, Sampler
from lmdist_export.sampling.state import ModelState

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""The largest difference allowed, as a part of the largest value compared, or of 1 where all are smaller."""
MOST_LOSS = {"int8": 1.0, "int4": 3.0}
"""The percent of perplexity that a precision may cost where nobody says more."""
SHAPES = ((1, 1), (1, 7), (3, 20), (5, 1))
HELD_OUT_ROWS = 16
HELD_OUT_WORDS = 10_000


class MismatchError(RuntimeError):
    """The graph does not answer as torch does: a defect in lmdist, or in onnxruntime on this machine."""


def check_values(graph: Sampler, model: LanguageModel) -> dict[str, float]:
    """The largest differences of logits and states from torch, and of step by step from prefill."""
    random = np.random.default_rng(0)
    tolerance = TOLERANCES.get(graph.sizes.precision, math.inf)
    largest = {"logits": 0.0, "next_h": 0.0, "next_c": 0.0, "step_by_step": 0.0}
    for rows, length in SHAPES:
        tokens = random.integers(0, model.vocabulary_size, (rows, length))
        h = random.uniform(-1, 1, (rows, sum(model.layer_sizes))).astype(np.float32)
        state = h, 2 * h[::-1]  # a cell is not bound by 1 as h is
        expected_logits, expected_after = torch_step(model, tokens, state)
        if not np.isfinite(expected_logits).all():
            raise DataError("the logits of the model are not finite, so its weights are of no trained model")
        logits, after = graph.step(tokens, state)
        pairs = {
            "logits": (logits, expected_logits, tolerance),
            "next_h": (after[0], expected_after[0], tolerance),
            "next_c": (after[1], expected_after[1], tolerance),
        }
        if length > 1:
            pairs["step_by_step"] = word_by_word(graph, tokens, state), logits, TOLERANCES["fp32"]
        for name, (found, expected, allowed) in pairs.items():
            where = f"{name} for {rows} rows of {length} words"
            largest[name] = max(largest[name], difference(where, found, expected, allowed))
    return largest


def check_perplexity(
    graph: Sampler, model: LanguageModel, split: str, tokens: NDArray[np.integer], most_loss: float
) -> dict[str, Any]:
    """What the precision costs on the first words of `tokens`, read as a few streams side by side.

    Perplexity by torch and by onnxruntime and the percent lost, which may be `most_loss`; how often both find the same word
    likeliest; and the largest difference of a logit. Raises UsageError where more is lost.
    """
    tokens = tokens[:HELD_OUT_WORDS]
    rows = min(HELD_OUT_ROWS, len(tokens))
    window = max(1, min(64, LOGITS_AT_ONCE // (rows * model.vocabulary_size)))
    ours = theirs = graph.initial_state(rows)
    our_nats = their_nats = largest = 0.0
    agreed = 0
    for inputs, targets in pieces(tokens, rows, window):
        found, ours = graph.step(inputs, ours)
        our_nats += summed_nats(found, targets)
        expected, theirs = torch_step(model, inputs, theirs)
        their_nats += summed_nats(expected, targets)
        there = targets != IGNORED
        agreed += int((found.argmax(axis=2) == expected.argmax(axis=2))[there].sum())
        largest = max(largest, float(np.abs(found - expected)[there].max()))
    by_us, by_torch = perplexity(our_nats / len(tokens)), perplexity(their_nats / len(tokens))
    precision = graph.sizes.precision
    tolerance = TOLERANCES.get(precision, math.inf)
    difference("perplexity on held-out text", np.array([by_us]), np.array([by_torch]), tolerance)
    loss = 100 * (by_us / by_torch - 1)
    if precision in MOST_LOSS and not loss <= most_loss:
        raise UsageError(
            f"precision {precision} costs {loss:.2f} % of perplexity on held-out text ({by_torch:,.2f} becomes {by_us:,.2f}); "
            f"allowed is {most_loss:g} %. Take --precision fp16, or allow it by --max-perplexity-loss {math.ceil(loss)}"
        )
    return {
        "split": split,
        "tokens": len(tokens),
        "torch": by_torch,
        "onnxruntime": by_us,
        "loss_percent": loss,
        "top_1_agreement": agreed / len(tokens),
        "largest_logit_difference": largest,
    }


def pieces(tokens: NDArray[np.integer], rows: int, window: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Inputs and targets, (B, T) each, of `tokens` cut into `rows` streams, as in training."""
    streams = Streams(tokens, rows, window)
    for step in range(streams.steps_per_epoch):
        batch = streams.batch(step, slice(0, rows))
        yield batch.inputs.numpy(), batch.targets.numpy()


def torch_step(model: LanguageModel, tokens: NDArray[np.int64], state: ModelState) -> tuple[NDArray[np.float32], ModelState]:
    """What `Sampler.step` gives, by torch."""
    with torch.inference_mode():
        h, c = (torch.from_numpy(np.ascontiguousarray(part)) for part in state)
        hidden, (h, c) = model(torch.from_numpy(tokens), (h, c))  # (B, T, H)
        return model.logits(hidden).numpy(), (h.numpy(), c.numpy())


def word_by_word(graph: Sampler, tokens: NDArray[np.int64], state: ModelState) -> NDArray[np.float32]:
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


def difference(what: str, found: NDArray[np.floating], expected: NDArray[np.floating], tolerance: float) -> float:
    """The largest difference, against the size of the values; raises MismatchError beyond the tolerance."""
    if found.shape != expected.shape:
        raise MismatchError(f"{what}: the shape is {found.shape} by onnxruntime and {expected.shape} by torch")
    largest = float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not largest <= tolerance:  # not `>`: a difference that is no number must not pass
        raise MismatchError(f"{what}: the largest difference from torch is {largest:.2g}; allowed is {tolerance:.2g}")
    return largest
