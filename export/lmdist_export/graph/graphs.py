"""The graphs of a bundle, built from the sizes in its manifest.

    step_graph        tokens (B, T), h, c              -> logits (B, T, V), next_h, next_c
    score_graph       tokens (B, T), targets, h, c     -> log_probabilities (B, T), next_h, next_c
    next_graph        tokens (B, T), h, c, memory      -> log_probabilities (B, V) after the last token, next state
    generation_graph  prompt (B, P), uniform (N, B, A) -> words (N, B), next_h, next_c: N tokens a call
    embedding_graph   tokens (B)                       -> embeddings (B, E)
    token_graph       word (B), uniform (B, A), state  -> next_word (B), next state: one token a call, for a GPU

All have the same two parts: `Network` computes the logits, in the precision of its weights, and `SamplingNodes` samples tokens.
A graph is built wherever it is needed: by lmdist-export into files for every runtime, by the sampler straight into onnxruntime.
So no graph of a stranger ever runs: a bundle provides weights only, and the sizes decide where they lie and how long they are.
A graph for generation has just the nodes that its options need. Only a graph that asks for the neural cache (cache.py) has its
memory in the state, of which generation_graph returns what is new; the graphs in files never do.

Names with `word` in them (the output `words`, the axes `prompt_words`, `new_words` and `made_words`) and the names inside the
Loop are bytes of generate.onnx. They stay as they are, so that equal checkpoints have equal files.

docs/sampling-internals.md has the reasons. This module knows no onnxruntime and reads no file.

Shapes: B batch, T tokens, P tokens of a prompt, N new tokens, A uniform numbers a token, V vocabulary (V' rounded up to whole
blocks), E embedding, H a layer's size, S the sum of the layers' sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lmdist.text.vocabulary import END_ID, UNKNOWN_ID
from lmdist_export.graph.cache import (
    LAST,
    CacheNodes,
    Memory,
    Past,
    by_text,
    cache_inputs,
    cache_outputs,
    join,
    no_pairs,
    pair_outputs,
    slice_of,
)
from lmdist_export.graph.cell import STATE
from lmdist_export.graph.network import Network, StateNames, Target
from lmdist_export.graph.onnx_file import BOOL, FLOAT, INT32, INT64, Graph, OnnxModel, Shape, model_of
from lmdist_export.graph.sampling_nodes import SamplingNodes, any_of, option_inputs
from lmdist_export.graph.sizes import Sizes
from lmdist_export.graph.value_docs import DOCS, GENERATION_DOC, STEP_DOC
from lmdist_export.options import Features

VERSION = 2


def step_graph(sizes: Sizes, target: Target, run: str = "") -> OnnxModel:
    """Return the graph that reads tokens and outputs the logits after each."""
    g = Graph("lmdist_step", doc=STEP_DOC, docs=DOCS)
    network = Network(sizes, g, target)
    tokens = g.input("tokens", INT64, ["batch", "time"])
    hidden, state = network.prefill(g, g("Transpose", tokens, perm=[1, 0]), state_inputs(g, sizes))
    rows = g("Slice", network.logits(g, hidden), *(g.constant(np.array([n])) for n in (0, sizes.vocabulary_size, 1)))
    shape = g("Concat", *time_and_batch(g, tokens), g.constant(np.array([sizes.vocabulary_size])), axis=0)
    logits = g("Transpose", g("Reshape", rows, shape), perm=[1, 0, 2])
    g.output(logits, "logits", FLOAT, ["batch", "time", sizes.vocabulary_size])
    state_outputs(g, sizes, state)
    return model_of(g, metadata("lmdist step graph", sizes, run))


def embedding_graph(sizes: Sizes, target: Target) -> OnnxModel:
    """Return the graph that outputs the embeddings of tokens."""
    g = Graph("lmdist_embedding")
    tokens = g.input("tokens", INT64, ["batch"])
    g.output(Network(sizes, g, target).embeddings(g, tokens), "embeddings", FLOAT, ["batch", sizes.embedding_size])
    return model_of(g, metadata("lmdist embedding graph", sizes, ""))


def score_graph(sizes: Sizes, target: Target, cached: bool = False) -> OnnxModel:
    """Return the graph that reads tokens and outputs the log-probability of the target after each, `cached` or without."""
    g = Graph("lmdist_score")
    network = Network(sizes, g, target)
    tokens = g.input("tokens", INT64, ["batch", "time"])
    targets = g.input("targets", INT64, ["batch", "time"])
    by_time = g("Transpose", tokens, perm=[1, 0])
    before = state_inputs(g, sizes)
    hidden, state = network.prefill(g, by_time, before)
    logits = network.logits(g, hidden)  # (T*B, V')
    by_row = g("Reshape", g("Transpose", targets, perm=[1, 0]), g.constant(np.array([-1, 1])))
    scores = g("Sub", g("GatherElements", logits, by_row, axis=1), g("ReduceLogSumExp", logits, axes=[1]))  # (T*B, 1)
    shape = g("Concat", *time_and_batch(g, tokens), axis=0)
    scores = g("Transpose", g("Reshape", scores, shape), perm=[1, 0])  # (B, T)
    if cached:
        cache, memory = cache_inputs(g, sizes)
        hidden = by_text(g, hidden, tokens, sizes.layer_sizes[-1])  # (B, T, H)
        pairs = cache.pairs(g, before[-1][0], hidden, tokens)
        scores = cache.mixed_scores(g, scores, hidden, targets, memory, pairs)
        cache_outputs(g, sizes, cache.remember(g, memory, pairs))
    g.output(scores, "log_probabilities", FLOAT, ["batch", "time"])
    state_outputs(g, sizes, state)
    return model_of(g, metadata("lmdist score graph", sizes, ""))


def next_graph(sizes: Sizes, target: Target) -> OnnxModel:
    """Return the graph that reads tokens and outputs the log-probabilities after the last one, with the cache."""
    g = Graph("lmdist_next")
    network = Network(sizes, g, target)
    tokens = g.input("tokens", INT64, ["batch", "time"])
    before = state_inputs(g, sizes)
    cache, memory = cache_inputs(g, sizes)
    hidden, state = network.prefill(g, g("Transpose", tokens, perm=[1, 0]), before)
    hidden = by_text(g, hidden, tokens, sizes.layer_sizes[-1])  # (B, T, H)
    pairs = cache.pairs(g, before[-1][0], hidden, tokens)
    last = g("Squeeze", slice_of(g, hidden, -1, LAST), g.constant(np.array([1])))  # (B, H)
    scores = cache.mixture(g, network.logits(g, last), last, cache.past(g, memory, pairs))
    g.output(slice_of(g, scores, 0, sizes.vocabulary_size), "log_probabilities", FLOAT, ["batch", sizes.vocabulary_size])
    state_outputs(g, sizes, state)
    cache_outputs(g, sizes, cache.remember(g, memory, pairs))
    return model_of(g, metadata("lmdist next graph", sizes, ""))


def generation_graph(
    sizes: Sizes, features: Features, target: Target, run: str = "", *, reads_prompts: bool = True
) -> OnnxModel:
    """Return the graph that reads prompts and generates N tokens after each, or fewer where all have stopped.

    Without `reads_prompts` each row has but one token to read, as most calls do, and there are no nodes for others.
    """
    assert reads_prompts or not features.cached, features
    g = Graph("lmdist_generation", doc=GENERATION_DOC, docs=DOCS)
    network = Network(sizes, g, target)
    prompt = g.input("prompt", INT64, ["batch", "prompt_words" if reads_prompts else 1])
    lengths = g.input("lengths", INT64, ["batch"]) if reads_prompts else ""
    state = state_inputs(g, sizes)
    uniform = g.input("uniform", FLOAT, ["new_words", "batch", features.attempts])
    bias = g.input("bias", FLOAT, [sizes.padded])
    stops = g.input("stops", INT64, ["stop_words"])
    going = g.input("going", BOOL, ["batch"])
    options = option_inputs(g, sizes, features)

    # All tokens of a prompt but its last are prefilled; the last one is the first that the loop reads.
    before, hidden, last, token = state[-1][0], "", "", prompt
    if reads_prompts:
        last = g("Sub", lengths, g.constant(np.int64(1)))
        with g.within("prefill"):
            hidden, state = network.prefill(g, g("Transpose", prompt, perm=[1, 0]), state, last)
        token = g("GatherElements", prompt, g("Unsqueeze", last, g.constant(np.array([1]))), axis=1)  # (B, 1)
    token = g("Squeeze", token, g.constant(np.array([1])))
    sampling = SamplingNodes(sizes, features, options, target.cuda)
    starts = {"word": token, "going": going, **by_name(state)} | ({"counts": options["counts"]} if features.adjusted else {})
    if features.cached:
        cache, memory = cache_inputs(g, sizes, options["cache_weight"])
        hidden = by_text(g, hidden, prompt, sizes.layer_sizes[-1])  # (B, P, H)
        past = cache.past(g, memory, cache.pairs(g, before, hidden, prompt), last)
        decoder = Decoder(network, sampling, bias, cache, past)
        starts |= dict(zip(ADDED, no_pairs(g, memory), strict=True))
    else:
        decoder = Decoder(network, sampling, bias_after_scale(g, network, bias, options))
    tokens, mass, ends = loop(g, decoder, starts, uniform, stops)
    g.output(tokens, "words", INT64, ["made_words", "batch"])
    g.output(mass, "mass", FLOAT, ["made_words", "batch"])
    g.output(ends["going"], "next_going", BOOL, ["batch"])
    state_outputs(g, sizes, by_layer(ends, len(sizes.layer_sizes)))
    if features.adjusted:
        g.output(ends["counts"], "next_counts", FLOAT, ["batch", sizes.padded])
    if decoder.past:
        pair_outputs(g, sizes, join(g, decoder.past.parts[-1], Memory(*(ends[name] for name in ADDED))))
    return model_of(g, metadata("lmdist generation graph", sizes, run) | {"features": features_in_file(features)})


def loop(g: Graph, decoder: Decoder, starts: Mapping[str, str], uniform: str, stops: str) -> tuple[str, str, dict[str, str]]:
    """Add the Loop over new tokens, which carries the values `starts`; return the tokens (N, B), their mass, and its ends.

    Of a cache it carries only the pairs that it has added: a value that it carries is copied for each token.
    """
    shapes = carried_shapes(decoder.network.sizes)
    body = loop_body(g, decoder, {name: shapes[name] for name in starts}, uniform, stops)
    num_tokens = g("Squeeze", g("Slice", g("Shape", uniform), *(g.constant(np.array([n])) for n in (0, 1))))
    always = g.constant(np.bool_(True))
    *ends, tokens, mass = g.several("Loop", len(starts) + 2, num_tokens, always, *starts.values(), body=body)
    return tokens, mass, dict(zip(starts, ends, strict=True))


def loop_body(g: Graph, decoder: Decoder, shapes: Mapping[str, tuple[int, Shape]], uniform: str, stops: str) -> Graph:
    """Return the body of the Loop over new tokens; `shapes` are those of the values that it carries."""
    body = g.subgraph("word")
    place = body.input("place", INT64, [])
    body.input("condition", BOOL, [])
    before = {name: body.input(f"{name}_before", kind, shape) for name, (kind, shape) in shapes.items()}
    with body.within("token"):
        numbers = body("Gather", uniform, place, axis=0)  # (B, A)
        sampled, mass, after = decoder.next_token(body, before, numbers)
    axis = body.constant(np.array([1]))
    token = body("Squeeze", sampled, axis)  # (B)
    stopped = body("ReduceMax", body("Cast", body("Equal", sampled, stops), to=INT32), axes=[1], keepdims=0)
    going = body("And", before["going"], body("Equal", stopped, body.constant(np.int32(0))))
    after |= {"word": token, "going": going}
    body.output(any_of(body, going), "go_on", BOOL, [])
    for name, (kind, shape) in shapes.items():
        body.output(after[name], f"{name}_after", kind, [f"next_{axis}" if axis == "added" else axis for axis in shape])
    body.output(token, "word_made", INT64, ["batch"])
    body.output(body("Squeeze", mass, axis), "mass_made", FLOAT, ["batch"])
    return body


def token_graph(sizes: Sizes, features: Features, target: Target) -> OnnxModel:
    """Return the graph that generates one token of each row, for a device where a Loop returns to the host for each node.

    What is carried from token to token has an input NAME and an output next_NAME of the same shape, each layer's state apart:
    onnxruntime splits and joins parts of unequal lengths by tables that it copies from the host, and a CUDA graph replays the
    copy and not the table. For the same reason no node asks for a shape, unless an option needs it (`capturable`).
    """
    g = Graph("lmdist_word")
    network = Network(sizes, g, target)
    before = {"word": g.input("word", INT64, ["batch"])}
    before |= {name: g.input(name, *shape) for name, shape in state_shapes(sizes).items()}
    mass = g.input("mass", FLOAT, ["batch", 1])
    uniform = g.input("uniform", FLOAT, ["batch", features.attempts])
    bias = g.input("bias", FLOAT, [sizes.padded])
    options = option_inputs(g, sizes, features)
    before |= {"counts": options["counts"]} if features.adjusted else {}
    sampling = SamplingNodes(sizes, features, options, target.cuda)
    decoder = Decoder(network, sampling, bias_after_scale(g, network, bias, options))
    sampled, of_token, after = decoder.next_token(g, before, uniform)
    g.output(g("Squeeze", sampled, g.constant(np.array([1]))), "next_word", INT64, ["batch"])
    for name, shape in state_shapes(sizes).items():
        g.output(after[name], f"next_{name}", *shape)
    # A sum, because it stays not finite: it is checked once, after the last token.
    g.output(g("Add", mass, of_token), "next_mass", FLOAT, ["batch", 1])
    if features.adjusted:
        g.output(after["counts"], "next_counts", FLOAT, ["batch", sizes.padded])
    return model_of(g, metadata("lmdist word graph", sizes, ""))


def capturable(sizes: Sizes, features: Features) -> bool:
    """Return whether a token graph runs as a CUDA graph: it has no Loop, no shape, and no table copied from the host."""
    return not (features.sorted or features.attempts > 1 or sizes.cutoffs)


# --- what the graphs share -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """Network and sampling together: from a token to the next."""

    network: Network
    sampling: SamplingNodes
    bias: str
    """What is added to logits after their scale, of `bias_after_scale`; with a cache before it, and (V')."""
    cache: CacheNodes | None = None
    past: Past | None = None
    """What is remembered before the first new token."""

    def next_token(self, g: Graph, before: Mapping[str, str], uniform: str) -> tuple[str, str, dict[str, str]]:
        """Return the token after `before` (B, 1), its mass (B, 1) of `SamplingNodes.sample`, and the values carried on."""
        sizes, features, options = self.network.sizes, self.sampling.features, self.sampling.options
        state_before = by_layer(before, len(sizes.layer_sizes))
        state = self.network.step(g, before["word"], state_before)
        added = None
        if self.cache and self.past:
            logits = self.network.logits(g, state[-1][0])
            with g.within("cache"):
                pair = self.cache.pair(g, state_before[-1][0], g("Unsqueeze", before["word"], g.constant(np.array([1]))))
                added = join(g, Memory(*(before[name] for name in ADDED)), pair)
                logits = self.cache.mixture(g, logits, state[-1][0], self.cache.with_added(g, self.past, added))
            logits = g("Add", logits, self.bias)
            logits = g("Mul", logits, options["inverse_temperature"]) if "inverse_temperature" in options else logits
        else:
            logits = self.network.logits(g, state[-1][0], self.bias, options.get("inverse_temperature", ""))
        if features.adjusted:
            with g.within("penalties"):
                logits = self.sampling.penalize(g, logits, before["counts"])
        with g.within("sampling"):
            token, mass = self.sampling.sample(g, logits, uniform)
        # A stranger's weights may sample the padding of the vocabulary, which has no embedding.
        token = g("Min", token, g.constant(np.int64(sizes.vocabulary_size - 1)))
        after = by_name(state) | (dict(zip(ADDED, added, strict=True)) if added else {})
        if features.adjusted:
            one_more = g("Add", g("GatherElements", before["counts"], token, axis=1), g.constant(np.float32(1)))
            after["counts"] = g("ScatterElements", before["counts"], token, one_more, axis=1)
        return token, mass, after


def bias_after_scale(g: Graph, network: Network, bias: str, options: Mapping[str, str]) -> str:
    """Return what `Network.logits` adds: `bias` (V') and the model's own, over the temperature as the logits are."""
    if network.sizes.cutoffs:
        return bias
    bias = g("Add", bias, network.weight("projection.bias"))
    return g("Mul", bias, options["inverse_temperature"]) if "inverse_temperature" in options else bias


NOT_IN_FILES = {"cached"}
"""Features that no graph in a file has."""


def features_in_file(features: Features) -> str:
    """Return the features that a graph's file names, as JSON."""
    return json.dumps({name: value for name, value in asdict(features).items() if name not in NOT_IN_FILES})


def metadata(what: str, sizes: Sizes, run: str) -> dict[str, str]:
    """Return the metadata of a graph's file, each value JSON, for a runtime that has nothing else."""
    values = {
        "format": what,
        "version": VERSION,
        **asdict(sizes),
        "eos_id": END_ID,
        "unknown_id": UNKNOWN_ID,
        "run": run,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def time_and_batch(g: Graph, tokens: str) -> tuple[str, str]:
    """Return T and B of `tokens` (B, T), each as a shape of one number."""
    shape = g("Shape", tokens)
    return g("Gather", shape, g.constant(np.array([1]))), g("Gather", shape, g.constant(np.array([0])))


# --- the state: a value for each part of each layer, or the layers' side by side --------------------------------------


ADDED = ("added_hidden", "added_tokens")
"""The parts of the memory that the Loop has added."""


def carried_shapes(sizes: Sizes) -> dict[str, tuple[int, Shape]]:
    """Return type and shape of all that the Loop may carry; the axis `added` grows by one with each token."""
    hidden, tokens = ADDED
    return {
        "word": (INT64, ["batch"]),
        "going": (BOOL, ["batch"]),
        **state_shapes(sizes),
        "counts": (FLOAT, ["batch", sizes.padded]),
        hidden: (FLOAT, ["batch", "added", sizes.layer_sizes[-1]]),
        tokens: (INT64, ["batch", "added"]),
    }


def state_shapes(sizes: Sizes) -> dict[str, tuple[int, Shape]]:
    """Return type and shape of the parts of the state by their names: h_0, h_1, ..., c_0, c_1, ..."""
    return {f"{part}_{layer}": (FLOAT, ["batch", size]) for part in STATE for layer, size in enumerate(sizes.layer_sizes)}


def by_name(state: StateNames) -> dict[str, str]:
    """Return the values of a state by their names."""
    return {f"{part}_{layer}": values[place] for place, part in enumerate(STATE) for layer, values in enumerate(state)}


def by_layer(values: Mapping[str, str], layers: int) -> StateNames:
    """Return the state of each layer from values by their names."""
    return [[values[f"{part}_{layer}"] for part in STATE] for layer in range(layers)]


def state_inputs(g: Graph, sizes: Sizes) -> StateNames:
    """Declare the state's inputs, (B, S) each, and return the layers' parts (B, H)."""
    parts: list[Sequence[str]] = []
    for name in STATE:
        value = g.input(name, FLOAT, ["batch", sizes.state_size])
        parts.append(g.several("Split", len(sizes.layer_sizes), value, g.constant(np.array(sizes.layer_sizes)), axis=1))
    return list(zip(*parts, strict=True))


def state_outputs(g: Graph, sizes: Sizes, state: StateNames) -> None:
    """Declare the state's outputs, (B, S) each."""
    for name, parts in zip(STATE, zip(*state, strict=True), strict=True):
        g.output(g("Concat", *parts, axis=1), f"next_{name}", FLOAT, ["batch", sizes.state_size])
