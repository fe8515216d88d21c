"""Compare a bundle with torch: shapes, values, and perplexity on held-out text.

Values are compared for several batch sizes and lengths, from a state that is not zero; and a text read at once is compared with
the same text read token by token. Errors are relative to the largest value compared. A graph that differs raises MismatchError,
and nothing is exported. Quantized weights differ by nature: for them the perplexity decides. This module does not know how the
graph was built.

Shapes: B batch, T tokens, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lmdist.counted import counted
from lmdist.errors import DataError, UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import IGNORED
from lmdist.perplexity import TextSize, per_word_and_byte, perplexity
from lmdist.text.token_files import Tokens
from lmdist.training.data import Streams
from lmdist_export.graph.cell import STATE
from lmdist_export.sampling.sampler import LOGITS_AT_ONCE, Sampler
from lmdist_export.sampling.state import ModelState

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""The max error allowed, relative to the largest value compared, or to 1 if all are smaller."""
MAX_LOSS_PERCENT = {"int8": 1.0, "int4": 3.0}
"""By how many percent a precision may increase the perplexity, by default."""
SHAPES = ((1, 1), (1, 7), (3, 20), (5, 1))
HELD_OUT_STREAMS = 16
HELD_OUT_TOKENS = 10_000


class MismatchError(RuntimeError):
    """The graph differs from torch: a defect in lmdist, or in onnxruntime on this machine."""


def check_values(sampler: Sampler, model: LanguageModel) -> dict[str, float]:
    """Return the max errors of logits and states against torch, and of reading token by token against reading at once."""
    random = np.random.default_rng(0)
    tolerance = TOLERANCES.get(sampler.sizes.precision, math.inf)
    next_state = [f"next_{name}" for name in STATE]
    largest = dict.fromkeys(["logits", *next_state, "step_by_step"], 0.0)
    for rows, length in SHAPES:
        tokens = random.integers(0, model.vocabulary_size, (rows, length))
        state = random_state(random, rows, sum(model.layer_sizes))
        expected_logits, expected_after = torch_step(model, tokens, state)
        if not np.isfinite(expected_logits).all():
            raise DataError("the logits of the model are not finite, so these are not the weights of a trained model")
        logits, after = sampler.step(tokens, state)
        pairs = {"logits": (logits, expected_logits, tolerance)}
        for name, found, expected in zip(next_state, after, expected_after, strict=True):
            pairs[name] = found, expected, tolerance
        if length > 1:
            pairs["step_by_step"] = token_by_token(sampler, tokens, state), logits, TOLERANCES["fp32"]
        for name, (found, expected, allowed) in pairs.items():
            where = f"{name} for {counted(rows, 'row')} of {counted(length, 'token')}"
            largest[name] = max(largest[name], max_error(where, found, expected, allowed))
    return largest


def check_perplexity(
    sampler: Sampler,
    model: LanguageModel,
    split: str,
    tokens: Tokens | NDArray[np.integer],
    max_loss_percent: float,
    size: TextSize | None = None,
) -> dict[str, Any]:
    """Return what the precision costs on the first of `tokens`, read as a few streams side by side.

    That is the perplexity by torch and by onnxruntime and the increase in percent; how often both have the same most likely
    token; and the max absolute error of a logit. Perplexity per word and bits per byte are those that onnxruntime's perplexity
    means where the original text has the `size` of the entire split for as many tokens. Raises UsageError for an increase above
    `max_loss_percent`.
    """
    num_tokens, tokens = len(tokens), tokens[:HELD_OUT_TOKENS]
    rows = min(HELD_OUT_STREAMS, len(tokens))
    window = max(1, min(64, LOGITS_AT_ONCE // (rows * model.vocabulary_size)))
    ours = theirs = sampler.initial_state(rows)
    our_nats = their_nats = largest = 0.0
    agreed = 0
    for inputs, targets in stream_batches(tokens, rows, window):
        found, ours = sampler.step(inputs, ours)
        our_nats += summed_nats(found, targets)
        expected, theirs = torch_step(model, inputs, theirs)
        their_nats += summed_nats(expected, targets)
        mask = targets != IGNORED
        agreed += int((found.argmax(axis=2) == expected.argmax(axis=2))[mask].sum())
        largest = max(largest, float(np.abs(found - expected)[mask].max()))
    by_us, by_torch = perplexity(our_nats / len(tokens)), perplexity(their_nats / len(tokens))
    if not math.isfinite(by_torch):
        raise DataError(
            f"the perplexity of the model on the {split} split is not finite: its weights are too large for a trained model"
        )
    precision = sampler.sizes.precision
    tolerance = TOLERANCES.get(precision, math.inf)
    max_error("perplexity on held-out text", np.array([by_us]), np.array([by_torch]), tolerance)
    loss = 100 * (by_us / by_torch - 1)
    if precision in MAX_LOSS_PERCENT and not loss <= max_loss_percent:
        raise UsageError(
            f"precision {precision} costs {loss:.2f} % of perplexity on held-out text ({by_torch:,.2f} becomes {by_us:,.2f}); "
            f"allowed is {max_loss_percent:g} %. Use --precision fp16, or allow it by --max-perplexity-loss {math.ceil(loss)}"
        )
    return {
        "split": split,
        "tokens": len(tokens),
        "torch": by_torch,
        "onnxruntime": by_us,
        **per_word_and_byte(our_nats / len(tokens) * num_tokens, size),
        "loss_percent": loss,
        "top_1_agreement": agreed / len(tokens),
        "largest_logit_difference": largest,
    }


def stream_batches(
    tokens: NDArray[np.integer], rows: int, window: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield inputs and targets, (B, T) each, of `tokens` cut into `rows` streams, as in training."""
    streams = Streams(tokens, rows, window)
    for step in range(streams.steps_per_epoch):
        batch = streams.batch(step, slice(0, rows))
        yield batch.inputs.numpy(), batch.targets.numpy()


def random_state(random: np.random.Generator, batch: int, size: int) -> ModelState:
    """Return a state, (batch, size) each part: the layers' output is bounded by 1, the other parts are not."""
    output = random.uniform(-1, 1, (batch, size)).astype(np.float32)
    return output, *(2 * output[::-1] for _ in STATE[1:])


def torch_step(model: LanguageModel, tokens: NDArray[np.int64], state: ModelState) -> tuple[NDArray[np.float32], ModelState]:
    """Return what `Sampler.step` does, by torch."""
    with torch.inference_mode():
        before = tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in state)
        hidden, after = model(torch.from_numpy(tokens), before)  # (B, T, H)
        return model.logits(hidden).numpy(), tuple(part.numpy() for part in after)


def token_by_token(sampler: Sampler, tokens: NDArray[np.int64], state: ModelState) -> NDArray[np.float32]:
    """Return the logits (B, T, V) of `tokens` (B, T), read one at a time."""
    steps = []
    for place in range(tokens.shape[1]):
        logits, state = sampler.step(tokens[:, place : place + 1], state)  # (B, 1, V)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def summed_nats(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Return the summed negative log-likelihood of `targets` (B, T) by `logits` (B, T, V), the padding aside."""
    rows = torch.from_numpy(logits).flatten(0, 1)  # (B*T, V)
    columns = torch.from_numpy(targets).flatten()  # (B*T)
    return functional.cross_entropy(rows, columns, ignore_index=IGNORED, reduction="sum").item()


def max_error(what: str, found: NDArray[np.floating], expected: NDArray[np.floating], tolerance: float) -> float:
    """Return the max error, relative to the largest value; raises MismatchError beyond the tolerance."""
    if found.shape != expected.shape:
        raise MismatchError(f"{what}: the shape is {found.shape} by onnxruntime and {expected.shape} by torch")
    largest = float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not largest <= tolerance:  # not `>`: NaN must not pass
        raise MismatchError(f"{what}: the max error against torch is {largest:.2g}; allowed is {tolerance:.2g}")
    return largest
