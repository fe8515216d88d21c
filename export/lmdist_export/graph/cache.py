"""The nodes of the neural cache: a memory of hidden states and the tokens that were read after them, and the mixture with it.

    cache, memory = cache_inputs(g, sizes)
    past = cache.past(g, memory, cache.pairs(g, before, hidden, tokens), lengths)
    log_probabilities = cache.mixture(g, logits, hidden, past)

lmdist/cache_settings.py has the formulas; lmdist/training/neural_cache.py is the counterpart in torch. A pair is remembered
when its token is read, so the memory is a function of the tokens that were read, as the state is. It is a part of the state:
(B, M, H) and (B, M), the newest pair last, M at most the size of the cache. Rows that have read less than others have the token
EMPTY in their first places. A new memory has one such place; it has no weight in the mixture.

A memory is the largest value that a graph has, and copying it takes as long as a token with it does. So a graph that generates
reads it where it lies, returns the pairs that are new, and leaves it to its caller to add them (`remembered` in state.py).

This module knows no sampling and no layers.

Shapes: B batch, T tokens read, M pairs in memory, H the last layer's size, V vocabulary (V' rounded up to whole blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmdist_export.graph.onnx_file import FLOAT, INT64, Graph
from lmdist_export.graph.sizes import Sizes

CACHE = ("cache_hidden", "cache_tokens")
"""The parts of the state that are the memory, after those of cell.STATE."""
EMPTY = -1
LAST = np.iinfo(np.int64).max
"""The end of a slice that ends where the axis does."""
FAR = -1e30
"""The score of an empty place, far below all others: its exponential is 0."""
NEVER = 2**40
"""The age of an EMPTY place."""
NEW = ("added_cache_hidden", "added_cache_tokens")
"""The outputs that are new pairs."""


class Memory(NamedTuple):
    """Pairs of a hidden state (B, M, H) and the token that was read after it (B, M)."""

    hidden: str
    tokens: str


class Past(NamedTuple):
    """All that a text remembers, as parts that are not copied together."""

    parts: Sequence[Memory]
    """The oldest first."""
    tokens: str
    """The tokens of all parts, (B, M); any one where a place is EMPTY."""
    age: str
    """How many tokens ago a pair was read, (B, M): 1 for the newest, NEVER where a place is EMPTY."""


def cache_inputs(g: Graph, sizes: Sizes, weight: str = "") -> tuple[CacheNodes, Memory]:
    """Declare the inputs of a cache, its parameters (the `weight` unless it is given) and its memory."""
    size, theta = g.input("cache_size", INT64, [1]), g.input("cache_theta", FLOAT, [])
    nodes = CacheNodes(size, theta, weight or g.input("cache_weight", FLOAT, []))
    shape = ["batch", "remembered"]
    hidden, tokens = CACHE
    memory = Memory(g.input(hidden, FLOAT, [*shape, sizes.layer_sizes[-1]]), g.input(tokens, INT64, shape))
    return nodes, memory


def cache_outputs(g: Graph, sizes: Sizes, memory: Memory) -> None:
    """Declare the memory's outputs."""
    g.output(memory.hidden, f"next_{CACHE[0]}", FLOAT, ["batch", "next_remembered", sizes.layer_sizes[-1]])
    g.output(memory.tokens, f"next_{CACHE[1]}", INT64, ["batch", "next_remembered"])


def pair_outputs(g: Graph, sizes: Sizes, pairs: Memory) -> None:
    """Declare the outputs of new pairs, EMPTY where a row has fewer than others."""
    g.output(pairs.hidden, NEW[0], FLOAT, ["batch", "new", sizes.layer_sizes[-1]])
    g.output(pairs.tokens, NEW[1], INT64, ["batch", "new"])


def by_text(g: Graph, hidden: str, tokens: str, size: int) -> str:
    """Return the hidden states (T*B, H) after `tokens` (B, T) as (B, T, H)."""
    shape = g("Concat", g("Gather", g("Shape", tokens), g.constant(np.array([1, 0]))), g.constant(np.array([size])), axis=0)
    return g("Transpose", g("Reshape", hidden, shape), perm=[1, 0, 2])


@dataclass(frozen=True)
class CacheNodes:
    """Writes a cache into graphs; its parameters are values."""

    size: str
    theta: str
    weight: str

    def pair(self, g: Graph, before: str, token: str) -> Memory:
        """Return the pair of one token (B, 1) that is read after the hidden state `before` (B, H).

        The first token of a text has no state before it: the layers' states are zeros then, and the place is EMPTY.
        """
        continued = g("Greater", g("ReduceMax", g("Abs", before), axes=[1]), g.constant(np.float32(0)))  # (B, 1)
        token = g("Where", continued, token, g.constant(np.int64(EMPTY)))
        return Memory(g("Unsqueeze", before, g.constant(np.array([1]))), token)

    def pairs(self, g: Graph, before: str, hidden: str, tokens: str) -> Memory:
        """Return the pairs of `tokens` (B, T); the hidden states are `before` (B, H) them, and those after each (B, T, H)."""
        first = self.pair(g, before, slice_of(g, tokens, 0, 1))
        others = Memory(slice_of(g, hidden, 0, -1), slice_of(g, tokens, 1, LAST))
        return join(g, first, others)

    def remember(self, g: Graph, memory: Memory, pairs: Memory) -> Memory:
        """Return the memory with the pairs added and the oldest ones forgotten."""
        first, last, step = g("Neg", self.size), g.constant(np.array([LAST])), g.constant(np.array([1]))
        return Memory(*(g("Slice", part, first, last, step) for part in join(g, memory, pairs)))

    def past(self, g: Graph, memory: Memory, pairs: Memory, lengths: str = "") -> Past:
        """Return a memory and the pairs after it, of row b its first `lengths` (B), or all."""
        zero, one = g.constant(np.int64(0)), g.constant(np.int64(1))
        old, new = (g("Squeeze", size_of(g, part.tokens, 1)) for part in (memory, pairs))
        count = g("Unsqueeze", lengths, g.constant(np.array([1]))) if lengths else new
        place = g("Range", zero, new, one)  # (T)
        read = g("Where", g("Less", place, count), pairs.tokens, g.constant(np.int64(EMPTY)))
        since = g("Sub", count, g("Range", g("Neg", old), new, one))  # (B, M + T), or (M + T)
        parts = [memory, Memory(pairs.hidden, read)]
        return Past(parts, *places(g, g("Concat", memory.tokens, read, axis=1), since))

    def with_added(self, g: Graph, past: Past, added: Memory) -> Past:
        """Return a past with pairs after it."""
        new = g("Squeeze", size_of(g, added.tokens, 1))
        since = g("Range", new, g.constant(np.int64(0)), g.constant(np.int64(-1)))  # (T)
        tokens, age = places(g, added.tokens, since)
        joined = (past.tokens, tokens), (g("Add", past.age, new), age)
        return Past([*past.parts, added], *(g("Concat", *pair, axis=1) for pair in joined))

    def mixture(self, g: Graph, logits: str, hidden: str, past: Past) -> str:
        """Return the log-probabilities (B, V') of the mixture after `hidden` (B, H), from the model's `logits` (B, V').

        Only the log-probabilities of tokens in memory differ from the model's, but for a constant: there are fewer of them than
        tokens in the vocabulary, and a logarithm takes several times as long as an exponential.
        """
        query = g("Unsqueeze", g("Mul", hidden, self.theta), g.constant(np.array([2])))  # (B, H, 1)
        scores = [g("MatMul", part.hidden, query) for part in past.parts]  # (B, M, 1)
        score = g("Squeeze", g("Concat", *scores, axis=1), g.constant(np.array([2])))  # (B, M)
        counts = g("LessOrEqual", past.age, self.size)
        share = g("Softmax", g("Where", counts, score, g.constant(np.float32(FAR))), axis=1)
        weight = self.weight_of(g, slice_of(g, past.parts[-1].tokens, -1, LAST))  # (B, 1)
        by_model = g("Add", g("LogSoftmax", logits, axis=1), log_of_rest(g, weight))  # (B, V')
        zeros = g("ConstantOfShape", g("Shape", logits))
        mass = g("ScatterElements", zeros, past.tokens, g("Mul", share, weight), axis=1, reduction="add")
        mass, rest = (g("GatherElements", values, past.tokens, axis=1) for values in (mass, by_model))  # (B, M)
        added = g("Where", g("Greater", mass, g.constant(np.float32(0))), g("Log", g("Add", g("Exp", rest), mass)), rest)
        return g("ScatterElements", by_model, past.tokens, added, axis=1)

    def mixed_scores(self, g: Graph, scores: str, hidden: str, targets: str, memory: Memory, pairs: Memory) -> str:
        """Return the log-probabilities (B, T) of `targets` (B, T) by the mixture, from the model's `scores` (B, T).

        `hidden` (B, T, H) are the states that predict them, and `pairs` those of the tokens read.
        """
        zero, one = g.constant(np.int64(0)), g.constant(np.int64(1))
        keys, tokens = join(g, memory, pairs)  # (B, M + T, ...)
        score = g("Mul", g("MatMul", hidden, g("Transpose", keys, perm=[0, 2, 1])), self.theta)  # (B, T, M + T)
        old, length = (g("Squeeze", size_of(g, part, 1)) for part in (memory.tokens, targets))
        total = g("Add", old, length)
        position = g("Range", zero, total, one)  # (M + T)
        # The newest pair of each place: that of the token it has read.
        newest = g("Unsqueeze", g("Range", old, total, one), g.constant(np.array([1])))  # (T, 1)
        inside = g("And", g("LessOrEqual", position, newest), g("Greater", position, g("Sub", newest, self.size)))
        present = g("Unsqueeze", g("GreaterOrEqual", tokens, zero), g.constant(np.array([1])))  # (B, 1, M + T)
        share = g("Softmax", g("Where", g("And", inside, present), score, g.constant(np.float32(FAR))), axis=2)
        by_token = g("Unsqueeze", tokens, g.constant(np.array([1])))
        match = g("Equal", by_token, g("Unsqueeze", targets, g.constant(np.array([2]))))
        mass = g("ReduceSum", g("Mul", share, g("Cast", match, to=FLOAT)), g.constant(np.array([2])), keepdims=0)  # (B, T)
        weight = self.weight_of(g, pairs.tokens)  # (B, T)
        mass = g("Mul", mass, weight)
        rest = g("Add", scores, log_of_rest(g, weight))
        mixed = g("Log", g("Add", g("Exp", rest), mass))
        return g("Where", g("Greater", mass, g.constant(np.float32(0))), mixed, rest)

    def weight_of(self, g: Graph, newest: str) -> str:
        """Return the weight of the cache where the newest token in memory is `newest`: none where that place is EMPTY."""
        return g("Mul", g("Cast", g("GreaterOrEqual", newest, g.constant(np.int64(0))), to=FLOAT), self.weight)


def join(g: Graph, old: Memory, new: Memory) -> Memory:
    """Return the pairs of both."""
    return Memory(*(g("Concat", *parts, axis=1) for parts in zip(old, new, strict=True)))


def places(g: Graph, tokens: str, since: str) -> tuple[str, str]:
    """Return tokens and age, as Past has them, of `tokens` (B, M) that were read `since` (B, M) or (M)."""
    zero = g.constant(np.int64(0))
    age = g("Where", g("GreaterOrEqual", tokens, zero), since, g.constant(np.int64(NEVER)))
    return g("Max", tokens, zero), age


def no_pairs(g: Graph, memory: Memory) -> Memory:
    """Return a memory of the same batch without a place."""
    return Memory(*(slice_of(g, part, 0, 0) for part in memory))


def log_of_rest(g: Graph, weight: str) -> str:
    """Return log(1 - weight)."""
    return g("Log", g("Sub", g.constant(np.float32(1)), weight))


def slice_of(g: Graph, values: str, start: int, end: int) -> str:
    """Return the places `start` to `end` of (B, T, ...)."""
    return g("Slice", values, *(g.constant(np.array([number])) for number in (start, end, 1)))


def size_of(g: Graph, values: str, axis: int) -> str:
    """Return the length of an axis, as a shape of one number."""
    return g("Gather", g("Shape", values), g.constant(np.array([axis])))
