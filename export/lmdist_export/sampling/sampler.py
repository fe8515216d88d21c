"""onnxruntime: opens a bundle's graphs, carries the state, reads, scores and makes words.

    sampler = Sampler(Bundle.load(Path("bundle")))
    prompt = sampler.read(sampler.start([[END_ID, 17, 4]]))     # a prompt is read once,
    state = prompt.fork(4, seed=1)                              # goes on as 4 texts,
    words, state = sampler.make(state, config, 100)             # 100 words of each, (100, 4),
    words, state = sampler.make(state, config, 100)             # and 100 more

The only file that imports onnxruntime. A graph is made for what is asked of it (graph.py), when it is first needed. This
module does not know when a text ends (generation.py). No torch and no onnx: a machine that samples has neither.

Shapes: B rows, T words, P words of a prompt, N new words, V vocabulary (V' rounded up to whole blocks), S the sum of the
layers' sizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdist.cpus import available_cpus
from lmdist.errors import DataError, MissingInputError, UsageError, one_line
from lmdist_export.bundle import PROVIDERS, WEIGHTS, Bundle, GenerationConfig
from lmdist_export.graph.graphs import Features, Sizes, capturable, generation_graph, score_graph, step_graph, word_graph
from lmdist_export.graph.onnx_file import FLOAT, UINT8, Graph, model_bytes

ModelState = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(h, c), each (B, S): the layers' states side by side. Row b is all that the model knows of text b."""

PREFILL_WORDS = 64  # a context is read in pieces of so many words: their logits are (1, 64, V), and only the last count
READ_AT_ONCE = 512  # words of a prompt in one run: they take room for their gates, (512, B, 4H)
LOGITS_AT_ONCE = 2**23  # numbers in the logits of one run: 32 MiB
FARTHEST = 1e30  # a temperature is not beyond it nor below 1 / it, nor a share of probability: fp32 has no such products


@dataclass(frozen=True)
class State:
    """Where B texts stand: what was read, the words still to read, and the random numbers to come."""

    words: NDArray[np.int64]
    """(B, P): the words that were not read yet, of each row its first `lengths`."""
    lengths: NDArray[np.int64]
    """(B)"""
    h: NDArray[np.float32]
    """(B, S)"""
    c: NDArray[np.float32]
    """(B, S)"""
    generators: tuple[np.random.Generator, ...] = ()
    """Of each row; none where no word was to be drawn yet. States share them: who draws takes copies."""
    counts: NDArray[np.float32] | None = None
    """(B, V'): how often each word was made; None where nothing asked for it."""

    def __len__(self) -> int:
        return len(self.lengths)

    def seeded(self, seed: int) -> State:
        """The same texts with random numbers from their start: those of row b are made of the seed and b."""
        return replace(self, generators=tuple(np.random.default_rng([seed, row]) for row in range(len(self))))

    def fork(self, texts: int, seed: int) -> State:
        """`texts` rows that all go on from this one, each with random numbers of its own."""
        assert len(self) == 1, len(self)
        return self.rows([0] * texts).seeded(seed)

    def rows(self, numbers: Sequence[int]) -> State:
        """The rows of these numbers."""
        index = list(numbers)
        return State(
            self.words[index],
            self.lengths[index],
            self.h[index],
            self.c[index],
            tuple(self.generators[row] for row in index) if self.generators else (),
            None if self.counts is None else self.counts[index],
        )

    def counts_like(self, other: NDArray[np.float32]) -> NDArray[np.float32]:
        """The counts (B, V'), zeros where nothing asked for them yet; V' is that of the counts of an `other` state."""
        return np.zeros((len(self), other.shape[1]), np.float32) if self.counts is None else self.counts

    def save(self, path: Path) -> None:
        """Write the state to a file."""
        arrays = {"words": self.words, "lengths": self.lengths, "h": self.h, "c": self.c}
        if self.counts is not None:
            arrays["counts"] = self.counts
        generators = json.dumps([generator.bit_generator.state for generator in self.generators])
        with path.open("wb") as file:
            np.savez(file, generators=np.array(generators), allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a state; raises MissingInputError, or DataError where the file holds none."""
        try:
            # Opened here: numpy leaves a file open that it finds to be damaged.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                generators = tuple(restored(state) for state in json.loads(str(file["generators"])))
                counts = file.get("counts")
                return cls(file["words"], file["lengths"], file["h"], file["c"], generators, counts)
        except FileNotFoundError:
            raise MissingInputError(f"{path} is not there; a state written by State.save is expected") from None
        except Exception as error:  # numpy, zipfile and json each have errors of their own
            raise DataError(f"{path} is not a state written by State.save: {one_line(error)}") from None


def joined(states: Sequence[State]) -> State:
    """The rows of all `states`, one after the other."""
    longest = max(state.words.shape[1] for state in states)
    padded = [np.pad(state.words, ((0, 0), (0, longest - state.words.shape[1]))) for state in states]
    counted = next((state.counts for state in states if state.counts is not None), None)
    return State(
        np.concatenate(padded),
        np.concatenate([state.lengths for state in states]),
        np.concatenate([state.h for state in states]),
        np.concatenate([state.c for state in states]),
        tuple(generator for state in states for generator in state.generators),
        None if counted is None else np.concatenate([state.counts_like(counted) for state in states]),
    )


def copied(generator: np.random.Generator) -> np.random.Generator:
    """A generator that will draw the same numbers."""
    return restored(generator.bit_generator.state)


def restored(state: Any) -> np.random.Generator:
    """The generator of a state."""
    generator = np.random.default_rng(0)
    generator.bit_generator.state = state
    return generator


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
        inverse = np.float32(1 if config.greedy else np.clip(1 / config.temperature, 1 / FARTHEST, FARTHEST))
        feed: dict[str, Any] = {
            "prompt": state.words,
            "lengths": state.lengths,
            "h": state.h,
            "c": state.c,
            "stops": np.array([*stops, -1], np.int64),  # no word is -1
            "going": np.ones(rows, np.bool_),
            "bias": self.padded(np.zeros(self.sizes.vocabulary_size, np.float32) if bias is None else bias),
            "inverse_temperature": inverse,
            # With a feature that sorts, but without top-k, all words are candidates.
            "top_k": np.array([min(config.top_k or self.sizes.vocabulary_size, self.sizes.vocabulary_size)], np.int64),
            "top_p": np.float32(max(config.top_p, 1 / FARTHEST)),
            "min_p": np.float32(config.min_p),
            "typical_p": np.float32(max(config.typical_p, 1 / FARTHEST)),
        }
        if features.adjusted:
            empty = np.zeros((rows, self.sizes.padded), np.float32)
            nobody = np.zeros((rows, self.sizes.vocabulary_size), np.bool_)
            # The graph's logits are over the temperature already, and so is all that is added to them.
            feed |= {
                "counts": empty if state.counts is None else state.counts,
                "in_prompt": self.padded(nobody if in_prompt is None else in_prompt),
                "row_bias": empty[:1] if row_bias is None else self.padded(row_bias) * inverse,
                "repetition_penalty": np.float32(config.repetition_penalty),
                "presence_penalty": np.float32(config.presence_penalty) * inverse,
                "frequency_penalty": np.float32(config.frequency_penalty) * inverse,
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


def features_of(config: GenerationConfig, row_bias: bool) -> Features:
    """What a generation graph must be able to do for `config`."""
    penalties = (config.repetition_penalty, config.presence_penalty, config.frequency_penalty) != (1, 0, 0)
    if config.greedy:
        return Features(greedy=True, adjusted=penalties or row_bias)
    return Features(
        adjusted=penalties or row_bias,
        top_k=config.top_k > 0,
        top_p=config.top_p < 1,
        min_p=config.min_p > 0,
        typical_p=config.typical_p < 1,
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The logarithms of the probabilities (..., V) that logits (..., V) stand for."""
    below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def uniform_numbers(generators: Sequence[np.random.Generator], words: int, attempts: int) -> NDArray[np.float32]:
    """The next uniform numbers of each row, (N, B, A)."""
    rows = [generator.random((words, attempts), np.float32) for generator in generators]
    return np.ascontiguousarray(np.stack(rows, axis=1))


# --- onnxruntime ---------------------------------------------------------------------------------------------------


class Runtime:
    """Opens graphs over one file of weights."""

    def __init__(self, folder: Path, sizes: Sizes, provider: str, threads: int) -> None:
        """Raises UsageError for a provider that cannot run here or not in the precision of the weights."""
        if provider not in PROVIDERS:
            raise UsageError(f"the provider is {provider!r}; expected one of {', '.join(PROVIDERS)}")
        if threads < 0:
            raise UsageError(f"threads is {threads}; it must be at least 1, or 0 to choose by the machine")
        if provider == "cuda" and sizes.whole:
            raise UsageError(
                f"precision {sizes.precision} runs on a CPU only: use --provider cpu, or export with --precision fp16"
            )
        onnxruntime = import_onnxruntime()
        onnxruntime.set_default_logger_severity(4)
        if provider == "cuda":
            load_cuda(onnxruntime)
        self.folder, self.sizes, self.provider, self.threads = folder, sizes, provider, threads
        self.saturates = sizes.whole and products_saturate(threads)

    def open(self, graph: Callable[..., bytes], captured: bool = False) -> Any:
        """A session of the graph that `graph` makes of the sizes, `captured` as a CUDA graph at its first run."""
        data = graph(sizes=self.sizes, location=WEIGHTS, cuda=self.provider == "cuda", saturates=self.saturates)
        return open_session(data, self.folder, self.provider, self.threads, captured)


class WordSession:
    """The word graph, run once a word by I/O binding: what goes from word to word stays on the device.

    It lies there twice. A run reads one set of values and writes the other, and the next run the other way round. Not in
    place: the run that captures a CUDA graph is three runs (two to find room, then the captured one), each thread that comes
    captures anew, and what was captured is bound to its addresses. So a run must leave what it has read, and values stay
    where they are while their shapes do.
    """

    def __init__(self, runtime: Runtime, features: Features) -> None:
        self.runtime = runtime
        self.features = features
        self.captured = runtime.provider == "cuda" and capturable(runtime.sizes, features)
        self.session = self.opened()
        self.carried = [value.name.removeprefix("next_") for value in self.session.get_outputs()]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: list[dict[str, Any]] = []
        """Before even words and before odd ones: an OrtValue for each input, the same for one that is not carried on."""
        self.bindings: list[tuple[Any, Any]] = []
        """To make even words and odd ones: what is bound, and the options of the run."""
        self.graph_ids = count(1)

    def opened(self) -> Any:
        """A session, without a CUDA graph if onnxruntime finds that it cannot be: it saves time, and nobody asked for it."""
        try:
            return self.runtime.open(partial(word_graph, features=self.features), self.captured)
        except UsageError:
            if not self.captured:
                raise
            self.captured = False
            return self.opened()

    def make(self, feed: dict[str, Any]) -> list[NDArray[Any]]:
        """What `run_generation` gives for the same feed, whose prompts were read but for the last word of each row."""
        self.write(feed)
        made: list[NDArray[np.int64]] = []
        going = feed["going"]
        for numbers in feed["uniform"]:
            self.values[0]["uniform"].update_inplace(numbers)
            self.run(len(made) % 2)
            made.append(self.read("word", len(made) + 1))
            going = going & ~np.isin(made[-1], feed["stops"])
            if not going.any():
                break
        layers = range(len(self.runtime.sizes.layer_sizes))
        after = [np.concatenate([self.read(f"{name}_{layer}", len(made)) for layer in layers], axis=1) for name in "hc"]
        counts = [self.read("counts", len(made))] if self.features.adjusted else []
        return [np.array(made), self.read("mass", len(made)), *after, *counts]

    def write(self, feed: dict[str, Any]) -> None:
        """Set all inputs before the first word."""
        ends = list(accumulate(self.runtime.sizes.layer_sizes))[:-1]
        parts = {f"{name}_{layer}": part for name in "hc" for layer, part in enumerate(np.split(feed[name], ends, axis=1))}
        rows = np.arange(len(feed["lengths"]))
        first = {
            "word": feed["prompt"][rows, feed["lengths"] - 1],
            "mass": np.zeros((len(rows), 1), np.float32),
            "uniform": feed["uniform"][0],
        }
        every = feed | parts | first
        # Copies: on a CPU an OrtValue is the array that it was made of.
        arrays = {value.name: np.array(every[value.name]) for value in self.session.get_inputs()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes == self.shapes:
            for name, array in arrays.items():
                self.values[0][name].update_inplace(array)
            return
        even = {name: self.value(name, array) for name, array in arrays.items()}
        self.values = [even, even | {name: self.value(name, arrays[name].copy()) for name in self.carried}]
        self.shapes = shapes
        self.bind()

    def value(self, name: str, array: NDArray[Any]) -> Any:
        """An OrtValue of `array` where the input `name` is read; TopK reads its k on the host."""
        device = "cpu" if name == "top_k" else self.runtime.provider
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, device, 0)

    def bind(self) -> None:
        """Bind the values to the session, each of the two ways for a CUDA graph of its own."""
        self.bindings = []
        for before, after in (self.values, self.values[::-1]):
            binding = self.session.io_binding()
            for name, value in before.items():
                binding.bind_ortvalue_input(name, value)
            for name in self.carried:
                binding.bind_ortvalue_output(f"next_{name}", after[name])
            options = import_onnxruntime().RunOptions()
            options.log_severity_level = 4
            options.add_run_config_entry("gpu_graph_id", str(next(self.graph_ids)))
            self.bindings.append((binding, options))

    def run(self, number: int) -> None:
        """Make an even word (0) or an odd one (1)."""
        try:
            self.session.run_with_iobinding(*self.bindings[number])
        except Exception:  # onnxruntime's errors have no common class of their own
            if not self.captured:
                raise
            self.captured = False
            self.session = self.opened()
            self.bind()
            self.run(number)

    def read(self, name: str, made: int) -> NDArray[Any]:
        """What is carried on under `name` after so many words."""
        return np.array(self.values[made % 2][name].numpy())


@cache
def products_saturate(threads: int) -> bool:
    """Whether this processor's products of bytes lose what is beyond 16 bits, as those without VNNI do."""
    g = Graph("probe")
    left = g.input("left", UINT8, ["rows", 64])
    right = g.constant(np.full((64, 64), 127, np.int8))
    scale, zero = g.constant(np.float32(1)), g.constant(np.uint8(0))
    g.output(g("MatMulIntegerToFloat", left, right, scale, scale, zero, ""), "product", FLOAT, ["rows", 64])
    session = open_session(model_bytes(g, {}), Path(), "cpu", threads)
    return session.run(None, {"left": np.full((1, 64), 255, np.uint8)})[0][0, 0] != 64 * 255 * 127


def open_session(graph: bytes, folder: Path, provider: str, threads: int, captured: bool = False) -> Any:
    """A session of `graph`, with weights in `folder`, on `provider` and nothing else; raises UsageError where it cannot."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or default_threads()
    # The threads of a step wait for the next one: turning round they would take the cores from whatever else is to run.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
    reason = "onnxruntime fell back to the CPU"
    try:
        # Without enable_fallback=0 a provider that fails is printed to stdout, in the midst of the text, and replaced.
        providers = [(name, {"enable_cuda_graph": "1"})] if captured else [name]
        session = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        # get_available_providers() says what was compiled in. This says what runs.
        if session.get_providers()[0] == name:
            return session
    except Exception as error:  # onnxruntime's errors have no common class of their own
        if provider == "cpu":
            raise DataError(f"{folder} cannot be opened by onnxruntime {onnxruntime.__version__}: {one_line(error)}") from None
        reason = one_line(error)
    raise UsageError(
        f"provider cuda does not run here: {reason}. Check nvidia-smi and that CUDA and cuDNN are there "
        "(pip install 'lmdist[gpu]'), or use --provider cpu"
    )


def import_onnxruntime() -> Any:
    """The onnxruntime module; raises UsageError with the remedy where none or two of its wheels are installed."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on it reports to its makers by default, on Linux too
    wheels = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed(name)]
    if len(wheels) == 2:
        raise UsageError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'lmdist[cpu]' or 'lmdist[gpu]'"
        )
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        # Where one of two wheels was uninstalled, a folder without the module's contents is left.
        assert onnxruntime.InferenceSession
    except (ImportError, AttributeError) as error:
        remedy = f"pip install --force-reinstall {wheels[0]}" if wheels else "pip install 'lmdist[cpu]' (or 'lmdist[gpu]')"
        raise UsageError(f"onnxruntime cannot be imported ({one_line(error)}): {remedy}") from None
    return onnxruntime


def runtime_version() -> str:
    """The version of onnxruntime."""
    return import_onnxruntime().__version__


def installed(distribution: str) -> bool:
    """Whether a distribution is installed, working or not."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load_cuda(onnxruntime: Any) -> None:
    """Load what the CUDA provider needs; raises UsageError where the driver or the provider is not there at all."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UsageError(
            "provider cuda: this onnxruntime is built without CUDA: "
            "pip uninstall -y onnxruntime, then pip install 'lmdist[gpu]'; or use --provider cpu"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UsageError(
            "provider cuda: libcuda.so.1 does not load, so this machine has no NVIDIA driver: use --provider cpu"
        ) from None
    # CUDA and cuDNN of pip's nvidia-* wheels. It prints what it does not find; whether that matters shows right after.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def default_threads() -> int:
    """Threads for one step: the cores this process may use, at most 4, since a step is too small for more."""
    return min(4, available_cpus())
