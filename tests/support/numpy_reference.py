"""The language model and its sampling in plain NumPy and fp64, written from the formulas: it shares no code with lmdist.

    reference = Reference(Path("runs/a/checkpoints/step-000000007"))
    reference.nats(tokens)                                      # (N,): -log p of each token
    distribution(reference.logits(tokens)[-1], temperature=0.7, top_p=0.9)      # (V,): of the token after them

A checkpoint's files are read here byte by byte. LSTM: Hochreiter and Schmidhuber 1997 with forget gates, as in torch's
documentation of nn.LSTM; adaptive softmax: Grave et al. 2017 (arXiv:1609.04309); the options: docs/sampling.md.

Shapes: N tokens, V vocabulary, H hidden size, C clusters of rare tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
UNKNOWN, END = 0, 1


class Reference:
    """A model, read from the files of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        content = (checkpoint / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        self.weights: dict[str, Floats] = {}
        for name, facts in json.loads(content[8:start]).items():
            if name != "__metadata__":
                assert facts["dtype"] == "F32", facts
                first, last = facts["data_offsets"]
                values = np.frombuffer(content[start + first : start + last], "<f4")
                self.weights[name] = values.reshape(facts["shape"]).astype(np.float64)
        self.words = (checkpoint / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
        self.num_layers = 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("layers."))

    def ids(self, words: Sequence[str]) -> list[int]:
        """Return the ids of words, and that of <unk> for those that the vocabulary lacks."""
        return [self.words.index(word) if word in self.words else UNKNOWN for word in words]

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Return the logits (N + 1, V) of the next token: first after an <eos>, then after each of `tokens`."""
        zeros = [np.zeros(self.layer(number)[1].shape[1]) for number in range(self.num_layers)]
        states = list(zip(zeros, zeros, strict=True))  # h and c of each layer
        rows = []
        for token in [END, *tokens]:
            inputs = self.weights["embedding.weight"][token]
            for number in range(self.num_layers):
                weight_ih, weight_hh, bias = self.layer(number)
                h, c = states[number]
                i, f, g, o = np.split(weight_ih @ inputs + weight_hh @ h + bias, 4)  # (H) each
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                inputs = sigmoid(o) * np.tanh(c)
                states[number] = inputs, c
            rows.append(self.project(inputs))  # (V)
        return np.array(rows)

    def layer(self, number: int) -> tuple[Floats, Floats, Floats]:
        """Return the weights of a layer for its inputs (4H, I) and its state (4H, H), and the sum of its biases (4H)."""
        ih, hh, bias_ih, bias_hh = (
            self.weights[f"layers.{number}.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        return ih, hh, bias_ih + bias_hh

    def project(self, hidden: Floats) -> Floats:
        """Return the logits (V) after a hidden state (H); those of an adaptive head are log-probabilities."""
        weights = self.weights
        if "projection.head.weight" not in weights:
            matrix = weights.get("projection.weight", weights["embedding.weight"])  # without one of its own it is tied
            return matrix @ hidden + weights["projection.bias"]
        first = log_softmax(weights["projection.head.weight"] @ hidden + weights["projection.head.bias"])
        clusters = sum(name.endswith(".1.weight") for name in weights if name.startswith("projection.tail."))
        parts = [first[: len(first) - clusters]]  # the frequent tokens stand before the clusters
        for number in range(clusters):
            small = weights[f"projection.tail.{number}.0.weight"] @ hidden
            inside = log_softmax(weights[f"projection.tail.{number}.1.weight"] @ small)
            parts.append(first[len(first) - clusters + number] + inside)
        return np.concatenate(parts)

    def nats(self, tokens: Sequence[int]) -> Floats:
        """Return -log p (N) of each token of a text, the first of which follows an <eos>."""
        return np.array([-log_softmax(row)[token] for row, token in zip(self.logits(tokens), tokens, strict=False)])


def sigmoid(values: Floats) -> Floats:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-values))


def log_softmax(logits: Floats) -> Floats:
    """Return log(softmax(x))."""
    below = logits - logits.max()
    return below - math.log(np.exp(below).sum())


def distribution(
    logits: Floats,
    generated: Sequence[int] = (),
    prompt: Sequence[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Floats:
    """Return the probabilities (V) with which the next token is sampled from logits (V); <unk> never is.

    `generated` and `prompt` are the tokens before.
    """
    scores = logits.copy()
    scores[UNKNOWN] = -np.inf
    seen = sorted({*generated, *prompt})
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / repetition_penalty, scores[seen] * repetition_penalty)
    counts = np.bincount(generated, minlength=len(scores)) if len(generated) else np.zeros(len(scores))
    scores = (scores - presence_penalty * (counts > 0) - frequency_penalty * counts) / temperature
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(scores), dtype=bool)
    kept[order[: top_k or len(scores)]] = True
    if top_p < 1:
        shares = normalized(scores, kept)[order]
        kept[order[np.cumsum(shares) - shares >= top_p]] = False
    if min_p > 0:
        shares = normalized(scores, kept)
        kept &= shares >= min_p * shares.max()
    return normalized(scores, kept)


def normalized(scores: Floats, kept: NDArray[np.bool_]) -> Floats:
    """Return the softmax of the scores that are kept, and 0 elsewhere."""
    weights = np.where(kept, np.exp(scores - scores.max()), 0)
    return weights / weights.sum()
