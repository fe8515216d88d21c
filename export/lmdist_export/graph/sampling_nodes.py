"""The nodes that turn logits into words.

Shapes: B rows, A uniform numbers a word, V vocabulary (V' rounded up to whole blocks), K candidates.
"""

from __future__ import annotations

import numpy as np

from lmdist_export.graph.onnx_file import BOOL, FLOAT, INT32, INT64, Graph, Shape
from lmdist_export.graph.sizes import BLOCK, Sizes
from lmdist_export.options import ATTEMPTS, Features, Role, graph_inputs


def draw_inputs(g: Graph, sizes: Sizes, features: Features) -> dict[str, str]:
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
    return {name: g.input(name, *of) for name, of in inputs.items()}


def adjusted(g: Graph, logits: str, counts: str, options: dict[str, str]) -> str:
    """Logits (B, V') less what the words that a text already has are to pay."""
    zero = g.constant(np.float32(0))
    repetition = options["repetition_penalty"]
    made = g("Greater", counts, zero)
    paid = g("Where", g("Greater", logits, zero), g("Div", logits, repetition), g("Mul", logits, repetition))
    logits = g("Where", g("Or", made, options["in_prompt"]), paid, logits)
    once, each = options["presence_penalty"], options["frequency_penalty"]
    price = g("Add", g("Mul", g("Cast", made, to=FLOAT), once), g("Mul", counts, each))
    return g("Add", g("Sub", logits, price), options["row_bias"])


def draw(
    g: Graph, sizes: Sizes, features: Features, logits: str, uniform: str, options: dict[str, str], *, cuda: bool = False
) -> tuple[str, str]:
    """The next words (B, 1) of `logits` (B, V') by `uniform` (B, A); and a sum (B, 1) that is finite where the logits are."""
    if features.greedy:
        return g("ArgMax", logits, axis=1), g("ReduceMax", logits, axes=[1])
    if features.sorted:
        return draw_of_candidates(g, features, logits, uniform, options)
    probabilities = g("Reshape", g("Softmax", logits, axis=1), g.constant(np.array([-1, sizes.padded // BLOCK, BLOCK])))
    sums = g("ReduceSum", probabilities, g.constant(np.array([2])), keepdims=0)  # (B, V'/256)
    first = column_of(g, uniform, 0)
    drawn = two_level(g, sizes, probabilities, sums, first, cuda=cuda)
    if not (features.top_p or features.min_p):
        return drawn[0], drawn[2]
    return accepted(g, sizes, features, probabilities, drawn, uniform, options, cuda=cuda), drawn[2]


def two_level(g: Graph, sizes: Sizes, weights: str, sums: str, uniform: str, *, cuda: bool) -> tuple[str, str, str]:
    """A word (B, 1) of `weights` (B, V'/256, 256) with `sums` (B, V'/256) by `uniform` (B, 1), its weight, and the sum of all.

    The inverse of the distribution function, first of blocks, then inside one. A uniform number is at most 1 - 2**-24, and
    that part of a sum rounds to less than the sum: what has no weight is never drawn.
    """
    column, blocks = g.constant(np.array([1])), sizes.padded // BLOCK
    up_to = g("CumSum", sums, g.constant(np.int64(1)))  # (B, V'/256)
    mass = column_of(g, up_to, blocks - 1)
    target = g("Mul", mass, uniform)
    before = g("LessOrEqual", up_to, target)
    below = g("ReduceMax", g("Mul", up_to, g("Cast", before, to=FLOAT)), axes=[1])
    # Never beyond the last, whatever numbers a row has that is not asked for.
    block = g("Min", g("ReduceSum", g("Cast", before, to=INT64), column), g.constant(np.int64(blocks - 1)))  # (B, 1)
    if cuda:  # GatherND copies a table from the host (word_graph)
        index = g("Add", g("Unsqueeze", block, column), g.constant(np.zeros((1, 1, BLOCK), np.int64)))  # (B, 1, 256)
        inside = g("Squeeze", g("GatherElements", weights, index, axis=1), column)  # (B, 256)
    else:
        inside = g("GatherND", weights, block, batch_dims=1)  # (B, 256)
    up_to = g("CumSum", inside, g.constant(np.int64(1)))
    most = g("Mul", column_of(g, up_to, BLOCK - 1), g.constant(np.float32(1 - 2**-24)))
    target = g("Min", g("Sub", target, below), most)
    place = g("ReduceSum", g("Cast", g("LessOrEqual", up_to, target), to=INT64), column)
    place = g("Min", place, g.constant(np.int64(BLOCK - 1)))  # (B, 1)
    word = g("Add", g("Mul", block, g.constant(np.int64(BLOCK))), place)
    return word, g("GatherElements", inside, place, axis=1), mass


def accepted(
    g: Graph,
    sizes: Sizes,
    features: Features,
    weights: str,
    drawn: tuple[str, str, str],
    uniform: str,
    options: dict[str, str],
    *,
    cuda: bool,
) -> str:
    """Words (B, 1) that top-p and min-p allow: what `two_level` has `drawn`, or where that is not allowed, of likelier ones.

    A word is allowed if all likelier ones together have less than top_p, and if it has min_p of the likeliest one's
    probability. To know that of one word takes a look at all and no sorting. Where it is refused the likelier words hold all
    that are allowed, so that the draw among them is exact, and about half of the rest is gone each time.
    """
    column = g.constant(np.array([1]))
    word, of_word, mass = drawn
    of_word = g("Max", of_word, g.constant(np.float32(1e-30)))  # what is divided by it is finite
    most = g("Mul", options["top_p"], mass) if features.top_p else ""
    least = ""
    if features.min_p:
        least = g("Mul", g("Unsqueeze", g("ReduceMax", weights, axes=[1, 2], keepdims=0), column), options["min_p"])

    def judge(g: Graph, weights: str, of_word: str, unit: str) -> tuple[str, str, str, str]:
        """Whether a word is refused (B, 1); the weights of likelier ones in units of its own, their sums, and that unit."""
        unit = g("Mul", unit, of_word)
        by = g("Unsqueeze", of_word, g.constant(np.array([2])))
        likelier = g("ThresholdedRelu", g("Div", weights, by), alpha=1.0)  # (B, V'/256, 256)
        sums = g("ReduceSum", likelier, g.constant(np.array([2])), keepdims=0)  # (B, V'/256)
        above = g("ReduceSum", sums, column)
        reasons = []
        if most:
            reasons.append(g("GreaterOrEqual", g("Mul", above, unit), most))
        if least:
            reasons.append(g("Less", unit, least))
        reason = g("Or", *reasons) if len(reasons) == 2 else reasons[0]
        # The likeliest word is never refused, whatever its product of units is rounded to: none would be left to draw.
        return g("And", reason, g("Greater", above, g.constant(np.float32(0)))), likelier, sums, unit

    def any_of(g: Graph, flags: str) -> str:
        return g("Cast", g("ReduceMax", g("Cast", flags, to=INT32), keepdims=0), to=BOOL)

    first = judge(g, weights, of_word, g.constant(np.float32(1)))
    body = g.body("attempt")
    attempt = body.input("attempt", INT64, [])
    body.input("again", BOOL, [])
    blocks = sizes.padded // BLOCK
    shapes = {
        "word": (INT64, ["batch", 1], word),
        "refused": (BOOL, ["batch", 1], first[0]),
        "likelier": (FLOAT, ["batch", blocks, BLOCK], first[1]),
        "sums": (FLOAT, ["batch", blocks], first[2]),
        "unit": (FLOAT, ["batch", 1], first[3]),
    }
    before = {name: body.input(f"{name}_refused", kind, shape) for name, (kind, shape, _) in shapes.items()}
    number = body(
        "Gather",
        uniform,
        body("Unsqueeze", body("Add", attempt, body.constant(np.int64(1))), body.constant(np.array([0]))),
        axis=1,
    )
    word, of_word, _ = two_level(body, sizes, before["likelier"], before["sums"], number, cuda=cuda)
    refused, *others = judge(body, before["likelier"], of_word, before["unit"])
    refused = body("And", before["refused"], refused)
    after = [body("Where", before["refused"], word, before["word"]), refused, *others]
    body.output(any_of(body, refused), "attempt_again", BOOL, [])
    for (name, (kind, shape, _)), value in zip(shapes.items(), after, strict=True):
        body.output(value, f"{name}_judged", kind, shape)
    starts = [start for *_, start in shapes.values()]
    return g.several("Loop", 5, g.constant(np.int64(ATTEMPTS - 1)), any_of(g, first[0]), *starts, body=body)[0]


def draw_of_candidates(g: Graph, features: Features, logits: str, uniform: str, options: dict[str, str]) -> tuple[str, str]:
    """Words (B, 1) of the `top_k` likeliest of `logits` (B, V'), which top-p, min-p and typical-p narrow, each what is left."""
    last, one = g.constant(np.int64(1)), g.constant(np.array([1]))
    best, ids = g.several("TopK", 2, logits, options["top_k"], axis=1)  # (B, K), the likeliest first
    weights = g("Softmax", best, axis=1)
    mass = g("ReduceSum", weights, one)
    zero = g.constant(np.float32(0))

    def reached(weights: str, rank: str, share: str) -> str:
        """Which of (B, K) are needed for `share` of the sum; of those of one `rank` all or none."""
        before = g("CumSum", weights, last, exclusive=1)
        needed = g("Less", before, g("Mul", g("ReduceSum", weights, one), share))
        lowest = g("ReduceMax", g("Where", needed, rank, g.constant(np.float32(-np.inf))), axes=[1])
        return g("LessOrEqual", rank, lowest)

    if features.top_p:
        weights = g("Where", reached(weights, g("Neg", best), options["top_p"]), weights, zero)
    if features.min_p:
        likeliest = column_of(g, weights, 0)
        enough = g("GreaterOrEqual", weights, g("Mul", likeliest, options["min_p"]))
        weights = g("Where", enough, weights, zero)
    if features.typical_p:
        shares = g("Div", weights, g("ReduceSum", weights, one))
        # Where a process takes denormal numbers for 0, as training does, a floor below 1.2e-38 is none.
        surprise = g("Neg", g("Log", g("Max", shares, g.constant(np.float32(1e-30)))))  # in nats
        entropy = g("ReduceSum", g("Mul", shares, surprise), one)
        there = g("Greater", shares, zero)
        strange = g("Where", there, g("Abs", g("Sub", surprise, entropy)), g.constant(np.float32(np.inf)))
        every = g("Slice", g("Shape", strange), *(g.constant(np.array([n])) for n in (1, 2)))
        strange, order = g.several("TopK", 2, strange, every, axis=1, largest=0)
        ids, weights = (g("GatherElements", values, order, axis=1) for values in (ids, weights))
        weights = g("Where", reached(weights, strange, options["typical_p"]), weights, zero)
    up_to = g("CumSum", weights, last)
    whole = g("ReduceMax", up_to, axes=[1])
    place = g("ReduceSum", g("Cast", g("LessOrEqual", up_to, g("Mul", whole, uniform)), to=INT64), one)
    most = g("Sub", g("Slice", g("Shape", up_to), *(g.constant(np.array([n])) for n in (1, 2))), one)
    return g("GatherElements", ids, g("Min", place, most), axis=1), mass


def column_of(g: Graph, values: str, number: int) -> str:
    """Column `number` of (B, K), as (B, 1)."""
    return g("Slice", values, *(g.constant(np.array([n])) for n in (number, number + 1, 1)))
