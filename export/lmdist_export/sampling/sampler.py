"""A bundle in onnxruntime: read tokens, score them, sample new ones.

    sampler = Sampler(Bundle.load("bundle"))
    prompt = sampler.prefill(sampler.start([[END_ID, 17, 4]]))      # a prompt is read once,
    state = prompt.fork(4, seed=1)                                  # continued as 4 texts,
    tokens, state = sampler.generate(state, config, 100)            # 100 tokens of each, (100, 4),
    tokens, state = sampler.generate(state, config, 100)            # and 100 more

A text that is to have the neural cache begins as `sampler.start(..., cached=True)`; its state has a memory as well.
A graph is built for what is asked of it (graphs.py), when it is first needed. This module does not know when a text ends
(generation.py). No torch and no onnx: a machine that samples has neither.

Shapes: B batch, T tokens, P tokens of a prompt, N new tokens, V vocabulary (V' rounded up to whole blocks), S the sum of the
layers' sizes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmdist.cache_settings import NeuralCache
from lmdist.errors import DataError, UsageError
from lmdist_export.bundle import WEIGHTS, Bundle
from lmdist_export.graph.cache import CACHE, EMPTY, NEW
from lmdist_export.graph.cell import STATE
from lmdist_export.graph.graphs import embedding_graph, generation_graph, next_graph, score_graph, step_graph
from lmdist_export.options import MAX_WEIGHT, NO_CACHE, ROLES, Features, GenerationConfig, features_of, graph_inputs
from lmdist_export.sampling.runtime import Runtime
from lmdist_export.sampling.state import (
    PARTS,
    ModelState,
    State,
    by_part,
    copy_generator,
    joined,
    remembered,
    uniform_numbers,
)
from lmdist_export.sampling.steps import Pace, Steps, result_of
from lmdist_export.sampling.token_session import Generated, TokenSession

STEP_TOKENS = 64  # in one call where only the last logits count: those of all are (1, 64, V)
PREFILL_TOKENS = 512  # in one call without logits: their gates are (512, B, 4H)
MANY_CALLS = 50  # save as much time by a graph that reads no prompts as it takes to open it
SMALL_WEIGHTS = 2**25  # bytes: a session may hold weights again, and of a larger model a call costs little beside its tokens
LOGITS_AT_ONCE = 2**23  # numbers in the logits of one call: 32 MiB
NO_MEMORY = (
    "the state has no memory for the neural cache: it was not started by Sampler.start(..., cached=True), "
    "or it was continued without cache_weight"
)


class Sampler:
    """A bundle in onnxruntime: it reads tokens, scores them and samples new ones."""

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int = 0) -> None:
        self.bundle = bundle
        self.sizes = bundle.sizes
        self.runtime = Runtime(bundle, provider, threads)
        self.generation_sessions: dict[Features, Any] = {}
        self.continuing_sessions: dict[Features, Any] = {}
        """Of graphs that read no prompts."""
        self.calls_that_continue: Counter[Features] = Counter()
        self.continues_apart = self.runtime.as_is and len(bundle.weights) <= SMALL_WEIGHTS
        self.token_sessions: dict[Features, TokenSession] = {}
        self.uses_token_graph = provider == "cuda"
        """Whether each token is a call of its own, with the state on the device: a Loop waits for a GPU at each token."""
        self.rows_change_logits = bundle.sizes.precision == "int4"
        """Whether logits depend, in their last bits, on how many are computed by a call: few rows have another matmul."""

    @cached_property
    def step_session(self) -> Any:
        """Return the session of the step graph."""
        return self.runtime.open(step_graph)

    @cached_property
    def score_session(self) -> Any:
        """Return the session of the graph that scores."""
        return self.runtime.open(score_graph)

    @cached_property
    def cached_score_session(self) -> Any:
        """Return the session of the graph that scores with the cache."""
        return self.runtime.open(partial(score_graph, cached=True))

    @cached_property
    def next_session(self) -> Any:
        """Return the session of the graph that predicts the next token with the cache."""
        return self.runtime.open(next_graph)

    @cached_property
    def embedding_session(self) -> Any:
        """Return the session of the graph of embeddings."""
        return self.runtime.open(embedding_graph)

    def generation_session(self, features: Features, num_read: int) -> Any:
        """Return the session of the generation graph that has these features, for rows with so many tokens to read at most.

        Most calls have but one to read: for them a graph without the nodes that read prompts is opened once it is worth it.
        """
        if num_read == 1 and self.continues_apart and not features.cached:
            self.calls_that_continue[features] += 1
            if self.calls_that_continue[features] > MANY_CALLS:
                try:
                    return self.opened(self.continuing_sessions, features, reads_prompts=False)
                except DataError:  # as where memory is short; the other graph does the same
                    del self.calls_that_continue[features]
        return self.opened(self.generation_sessions, features)

    def opened(self, sessions: dict[Features, Any], features: Features, **how: bool) -> Any:
        """Return the session of the generation graph that has these features, one of `sessions`."""
        if features not in sessions:
            sessions[features] = self.runtime.open(partial(generation_graph, features=features, **how))
        return sessions[features]

    def keep_graphs(self, needed: Features, most: int) -> None:
        """Close the graphs that were needed longest ago, of each kind all but `most`; they are opened again when needed."""
        for sessions in (self.generation_sessions, self.continuing_sessions, self.token_sessions):
            if needed in sessions:
                sessions[needed] = sessions.pop(needed)
            while len(sessions) > most:
                features = next(iter(sessions))
                del sessions[features]
                if sessions is self.continuing_sessions:
                    del self.calls_that_continue[features]

    def token_session(self, features: Features) -> TokenSession:
        """Return the session of the token graph that has these features."""
        if features not in self.token_sessions:
            self.token_sessions[features] = TokenSession(self.runtime, features)
        return self.token_sessions[features]

    # --- reading

    def initial_state(self, batch: int, *, cached: bool = False) -> ModelState:
        """Return the state before the first token: zeros, (batch, S) each, and with `cached` a memory without a token."""
        state = tuple(np.zeros((batch, self.sizes.state_size), np.float32) for _ in STATE)
        if not cached:
            return state
        hidden = np.zeros((batch, 1, self.sizes.layer_sizes[-1]), np.float32)
        return (*state, hidden, np.full((batch, 1), EMPTY, np.int64))

    @property
    def cache(self) -> NeuralCache:
        """Return the parameters of the bundle's cache; raises UsageError where it has none, or none can be used here."""
        if self.bundle.cache is None:
            raise UsageError(NO_CACHE)
        if self.runtime.provider != "cpu":
            raise UsageError(f"the neural cache runs on a CPU only: use the provider cpu; it is {self.runtime.provider}")
        return self.bundle.cache

    def step(self, tokens: NDArray[np.int64], state: ModelState) -> tuple[NDArray[np.float32], ModelState]:
        """Read `tokens` (B, T) from `state` on; return the logits (B, T, V) after each token, and the state after all.

        It is without the memory that `state` may have.
        """
        assert tokens.ndim == 2, tokens.shape
        state = state[: len(STATE)]
        feed = {"tokens": tokens, **by_part(state)}
        logits, *after = self.step_session.run(["logits", *next_names(state)], feed)
        return self.finite(logits), tuple(after)

    def step_cached(
        self, tokens: NDArray[np.int64], state: ModelState, cache: NeuralCache
    ) -> tuple[NDArray[np.float32], ModelState]:
        """Read `tokens` (B, T) from a state with a memory; return the log-probabilities (B, V) after the last and the state."""
        feed = {"tokens": tokens, **by_part(state), **cache_feed(cache)}
        scores, *after = self.next_session.run(["log_probabilities", *next_names(state)], feed)
        return self.finite(scores), tuple(after)

    def prefill(self, state: State, config: GenerationConfig | None = None) -> State:
        """Read all tokens of each row but the last, and return the state that has only that one to read.

        No logits are computed. The graph is the one that generates with `config`, so that no session of its own is opened. A
        memory is carried on in any case.
        """
        return result_of(self.prefill_steps(state, config))

    def prefill_steps(
        self, state: State, config: GenerationConfig | None = None, pace: Pace | None = None, keep: int = 1
    ) -> Steps[State]:
        """Do what `prefill` does, PREFILL_TOKENS a step or at a pace, until at most `keep` tokens of each row are left."""
        self.check_state(state)
        config = config or GenerationConfig()
        if len(state.model) == len(PARTS) and not config.cache_weight:
            config = replace(config, cache_weight=0.5)  # no token is sampled by it
        while state.tokens.shape[1] > keep:
            yield
            most = pace.tokens + 1 if pace else PREFILL_TOKENS
            rest = state.tokens[:, most:]
            began = time.perf_counter()
            read = replace(state, tokens=state.tokens[:, :most], lengths=np.minimum(state.lengths, most))
            num_read = read.tokens.shape[1] - 1
            read = self.generate(read, config, 0)[1]
            if pace:
                pace.learn(num_read, time.perf_counter() - began)
            # The last token that was to be read here is still unread; a row that is at its end has only that one.
            tokens = np.concatenate([read.tokens, rest], axis=1)
            lengths = np.maximum(1, state.lengths - most + 1)
            state = replace(state, tokens=tokens, lengths=lengths, model=read.model)
        return state

    def next_logits(
        self, context: Sequence[int] | State, cache: NeuralCache | None = None
    ) -> tuple[NDArray[np.float32], ModelState]:
        """Read `context` from the state before the first token, or the tokens of a state of one text from where it stands.

        Return the logits (1, V) after it, and the state. With a `cache`, and a state with a memory, the logits are
        log-probabilities.
        """
        before = context if isinstance(context, State) else self.start([context], cached=cache is not None)
        if not cache:
            return result_of(self.next_logits_steps(before))
        self.check_state(before)
        logits, state = np.empty((1, 0), np.float32), before.model
        for start in range(0, before.tokens.size, PREFILL_TOKENS):
            logits, state = self.step_cached(before.tokens[:, start : start + PREFILL_TOKENS], state, cache)
        return logits, state

    def next_logits_steps(self, before: State, pace: Pace | None = None) -> Steps[tuple[NDArray[np.float32], ModelState]]:
        """Do what `next_logits` does without a cache, in the steps of `prefill_steps`."""
        self.check_state(before)
        tokens, state = before.tokens, before.model  # (1, P)
        last = 1 if pace and not self.rows_change_logits else STEP_TOKENS
        rest = (tokens.size - 1) // last * last
        if rest:
            unread = replace(before, tokens=tokens[:, : rest + 1], lengths=np.array([rest + 1]))
            state = (yield from self.prefill_steps(unread, pace=pace)).model
        yield
        logits, after = self.step(tokens[:, rest:], state)
        return logits[:, -1], after  # (1, V)

    def score(
        self,
        tokens: NDArray[np.int64],
        targets: NDArray[np.int64],
        state: ModelState | None = None,
        cache: NeuralCache | None = None,
    ) -> tuple[NDArray[np.float32], ModelState]:
        """Return the log-probability in nats of each of `targets` (B, T) after `tokens` (B, T) up to its place, and the state.

        Tokens are read from `state` on, by default the state before the first token. The logits of LOGITS_AT_ONCE places
        are held at a time, whatever B and T. Rows may be padded on the right: the scores of padding mean nothing. With a
        `cache` the state has its memory, without one it loses it. Raises UsageError for a `cache` and a state without memory.
        """
        assert tokens.shape == targets.shape, (tokens.shape, targets.shape)
        batch, length = tokens.shape
        before = state or self.initial_state(batch, cached=cache is not None)
        if cache and len(before) < len(PARTS):
            raise UsageError(NO_MEMORY)
        before = before if cache else before[: len(STATE)]
        session = self.cached_score_session if cache else self.score_session
        names, fixed = ["log_probabilities", *next_names(before)], cache_feed(cache) if cache else {}
        after: list[ModelState] = []
        result = np.empty((batch, length), np.float32)
        places = max(1, LOGITS_AT_ONCE // self.sizes.padded)
        window = max(1, places // batch)
        for top in range(0, batch, places):
            rows = slice(top, top + places)
            current = tuple(part[rows] for part in before)
            for start in range(0, length, window):
                piece = rows, slice(start, start + window)
                feed = {"tokens": tokens[piece], "targets": targets[piece], **by_part(current), **fixed}
                scores, *parts = session.run(names, feed)
                result[piece], current = self.finite(scores), tuple(parts)
            after.append(current)
        return result, joined(after) if after else before

    def embeddings(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the embeddings of `tokens`, (B, E); those of an int8 or int4 bundle are rounded as the model reads them."""
        (found,) = self.embedding_session.run(None, {"tokens": np.array(tokens, np.int64)})
        return self.finite(found)

    # --- generating

    def start(self, prompts: Sequence[Sequence[int]], *, cached: bool = False) -> State:
        """Return the state of texts that begin with `prompts`, of which nothing was read yet; none may be empty.

        `cached` texts have the memory that a `cache_weight` needs.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        assert all(lengths), "a text begins with <eos>; without it no token is sampled"
        tokens = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        return State(tokens, lengths, self.initial_state(len(prompts), cached=cached))

    def generate(
        self,
        state: State,
        config: GenerationConfig,
        num_tokens: int,
        stops: Sequence[int] = (),
        bias: NDArray[np.float32] | None = None,
        row_bias: NDArray[np.float32] | None = None,
        in_prompt: NDArray[np.bool_] | None = None,
        *,
        moves_on: bool = False,
    ) -> tuple[NDArray[np.int64], State]:
        """Generate N = `num_tokens` tokens of each text, (N, B), fewer once all have one of `stops`; return them and the state.

        A text is continued after its stop while others have not reached theirs. `bias` (V) is added to all logits, by default
        that of the tokens that `config` names, `row_bias` (B, V) to each row's; `in_prompt` (B, V) says which tokens a
        repetition penalty finds in the prompts. What depends on the tokens before (no_repeat_ngram_size, min_new_tokens, bad
        words of several tokens) is not applied here: generation.py does. Without a cache_weight the state that is returned has
        no memory. With `moves_on` nobody continues `state` again, nor a text with a stop, so no generator is copied. Raises
        UsageError for a state of another model.
        """
        self.check_state(state)
        features = features_of(config, row_bias is not None)
        rows = len(state)
        assert len(state.generators) == rows or not num_tokens, "a state must be seeded before its texts are continued"
        options = option_feed(config, features, self.sizes.vocabulary_size)
        if bias is None:  # without new tokens it does nothing
            size = self.sizes.vocabulary_size
            bias = fixed_bias(config, size) if num_tokens else np.zeros(size, np.float32)
        feed: dict[str, Any] = options | {
            "prompt": state.tokens,
            "lengths": state.lengths,
            **by_part(state.model),
            "stops": np.array([*stops, -1], np.int64),  # no token is -1
            "going": np.ones(rows, np.bool_),
            "bias": self.padded(bias),
        }
        if features.cached:
            if len(state.model) < len(PARTS):
                raise UsageError(NO_MEMORY)
            feed = cache_feed(self.cache) | feed  # the weight is the option's
        if features.adjusted:
            empty = np.zeros((rows, self.sizes.padded), np.float32)
            no_tokens = np.zeros((rows, self.sizes.vocabulary_size), np.bool_)
            # The graph's logits are over the temperature already, and so is all that is added to them.
            inverse = options.get("inverse_temperature", np.float32(1))
            feed |= {
                "counts": empty if state.counts is None else state.counts,
                "in_prompt": self.padded(no_tokens if in_prompt is None else in_prompt),
                "row_bias": empty[:1] if row_bias is None else self.padded(row_bias) * inverse,
            }
        generators = tuple(map(copy_generator, state.generators)) if num_tokens and not moves_on else state.generators
        no_numbers = np.empty((0, rows, features.attempts), np.float32)
        feed["uniform"] = uniform_numbers(generators, num_tokens, features.attempts) if num_tokens else no_numbers
        found = self.run(features, feed)
        num_found = len(found.tokens)
        if num_found < num_tokens and not moves_on:  # the numbers that were not used come next
            generators = tuple(map(copy_generator, state.generators))
            uniform_numbers(generators, num_found, features.attempts)
        last = found.tokens[-1] if num_found else np.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0]
        counts = state.counts if found.counts is None else found.counts
        return found.tokens, State(last[:, None], np.ones(rows, np.int64), found.state, generators, counts)

    def run(self, features: Features, feed: dict[str, Any]) -> Generated:
        """Return what the graph with these features generates, by the Loop, or on a GPU token by token after the prefill."""
        if not self.uses_token_graph or not len(feed["uniform"]):
            found = self.run_loop(features, feed)
        else:
            if feed["prompt"].shape[1] > 1:
                prefilled = self.run_loop(features, feed | {"uniform": feed["uniform"][:0]})
                feed = feed | by_part(prefilled.state)
            found = self.token_session(features).generate(feed)
        self.finite(found.mass)
        return found

    def run_loop(self, features: Features, feed: dict[str, Any]) -> Generated:
        """Return what the generation graph generates in one call."""
        session = self.generation_session(features, feed["prompt"].shape[1])
        names = ["words", "mass", *(f"next_{name}" for name in STATE), *(NEW if features.cached else ())]
        names += ["next_counts"] if features.adjusted else []
        tokens, mass, *state = session.run(names, {name: np.asarray(feed[name]) for name in session.input_names})
        counts = state.pop() if features.adjusted else None
        if features.cached:
            before = tuple(feed[name] for name in PARTS)
            state[len(STATE) :] = remembered(before, state[len(STATE) :], int(feed["cache_size"][0]))
        # Without new tokens onnxruntime forgets the batch size.
        return Generated(tokens.reshape(-1, len(feed["lengths"])), mass, tuple(state), counts)

    def check_state(self, state: State) -> None:
        """Raise UsageError if types, shapes or numbers show that a state is not of this model."""
        assert len(state.model) in (len(STATE), len(PARTS)), len(state.model)
        batch, vocabulary = len(state), self.sizes.vocabulary_size
        memory = state.model[len(STATE) :]
        hidden, remembered = CACHE
        num_read, places = (max((1, *part.shape[1:])) for part in (state.tokens, memory[1] if memory else state.tokens))
        expected = {
            "tokens": ("int64", (batch, num_read)),
            "lengths": ("int64", (batch,)),
            **dict.fromkeys(STATE, ("float32", (batch, self.sizes.state_size))),
            hidden: ("float32", (batch, places, self.sizes.layer_sizes[-1])),
            remembered: ("int64", (batch, places)),
            "counts": ("float32", (batch, self.sizes.padded)),
        }
        counts = {} if state.counts is None else {"counts": state.counts}
        for name, array in {"tokens": state.tokens, "lengths": state.lengths, **by_part(state.model), **counts}.items():
            kind, shape = expected[name]
            if array.dtype != kind or array.shape != shape:
                raise UsageError(
                    f"the state is not this model's: {name} is {array.dtype} {array.shape}; {kind} {shape} is expected"
                )
        for name, numbers, lowest, highest in (
            ("the id of a token", state.tokens, 0, vocabulary - 1),
            ("the number of tokens to read", state.lengths, 1, state.tokens.shape[1]),
            *([("the id of a remembered token", memory[1], EMPTY, vocabulary - 1)] if memory else []),
        ):
            for number in (numbers.min(), numbers.max()):
                if not lowest <= number <= highest:
                    raise UsageError(
                        f"the state is not this model's: {name} is {number}; one from {lowest} to {highest} is expected"
                    )
        if memory:
            with np.errstate(all="ignore"):
                finite = np.isfinite(memory[0].sum())  # a sum is fast: a call may generate but one token
            if not finite:
                raise UsageError(f"the state is not this model's: {hidden} holds numbers that are not finite")

    def padded(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return (..., V) as (..., V')."""
        found = np.zeros((*values.shape[:-1], self.sizes.padded), values.dtype)
        found[..., : self.sizes.vocabulary_size] = values
        return found

    def finite(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the values; raises DataError if they are not finite.

        Weights are not checked when they are loaded, because that would take longer than the first tokens do.
        """
        if not np.isfinite(values).all():
            raise DataError(
                f"the logits are not finite, so {WEIGHTS} of {self.bundle.name} does not hold the weights of a trained model"
            )
        return values


def next_names(state: ModelState) -> list[str]:
    """Return the names of the graphs' outputs that are the state after `state`."""
    return [f"next_{name}" for name in by_part(state)]


def cache_feed(cache: NeuralCache) -> dict[str, NDArray[Any]]:
    """Return the inputs of a graph that are the parameters of a cache."""
    weight = np.float32(min(cache.weight, MAX_WEIGHT))
    size = np.array([cache.size], np.int64)
    return {"cache_size": size, "cache_theta": np.asarray(np.float32(cache.theta)), "cache_weight": np.asarray(weight)}


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


def fixed_bias(config: GenerationConfig, vocabulary_size: int) -> NDArray[np.float32]:
    """Return what is added to the logits (V) of every token of every text: -inf for a token that is never generated."""
    bias = np.zeros(vocabulary_size, np.float32)
    for tokens, value in config.sequence_bias:
        bias[tokens] += np.float32(value)
    bias[list(config.suppress_tokens)] = -np.inf
    bias[[tokens[0] for tokens in config.bad_words_ids if len(tokens) == 1]] = -np.inf
    named = len(config.sequence_bias) + len(config.suppress_tokens) + len(config.bad_words_ids)
    if named >= vocabulary_size and all_masked(bias):  # few are named: to look at all takes longer than the rest
        raise UsageError("no token is left to sample: suppress_tokens, bad words and logit bias mask all of them")
    return bias


def all_masked(bias: NDArray[np.floating]) -> bool:
    """Return whether a bias (V) leaves no token that can be sampled."""
    return bool(np.isneginf(bias).all())


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the log-probabilities (..., V) of logits (..., V)."""
    below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
