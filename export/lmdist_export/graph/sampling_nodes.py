"""The nodes that sample a token from logits: penalties, then temperature, top-k, top-p, min-p and typical-p.

    sampling = SamplingNodes(sizes, features, option_inputs(g, sizes, features))
    logits = sampling.penalize(g, logits, counts)
    token, mass = sampling.sample(g, logits, uniform)

Random numbers are inputs, so a graph is a function: the same numbers sample the same tokens. Without top-k and typical-p
nothing is sorted. docs/sampling.md has the order of the options, docs/sampling-internals.md the reasons. This module knows no
model.

Shapes: B batch, A uniform numbers a token, V vocabulary (V' rounded up to whole blocks), K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmdist_export.graph.onnx_file import BOOL, FLOAT, INT32, INT64, Graph, Shape
from lmdist_export.graph.sizes import BLOCK, Sizes
from lmdist_export.options import ATTEMPTS, Features, Role, graph_inputs


def option_inputs(g: Graph, sizes: Sizes, features: Features) -> dict[str, str]:
    """Add the inputs that the options need; return the name of each."""
    types = {"float32": FLOAT, "int64": INT64}

    def options(role: Role) -> dict[str, tuple[int, Shape]]:
        inputs = graph_inputs(features, role)
        return {graph.name or name: (types[graph.dtype], list(graph.shape)) for name, graph in inputs.items()}

    of_rows: dict[str, tuple[int, Shape]] = {
        "counts": (FLOAT, ["batch", sizes.padded]),
        "in_prompt": (BOOL, ["batch", sizes.padded]),
        "row_bias": (FLOAT, ["rows", sizes.padded]),
    }
    inputs = options("temperature") | (of_rows if features.adjusted else {}) | options("penalty") | options("filter")
    inputs |= options("cache")
    return {name: g.input(name, *of) for name, of in inputs.items()}


class Sampled(NamedTuple):
    """A sampled token, its probability, and the sum of all that it was sampled from; each (B, 1)."""

    token: str
    probability: str
    mass: str


class Trial(NamedTuple):
    """What is known of a sampled token: whether it is rejected, and what to sample from if so.

    `likelier[t] * unit` is the probability of each token t that is likelier than the sampled one; `likelier` (B, V'/256, 256)
    is 0 for all others. `sums` (B, V'/256) are those of its blocks, and `unit` (B, 1) is the probability of the sampled token.
    """

    rejected: str
    likelier: str
    sums: str
    unit: str


class Limits(NamedTuple):
    """What is allowed: (B, 1) each, or "" where the option is absent."""

    mass: str
    """The mass that likelier tokens may have, by top-p."""
    probability: str
    """The probability that a token must have, by min-p."""


@dataclass(frozen=True)
class SamplingNodes:
    """Writes the sampling of tokens into graphs."""

    sizes: Sizes
    features: Features
    options: dict[str, str]
    """The values of the options, by name."""
    cuda: bool = False

    def penalize(self, g: Graph, logits: str, counts: str) -> str:
        """Return logits (B, V') less the penalties of tokens in the text (`counts`, (B, V')) and its prompt, plus row_bias."""
        zero = g.constant(np.float32(0))
        repetition = self.options["repetition_penalty"]
        generated = g("Greater", counts, zero)
        penalized = g("Where", g("Greater", logits, zero), g("Div", logits, repetition), g("Mul", logits, repetition))
        logits = g("Where", g("Or", generated, self.options["in_prompt"]), penalized, logits)
        presence = g("Mul", g("Cast", generated, to=FLOAT), self.options["presence_penalty"])
        penalty = g("Add", presence, g("Mul", counts, self.options["frequency_penalty"]))
        return g("Add", g("Sub", logits, penalty), self.options["row_bias"])

    def sample(self, g: Graph, logits: str, uniform: str) -> tuple[str, str]:
        """Return tokens (B, 1) of `logits` (B, V') by `uniform` (B, A), and a sum (B, 1) that is finite if the logits are."""
        if self.features.sorted:
            return self.sample_candidates(g, logits, uniform)
        by_block = g.constant(np.array([-1, self.sizes.padded // BLOCK, BLOCK]))
        if self.features.greedy:
            return self.most_likely(g, g("Reshape", logits, by_block))
        probabilities = g("Reshape", g("Softmax", logits, axis=1), by_block)
        sums = g("ReduceSum", probabilities, g.constant(np.array([2])), keepdims=0)  # (B, V'/256)
        sampled = self.inverse_transform(g, probabilities, sums, column(g, uniform, 0))
        if self.features.attempts == 1:
            return sampled.token, sampled.mass
        return self.rejection_sample(g, probabilities, sampled, uniform), sampled.mass

    def most_likely(self, g: Graph, logits: str) -> tuple[str, str]:
        """Return the first tokens with the largest of `logits` (B, V'/256, 256), and that logit; (B, 1) each.

        Maxima are several times as fast as ArgMax, so they find the block first.
        """
        maxima = g("ReduceMax", logits, axes=[2], keepdims=0)  # (B, V'/256)
        block = g("ArgMax", maxima, axis=1)  # (B, 1)
        place = g("ArgMax", self.of_block(g, logits, block), axis=1)
        return self.token(g, block, place), g("ReduceMax", maxima, axes=[1])

    def of_block(self, g: Graph, values: str, block: str) -> str:
        """Return each row's values (B, 256) in its block (B, 1), of `values` (B, V'/256, 256)."""
        if not self.cuda:
            return g("GatherND", values, block, batch_dims=1)
        axis = g.constant(np.array([1]))  # GatherND copies a table from the host (token_graph)
        index = g("Add", g("Unsqueeze", block, axis), g.constant(np.zeros((1, 1, BLOCK), np.int64)))  # (B, 1, 256)
        return g("Squeeze", g("GatherElements", values, index, axis=1), axis)

    def token(self, g: Graph, block: str, place: str) -> str:
        """Return the token at a place of a block; (B, 1) each."""
        return g("Add", g("Mul", block, g.constant(np.int64(BLOCK))), place)

    def inverse_transform(self, g: Graph, probabilities: str, sums: str, uniform: str) -> Sampled:
        """Sample by inverse transform from `probabilities` (B, V'/256, 256), which need no sum of 1, by `uniform` (B, 1).

        The cumulative distribution is inverted on two levels: over `sums` (B, V'/256) of blocks, then inside a block. A
        uniform number is at most 1 - 2**-24, and that part of a sum rounds to less than the sum: a token of probability 0 is
        never sampled.
        """
        blocks = self.sizes.padded // BLOCK
        cumulative = g("CumSum", sums, g.constant(np.int64(1)))  # (B, V'/256)
        mass = column(g, cumulative, blocks - 1)
        target = g("Mul", mass, uniform)
        before = g("LessOrEqual", cumulative, target)
        below = g("ReduceMax", g("Mul", cumulative, g("Cast", before, to=FLOAT)), axes=[1])
        # The last block at most, whatever the numbers of a row that is not asked for.
        block = g("Min", count(g, before), g.constant(np.int64(blocks - 1)))  # (B, 1)
        inside = self.of_block(g, probabilities, block)  # (B, 256)
        cumulative = g("CumSum", inside, g.constant(np.int64(1)))
        largest = g("Mul", column(g, cumulative, BLOCK - 1), g.constant(np.float32(1 - 2**-24)))
        target = g("Min", g("Sub", target, below), largest)
        place = g("Min", count(g, g("LessOrEqual", cumulative, target)), g.constant(np.int64(BLOCK - 1)))  # (B, 1)
        return Sampled(self.token(g, block, place), g("GatherElements", inside, place, axis=1), mass)

    # --- top-p and min-p without a sort

    def rejection_sample(self, g: Graph, probabilities: str, sampled: Sampled, uniform: str) -> str:
        """Return tokens (B, 1) that top-p and min-p allow: those `sampled`, or where they are rejected, likelier ones.

        A token is allowed if all likelier ones together have less than top_p, and if it has min_p of the maximum probability:
        one pass over the probabilities decides it, without a sort. If it is rejected, all allowed tokens are likelier, so
        sampling from the likelier ones is exact, and about half of what is not allowed is gone each time. FlashInfer's
        sorting-free kernels sample in the same way on GPUs (Ye et al. 2025, arXiv:2501.01005; "Sorting-Free GPU Kernels for LLM
        Sampling", flashinfer.ai).
        """
        axis = g.constant(np.array([1]))
        probability = g("Max", sampled.probability, g.constant(np.float32(1e-30)))  # quotients by it are finite
        mass = g("Mul", self.options["top_p"], sampled.mass) if self.features.top_p else ""
        least = ""
        if self.features.min_p:
            maximum = g("Unsqueeze", g("ReduceMax", probabilities, axes=[1, 2], keepdims=0), axis)
            least = g("Mul", maximum, self.options["min_p"])
        first = self.trial(g, probabilities, probability, probability, Limits(mass, least))

        # Few rows are rejected, and all that follows is about them: R rows.
        rows = g("Squeeze", g("NonZero", g("Squeeze", first.rejected, axis)), g.constant(np.array([0])))  # (R)

        def rejected(values: str) -> str:
            return g("Gather", values, rows, axis=0) if values else ""

        limits = Limits(*map(rejected, (mass, least)))
        uniform = rejected(uniform)
        body = g.subgraph("attempt")
        shapes = {
            "token": (INT64, ["rejected", 1], sampled.token),
            "rejected": (BOOL, ["rejected", 1], first.rejected),
            "likelier": (FLOAT, ["rejected", self.sizes.padded // BLOCK, BLOCK], first.likelier),
            "sums": (FLOAT, ["rejected", self.sizes.padded // BLOCK], first.sums),
            "unit": (FLOAT, ["rejected", 1], first.unit),
        }
        attempt = body.input("attempt", INT64, [])
        body.input("continue", BOOL, [])
        token, *trial = (body.input(f"{name}_before", kind, shape) for name, (kind, shape, _) in shapes.items())
        after = self.attempt(body, attempt, token, Trial(*trial), uniform, limits)
        body.output(any_of(body, after[1]), "next_continue", BOOL, [])
        for (name, (kind, shape, _)), value in zip(shapes.items(), after, strict=True):
            body.output(value, f"{name}_after", kind, shape)
        starts = [rejected(start) for *_, start in shapes.values()]
        is_any = g("Greater", g("Size", rows), g.constant(np.int64(0)))
        tokens = g.several("Loop", 5, g.constant(np.int64(ATTEMPTS - 1)), is_any, *starts, body=body)[0]  # (R, 1)
        return g("ScatterElements", sampled.token, g("Unsqueeze", rows, axis), tokens, axis=0)

    def attempt(self, g: Graph, number: str, token: str, before: Trial, uniform: str, limits: Limits) -> list[str]:
        """Return the tokens and trials after another attempt, in which rejected rows sample again."""
        column_number = g("Unsqueeze", g("Add", number, g.constant(np.int64(1))), g.constant(np.array([0])))
        numbers = g("Gather", uniform, column_number, axis=1)  # (B, 1)
        sampled = self.inverse_transform(g, before.likelier, before.sums, numbers)
        unit = g("Mul", before.unit, sampled.probability)
        after = self.trial(g, before.likelier, sampled.probability, unit, limits)
        rejected = g("And", before.rejected, after.rejected)
        return [g("Where", before.rejected, sampled.token, token), rejected, *after[1:]]

    def trial(self, g: Graph, probabilities: str, probability: str, unit: str, limits: Limits) -> Trial:
        """Return the trial of a token from its probability `unit` (B, 1), which is `probability` among `probabilities`."""
        by = g("Unsqueeze", probability, g.constant(np.array([2])))
        likelier = g("ThresholdedRelu", g("Div", probabilities, by), alpha=1.0)  # (B, V'/256, 256)
        sums = g("ReduceSum", likelier, g.constant(np.array([2])), keepdims=0)  # (B, V'/256)
        above = g("ReduceSum", sums, g.constant(np.array([1])))
        reasons = []
        if limits.mass:
            reasons.append(g("GreaterOrEqual", g("Mul", above, unit), limits.mass))
        if limits.probability:
            reasons.append(g("Less", unit, limits.probability))
        reason = g("Or", *reasons) if len(reasons) == 2 else reasons[0]
        # The most likely token is never rejected, whatever its product of units is rounded to: nothing would be left to sample.
        rejected = g("And", reason, g("Greater", above, g.constant(np.float32(0))))
        return Trial(rejected, likelier, sums, unit)

    # --- the sorted candidates

    def sample_candidates(self, g: Graph, logits: str, uniform: str) -> tuple[str, str]:
        """Return tokens (B, 1) of the `top_k` largest `logits` (B, V'), and their mass (B, 1).

        top-p, min-p and typical-p narrow the candidates in this order.
        """
        last, one = g.constant(np.int64(1)), g.constant(np.array([1]))
        best, ids = g.several("TopK", 2, logits, self.options["top_k"], axis=1)  # (B, K), the most likely first
        weights = g("Softmax", best, axis=1)
        mass = g("ReduceSum", weights, one)
        zero = g.constant(np.float32(0))
        if self.features.top_p:
            weights = g("Where", nucleus(g, weights, g("Neg", best), self.options["top_p"]), weights, zero)
        if self.features.min_p:
            least = g("Mul", column(g, weights, 0), self.options["min_p"])
            weights = g("Where", g("GreaterOrEqual", weights, least), weights, zero)
        if self.features.typical_p:
            ids, weights = self.typical(g, ids, weights)
        cumulative = g("CumSum", weights, last)
        total = g("ReduceMax", cumulative, axes=[1])
        place = count(g, g("LessOrEqual", cumulative, g("Mul", total, uniform)))
        largest = g("Sub", length(g, cumulative), one)
        return g("GatherElements", ids, g("Min", place, largest), axis=1), mass

    def typical(self, g: Graph, ids: str, weights: str) -> tuple[str, str]:
        """Return candidates in the order of typical-p, (B, K), with weight 0 for those beyond its share.

        First come those whose surprise is nearest to the entropy (Meister et al. 2023, arXiv:2202.00666).
        """
        one, zero = g.constant(np.array([1])), g.constant(np.float32(0))
        shares = g("Div", weights, g("ReduceSum", weights, one))
        # Where a process flushes denormal numbers to 0, as training does, a floor below 1.2e-38 is none.
        surprise = g("Neg", g("Log", g("Max", shares, g.constant(np.float32(1e-30)))))  # in nats
        entropy = g("ReduceSum", g("Mul", shares, surprise), one)
        mask = g("Greater", shares, zero)
        distance = g("Where", mask, g("Abs", g("Sub", surprise, entropy)), g.constant(np.float32(np.inf)))
        distance, order = g.several("TopK", 2, distance, length(g, distance), axis=1, largest=0)
        ids, weights = (g("GatherElements", values, order, axis=1) for values in (ids, weights))
        return ids, g("Where", nucleus(g, weights, distance, self.options["typical_p"]), weights, zero)


def nucleus(g: Graph, weights: str, rank: str, share: str) -> str:
    """Return which of `weights` (B, K) reach `share` of their sum; of those of one `rank` (B, K) all or none.

    With the likelihood as rank it is the nucleus of top-p (Holtzman et al. 2020, arXiv:1904.09751).
    """
    before = g("CumSum", weights, g.constant(np.int64(1)), exclusive=1)
    needed = g("Less", before, g("Mul", g("ReduceSum", weights, g.constant(np.array([1]))), share))
    lowest = g("ReduceMax", g("Where", needed, rank, g.constant(np.float32(-np.inf))), axes=[1])
    return g("LessOrEqual", rank, lowest)


def column(g: Graph, values: str, number: int) -> str:
    """Return column `number` of (B, K), as (B, 1)."""
    return g("Slice", values, *(g.constant(np.array([n])) for n in (number, number + 1, 1)))


def length(g: Graph, values: str) -> str:
    """Return K of (B, K), as a shape of one number."""
    return g("Slice", g("Shape", values), *(g.constant(np.array([n])) for n in (1, 2)))


def count(g: Graph, flags: str) -> str:
    """Return how many of `flags` (B, K) are true, (B, 1).

    Sums of floats are several times as fast as those of integers, and exact up to 2**24.
    """
    return g("Cast", g("ReduceSum", g("Cast", flags, to=FLOAT), g.constant(np.array([1]))), to=INT64)


def any_of(g: Graph, flags: str) -> str:
    """Return whether any of `flags` is true."""
    return g("Cast", g("ReduceMax", g("Cast", flags, to=INT32), keepdims=0), to=BOOL)
