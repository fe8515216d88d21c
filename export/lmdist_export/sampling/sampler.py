"""onnxruntime: opens a bundle's graphs, carries the state, reads, scores and makes words.

    sampler = Sampler(Bundle.load(Path("bundle")))
    prompt = sampler.read(sampler.start([[END_ID, 17, 4]]))     # a prompt is read once,
    state = prompt.fork(4, seed=1)                              # goes on as 4 texts,
    words, state = sampler.make(state, config, 100)             # 100 words of each, (100, 4),
    words, state = sampler.make(state, config, 100)             # and 100 more

A graph is made for what is asked of it (graph.py), when it is first needed. This
module does not know when a text ends (generation.py). No torch and no onnx: a machine that samples has neither.

Shapes: B rows, T words, P words of a prompt, N new words, V vocabulary (V' rounded up to whole blocks), S the sum of the
layers' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import DataError, UsageError
from lmdist_export.bundle import WEIGHTS, Bundle
from lmdist_export.graph.graphs import generation_graph, score_graph, step_graph
from lmdist_export.options import ROLES, Features, GenerationConfig, features_of, graph_inputs
from lmdist_export.sampling.runtime import Runtime
from lmdist_export.sampling.state import ModelState, State, copied, uniform_numbers
from lmdist_export.sampling.word_session import WordSession

PREFILL_WORDS = 64  # a context is read in pieces of so many words: their logits are (1, 64, V), and only the last count
READ_AT_ONCE = 512  # words of a prompt in one run: they take room for their gates, (512, B, 4H)
LOGITS_AT_ONCE = 2**23  # numbers in the logits of one run: 32 MiB


class Sampler:
    """A bundle in onnxruntime: it reads words, scores them and makes new ones."""

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int = 0) -> None:
        self.bundle = bundle
        self.sizes = bundle.sizes
        self.runtime = Runtime(bundle.folder, bundle.sizes, provider, threads)
        self.generation: dict[Features, Any] = {}
        self.words: dict[Features, WordSession] = {}
        self.by_word = provider == "cuda"
        """Whether words are made one a run, with the state on the device: a Loop waits for a GPU at each of its words."""

    @cached_property
    def step_session(self) -> Any:
        """The step graph."""
        return self.runtime.open(step_graph)

    @cached_property
    def score_session(self) -> Any:
        """The graph that scores."""
        return self.runtime.open(score_graph)

    def generation_session(self, features: Features) -> Any:
        """The generation graph that has these features."""
        if features not in self.generation:
            self.generation[features] = self.runtime.open(partial(generation_graph, features=features))
        return self.generation[features]

    def word_session(self, features: Features) -> WordSession:
        """The word graph that has these features."""
        if features not in self.words:
            self.words[features] = WordSession(self.runtime, features)
        return self.words[features]

    # --- reading

    def initial_state(self, rows: int) -> ModelState:
        """The state before the first word: zeros, (rows, S) each."""
        shape = rows, self.sizes.state_size
        return np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def step(self, tokens: NDArray[np.int64], state: ModelState) -> tuple[NDArray[np.float32], ModelState]:
        """Read `tokens` (B, T) from `state` on; give the logits (B, T, V) after each word, and the state after all."""
        assert tokens.ndim == 2, tokens.shape
        h, c = state
        logits, h, c = self.step_session.run(["logits", "next_h", "next_c"], {"tokens": tokens, "h": h, "c": c})
        return self.finite(logits), (h, c)

    def prefill(self, context: Sequence[int]) -> tuple[NDArray[np.float32], ModelState]:
        """Read `context` from the state before the first word; give the logits (1, V) of the word after it, and the state."""
        assert len(context) > 0, "there is no word after nothing: a text begins with the end mark"
        state = self.initial_state(1)
        logits = np.empty(0, np.float32)
        for start in range(0, len(context), PREFILL_WORDS):
            tokens = np.array([context[start : start + PREFILL_WORDS]], np.int64)  # (1, T)
            logits, state = self.step(tokens, state)
        return logits[:, -1], state  # (1, V)

    def score(
        self, tokens: NDArray[np.int64], targets: NDArray[np.int64], state: ModelState | None = None
    ) -> tuple[NDArray[np.float32], ModelState]:
        """The log-probability, in nats, of each of `targets` (B, T) after `tokens` (B, T) up to its place; and the state.

        Read from `state` on, from the state before the first word where there is none. The logits of LOGITS_AT_ONCE places
        are held at a time, whatever B and T. Rows may be padded on the right: what belongs to the padding means nothing.
        """
        assert tokens.shape == targets.shape, (tokens.shape, targets.shape)
        rows, length = tokens.shape
        h, c = state or self.initial_state(rows)
        next_h, next_c = np.empty_like(h), np.empty_like(c)
        result = np.empty((rows, length), np.float32)
        places = max(1, LOGITS_AT_ONCE // self.sizes.padded)
        window = max(1, places // rows)
        for top in range(0, rows, places):
            part = slice(top, top + places)
            after = h[part], c[part]
            for start in range(0, length, window):
                piece = part, slice(start, start + window)
                feed = {"tokens": tokens[piece], "targets": targets[piece], "h": after[0], "c": after[1]}
                found, *after = self.score_session.run(["log_probabilities", "next_h", "next_c"], feed)
                result[piece] = self.finite(found)
            next_h[part], next_c[part] = after
        return result, (next_h, next_c)

    # --- making words

    def start(self, prompts: Sequence[Sequence[int]]) -> State:
        """The state of texts that begin with `prompts`, of which nothing was read yet; none may be empty."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        assert all(lengths), "there is no word after nothing: a text begins with the end mark"
        words = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            words[row, : len(prompt)] = prompt
        return State(words, lengths, *self.initial_state(len(prompts)))

    def read(self, state: State, config: GenerationConfig | None = None) -> State:
        """The state after reading all words but the last of each row: what goes on from it reads them no more.

        With the `config` of the words to be made their graph serves for it.
        """
        config = config or GenerationConfig()
        while True:
            piece = replace(
                state.seeded(0), words=state.words[:, :READ_AT_ONCE], lengths=np.minimum(state.lengths, READ_AT_ONCE)
            )
            after = self.make(piece, config, 0)[1]
            rest = state.words[:, READ_AT_ONCE:]
            if not rest.size:
                return replace(after, generators=state.generators)
            # The last word of a piece is still to be read; of a row that is at its end it is the only one.
            words = np.concatenate([after.words, rest], axis=1)
            state = replace(state, words=words, lengths=np.maximum(1, state.lengths - READ_AT_ONCE + 1), h=after.h, c=after.c)

    def make(
        self,
        state: State,
        config: GenerationConfig,
        words: int,
        stops: Sequence[int] = (),
        bias: NDArray[np.float32] | None = None,
        row_bias: NDArray[np.float32] | None = None,
        in_prompt: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], State]:
        """Make N = `words` words of each text in one run, (N, B), fewer where all have made one of `stops`; and the state then.

        A text goes on after its stop where others have not come to theirs. `bias` (V) is added to all logits, `row_bias`
        (B, V) to each row's; `in_prompt` (B, V) says which words a repetition penalty finds in the prompts. Raises UsageError
        for a state of another model.
        """
        self.expect_own(state)
        features = features_of(config, row_bias is not None)
        rows, wanted = len(state), features.attempts
        assert len(state.generators) == rows, "a text draws no words before it is seeded"
        options = option_feed(config, features, self.sizes.vocabulary_size)
        feed: dict[str, Any] = options | {
            "prompt": state.words,
            "lengths": state.lengths,
            "h": state.h,
            "c": state.c,
            "stops": np.array([*stops, -1], np.int64),  # no word is -1
            "going": np.ones(rows, np.bool_),
            "bias": self.padded(np.zeros(self.sizes.vocabulary_size, np.float32) if bias is None else bias),
        }
        if features.adjusted:
            empty = np.zeros((rows, self.sizes.padded), np.float32)
            nobody = np.zeros((rows, self.sizes.vocabulary_size), np.bool_)
            # The graph's logits are over the temperature already, and so is all that is added to them.
            inverse = options.get("inverse_temperature", np.float32(1))
            feed |= {
                "counts": empty if state.counts is None else state.counts,
                "in_prompt": self.padded(nobody if in_prompt is None else in_prompt),
                "row_bias": empty[:1] if row_bias is None else self.padded(row_bias) * inverse,
            }
        generators = tuple(map(copied, state.generators))
        feed["uniform"] = uniform_numbers(generators, words, wanted)
        if self.by_word and words:
            if state.words.shape[1] > 1:
                _, _, feed["h"], feed["c"], *_ = self.run_generation(features, feed | {"uniform": feed["uniform"][:0]})
            found = self.word_session(features).make(feed)
        else:
            found = self.run_generation(features, feed)
        made, mass, h, c = found[0].reshape(-1, rows), *found[1:4]  # of no words at all onnxruntime forgets the rows
        self.finite(mass)
        if len(made) < words:  # what was not used is still to come
            generators = tuple(map(copied, state.generators))
            uniform_numbers(generators, len(made), wanted)
        last = made[-1] if len(made) else np.take_along_axis(state.words, state.lengths[:, None] - 1, axis=1)[:, 0]
        after = State(last[:, None], np.ones(rows, np.int64), h, c, generators, found[4] if features.adjusted else state.counts)
        return made, after

    def expect_own(self, state: State) -> None:
        """Raise UsageError where a state is not of this model, as far as shapes and ids show it."""
        rows, size, vocabulary = len(state), self.sizes.state_size, self.sizes.vocabulary_size
        for name, array, expected in (
            ("h", state.h, (rows, size)),
            ("c", state.c, (rows, size)),
            ("counts", state.counts, (rows, self.sizes.padded)),
        ):
            if array is not None and array.shape != expected:
                raise UsageError(f"the state is not this model's: the shape of {name} is {array.shape}; {expected} is expected")
        if state.words.max() >= vocabulary:
            raise UsageError(
                f"the state is not this model's: the id of a word is {state.words.max()}; one below {vocabulary} is expected"
            )

    def run_generation(self, features: Features, feed: dict[str, Any]) -> list[NDArray[Any]]:
        """Run the generation graph: words (N, B), mass, next_h, next_c and, if there are any, counts."""
        session = self.generation_session(features)
        names = ["words", "mass", "next_h", "next_c", *(["next_counts"] if features.adjusted else [])]
        return session.run(names, {value.name: np.asarray(feed[value.name]) for value in session.get_inputs()})

    def padded(self, values: NDArray[Any]) -> NDArray[Any]:
        """(..., V) as (..., V')."""
        beyond = self.sizes.padded - self.sizes.vocabulary_size
        return np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, beyond)])

    def finite(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same values; raises DataError where they are no numbers to draw from.

        Seen here and not when the weights are read, for that would take longer than the first words do.
        """
        if not np.isfinite(values).all():
            raise DataError(
                f"{self.bundle.folder / WEIGHTS} gives logits that are not finite: these are the weights of no trained model"
            )
        return values


def option_feed(config: GenerationConfig, features: Features, vocabulary_size: int) -> dict[str, NDArray[Any]]:
    """Return the inputs of a graph with these features that are options of `config`."""
    feed: dict[str, NDArray[Any]] = {}
    inverse_temperature = np.ones((), np.float32)
    for name, graph in (item for role in ROLES for item in graph_inputs(features, role).items()):
        value = np.full(graph.shape, graph.value(getattr(config, name), vocabulary_size), graph.dtype)
        if graph.role == "temperature":
            inverse_temperature = value
        feed[graph.name or name] = np.asarray(value * inverse_temperature) if graph.per_temperature else value
    return feed


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The logarithms of the probabilities (..., V) that logits (..., V) stand for."""
    below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
