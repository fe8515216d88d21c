"""The graphs of a bundle, made of the sizes in its manifest: one that reads, one that scores, two that make words.

    step_graph        tokens (B, T), h, c              -> logits (B, T, V), next_h, next_c
    score_graph       tokens (B, T), targets, h, c     -> log_probabilities (B, T), next_h, next_c
    generation_graph  prompt (B, P), uniform (N, B, A) -> words (N, B), next_h, next_c: N words in one run
    word_graph        word (B), uniform (B, A), state  -> next_word (B), next state: one word a run, for a GPU

All are made of the same two rooms: `Network` holds what the model computes, in the precision of its weights, and `draw` turns
logits into words. A graph is written anew wherever it is needed, by lmdist-export into files for every runtime, and by the
sampler straight into onnxruntime. So no graph of a stranger ever runs: of a bundle only weights are taken, whose place and
length the sizes decide. A graph for generation has just the nodes that its options need.

Why each graph is what it is says docs/sampling.md. This module knows no onnxruntime and reads no file.

Shapes: B rows, T words, P words of a prompt, N new words, A uniform numbers a word, V vocabulary (V' rounded up to whole
blocks), E embedding, H a layer's size, S the sum of the layers' sizes, K candidates.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np

from lmdist.text.vocabulary import END_ID, UNKNOWN_ID
from lmdist_export.graph.network import Network
from lmdist_export.graph.onnx_file import BOOL, FLOAT, INT32, INT64, Graph, model_bytes
from lmdist_export.graph.sampling_nodes import adjusted, draw, draw_inputs
from lmdist_export.graph.sizes import Sizes
from lmdist_export.options import Features

VERSION = 2


def step_graph(sizes: Sizes, location: str, run: str = "", *, cuda: bool = False, saturates: bool = False) -> bytes:
    """The graph that reads words and gives the logits after each."""
    g = Graph("lmdist_step")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    tokens = g.input("tokens", INT64, ["batch", "time"])
    hidden, *state = network.read(g, g("Transpose", tokens, perm=[1, 0]), *state_inputs(g, sizes))
    rows = g("Slice", network.logits(g, hidden), *(g.constant(np.array([n])) for n in (0, sizes.vocabulary_size, 1)))
    shape = g("Concat", *rows_then_words(g, tokens), g.constant(np.array([sizes.vocabulary_size])), axis=0)
    logits = g("Transpose", g("Reshape", rows, shape), perm=[1, 0, 2])
    g.output(logits, "logits", FLOAT, ["batch", "time", sizes.vocabulary_size])
    state_outputs(g, sizes, *state)
    return model_bytes(g, metadata("lmdist step graph", sizes, run))


def score_graph(sizes: Sizes, location: str, *, cuda: bool = False, saturates: bool = False) -> bytes:
    """The graph that reads words and gives the log-probability of the word after each."""
    g = Graph("lmdist_score")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    tokens = g.input("tokens", INT64, ["batch", "time"])
    targets = g.input("targets", INT64, ["batch", "time"])
    hidden, *state = network.read(g, g("Transpose", tokens, perm=[1, 0]), *state_inputs(g, sizes))
    logits = network.logits(g, hidden)  # (T*B, V')
    by_row = g("Reshape", g("Transpose", targets, perm=[1, 0]), g.constant(np.array([-1, 1])))
    scores = g("Sub", g("GatherElements", logits, by_row, axis=1), g("ReduceLogSumExp", logits, axes=[1]))  # (T*B, 1)
    shape = g("Concat", *rows_then_words(g, tokens), axis=0)
    g.output(g("Transpose", g("Reshape", scores, shape), perm=[1, 0]), "log_probabilities", FLOAT, ["batch", "time"])
    state_outputs(g, sizes, *state)
    return model_bytes(g, metadata("lmdist score graph", sizes, ""))


def generation_graph(
    sizes: Sizes, features: Features, location: str, run: str = "", *, cuda: bool = False, saturates: bool = False
) -> bytes:
    """The graph that reads prompts and makes N words after each, or fewer where all have stopped."""
    g = Graph("lmdist_generation")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    prompt = g.input("prompt", INT64, ["batch", "prompt_words"])
    lengths = g.input("lengths", INT64, ["batch"])
    h, c = state_inputs(g, sizes)
    uniform = g.input("uniform", FLOAT, ["new_words", "batch", features.attempts])
    bias = g.input("bias", FLOAT, [sizes.padded])
    stops = g.input("stops", INT64, ["stop_words"])
    going = g.input("going", BOOL, ["batch"])
    options = draw_inputs(g, sizes, features)

    # All words of a prompt but its last are read; the last one is the first that a step of the loop reads.
    last = g("Sub", lengths, g.constant(np.int64(1)))
    by_time = g("Transpose", prompt, perm=[1, 0])  # (P, B)
    _, h, c = network.read(g, by_time, h, c, last)
    word = g("GatherElements", prompt, g("Unsqueeze", last, g.constant(np.array([1]))), axis=1)  # (B, 1)
    word = g("Squeeze", word, g.constant(np.array([1])))
    bias = bias_after_scale(g, network, bias, options)

    layers = range(len(sizes.layer_sizes))
    body = g.body("word")
    carried = [
        ("word", INT64, ["batch"], word),
        ("going", BOOL, ["batch"], going),
        *((f"h_{layer}", FLOAT, ["batch", sizes.layer_sizes[layer]], h[layer]) for layer in layers),
        *((f"c_{layer}", FLOAT, ["batch", sizes.layer_sizes[layer]], c[layer]) for layer in layers),
        *([("counts", FLOAT, ["batch", sizes.padded], options["counts"])] if features.adjusted else []),
    ]
    place = body.input("place", INT64, [])
    body.input("condition", BOOL, [])
    names = {name: body.input(f"{name}_before", kind, shape) for name, kind, shape, _ in carried}
    numbers = body("Gather", uniform, place, axis=0)  # (B, A)
    drawn, mass, new_h, new_c, counts = word_after(body, network, features, names, bias, numbers, options)
    column = body.constant(np.array([1]))
    new_word = body("Squeeze", drawn, column)
    stopped = body("ReduceMax", body("Cast", body("Equal", drawn, stops), to=INT32), axes=[1], keepdims=0)
    new_going = body("And", names["going"], body("Equal", stopped, body.constant(np.int32(0))))
    any_going = body("Cast", body("ReduceMax", body("Cast", new_going, to=INT32), keepdims=0), to=BOOL)
    after = {"word": new_word, "going": new_going}
    after |= {f"h_{layer}": new_h[layer] for layer in layers} | {f"c_{layer}": new_c[layer] for layer in layers}
    if features.adjusted:
        after["counts"] = counts
    body.output(any_going, "go_on", BOOL, [])
    for name, kind, shape, _ in carried:
        body.output(after[name], f"{name}_after", kind, shape)
    body.output(new_word, "word_made", INT64, ["batch"])
    body.output(body("Squeeze", mass, column), "mass_made", FLOAT, ["batch"])

    trips = g("Squeeze", g("Slice", g("Shape", uniform), *(g.constant(np.array([n])) for n in (0, 1))))
    starts = [value for *_, value in carried]
    ends = g.several("Loop", len(carried) + 2, trips, g.constant(np.bool_(True)), *starts, body=body)
    result = dict(zip((name for name, *_ in carried), ends, strict=False))
    g.output(ends[-2], "words", INT64, ["made_words", "batch"])
    g.output(ends[-1], "mass", FLOAT, ["made_words", "batch"])
    g.output(result["going"], "next_going", BOOL, ["batch"])
    state_outputs(g, sizes, [result[f"h_{layer}"] for layer in layers], [result[f"c_{layer}"] for layer in layers])
    if features.adjusted:
        g.output(result["counts"], "next_counts", FLOAT, ["batch", sizes.padded])
    return model_bytes(g, metadata("lmdist generation graph", sizes, run) | {"features": json.dumps(asdict(features))})


def word_graph(sizes: Sizes, features: Features, location: str, *, cuda: bool = False, saturates: bool = False) -> bytes:
    """The graph that makes one word a row, for a device where a Loop would come back to the host for each of its nodes.

    What goes from word to word has an input NAME and an output next_NAME of the same shape, the layers' states one by one:
    onnxruntime cuts and joins parts of unequal lengths by tables that it copies from the host, and a CUDA graph replays the
    copy and not the table. For the same reason nothing here asks for a shape, unless an option needs it (`capturable`).
    """
    g = Graph("lmdist_word")
    network = Network(sizes, g, location, cuda=cuda, saturates=saturates)
    states = {name: [f"{name}_{layer}" for layer in range(len(sizes.layer_sizes))] for name in ("h", "c")}
    before = {"word": g.input("word", INT64, ["batch"])}
    for names in states.values():
        before |= {name: g.input(name, FLOAT, ["batch", size]) for name, size in zip(names, sizes.layer_sizes, strict=True)}
    mass = g.input("mass", FLOAT, ["batch", 1])
    uniform = g.input("uniform", FLOAT, ["batch", features.attempts])
    bias = g.input("bias", FLOAT, [sizes.padded])
    options = draw_inputs(g, sizes, features)
    before |= {"counts": options["counts"]} if features.adjusted else {}
    bias = bias_after_scale(g, network, bias, options)
    drawn, of_word, h, c, counts = word_after(g, network, features, before, bias, uniform, options)
    g.output(g("Squeeze", drawn, g.constant(np.array([1]))), "next_word", INT64, ["batch"])
    for names, parts in ((states["h"], h), (states["c"], c)):
        for name, part, size in zip(names, parts, sizes.layer_sizes, strict=True):
            g.output(part, f"next_{name}", FLOAT, ["batch", size])
    # Added up, for what is not finite stays so: it is looked at once, after the last word.
    g.output(g("Add", mass, of_word), "next_mass", FLOAT, ["batch", 1])
    if features.adjusted:
        g.output(counts, "next_counts", FLOAT, ["batch", sizes.padded])
    return model_bytes(g, metadata("lmdist word graph", sizes, ""))


def capturable(sizes: Sizes, features: Features) -> bool:
    """Whether all of a word graph runs as a CUDA graph: no Loop, no shape, and no table that is copied from the host."""
    return not (features.sorted or features.attempts > 1 or sizes.cutoffs)


def bias_after_scale(g: Graph, network: Network, bias: str, options: dict[str, str]) -> str:
    """What `Network.logits` is to add: `bias` (V') and the model's own, over the temperature as the logits are."""
    if network.sizes.cutoffs:
        return bias
    bias = g("Add", bias, network.weight("projection.bias"))
    return g("Mul", bias, options["inverse_temperature"]) if "inverse_temperature" in options else bias


def word_after(
    g: Graph, network: Network, features: Features, before: dict[str, str], bias: str, uniform: str, options: dict[str, str]
) -> tuple[str, str, list[str], list[str], str]:
    """The word after `before`: drawn (B, 1) and its `draw` mass (B, 1), then the layers' new h and c, and the new counts."""
    layers = range(len(network.sizes.layer_sizes))
    h, c = network.step(
        g, before["word"], [before[f"h_{layer}"] for layer in layers], [before[f"c_{layer}"] for layer in layers]
    )
    logits = network.logits(g, h[-1], bias, options.get("inverse_temperature", ""))
    if features.adjusted:
        logits = adjusted(g, logits, before["counts"], options)
    drawn, mass = draw(g, network.sizes, features, logits, uniform, options, cuda=network.cuda)
    # Weights of a stranger may make words likely that are beyond the vocabulary, where nothing can be read.
    drawn = g("Min", drawn, g.constant(np.int64(network.sizes.vocabulary_size - 1)))
    if not features.adjusted:
        return drawn, mass, h, c, ""
    one_more = g("Add", g("GatherElements", before["counts"], drawn, axis=1), g.constant(np.float32(1)))
    return drawn, mass, h, c, g("ScatterElements", before["counts"], drawn, one_more, axis=1)


def metadata(what: str, sizes: Sizes, run: str) -> dict[str, str]:
    """What stands in a graph's file, each value JSON, for a runtime that has nothing else."""
    values = {
        "format": what,
        "version": VERSION,
        **asdict(sizes),
        "eos_id": END_ID,
        "unknown_id": UNKNOWN_ID,
        "run": run,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def rows_then_words(g: Graph, tokens: str) -> tuple[str, str]:
    """T and B of `tokens` (B, T), each as a shape of one number."""
    shape = g("Shape", tokens)
    return g("Gather", shape, g.constant(np.array([1]))), g("Gather", shape, g.constant(np.array([0])))


def state_inputs(g: Graph, sizes: Sizes) -> tuple[list[str], list[str]]:
    """The state that goes in, (B, S) for h and for c, as the layers' parts (B, H)."""
    parts = []
    for name in ("h", "c"):
        value = g.input(name, FLOAT, ["batch", sizes.state_size])
        parts.append(g.several("Split", len(sizes.layer_sizes), value, g.constant(np.array(sizes.layer_sizes)), axis=1))
    return parts[0], parts[1]


def state_outputs(g: Graph, sizes: Sizes, h: list[str], c: list[str]) -> None:
    """The state that comes out: the layers' parts side by side."""
    for name, parts in (("next_h", h), ("next_c", c)):
        g.output(g("Concat", *parts, axis=1), name, FLOAT, ["batch", sizes.state_size])
