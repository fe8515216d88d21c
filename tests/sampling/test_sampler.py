"""The sampler: calls of any length generate the same tokens, states are forked, joined and saved, scores equal torch's."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.settings import ModelSettings
from lmdist_export.bundle import GENERATION_GRAPH, Bundle
from lmdist_export.graph.graphs import step_graph
from lmdist_export.graph.sizes import Sizes, file_length
from lmdist_export.options import EVERY_FEATURE, GenerationConfig, features_of
from lmdist_export.sampling import runtime
from lmdist_export.sampling import sampler as sampler_module
from lmdist_export.sampling.runtime import Runtime
from lmdist_export.sampling.sampler import STEP_TOKENS, Sampler, fixed_bias
from lmdist_export.sampling.state import DrawnAhead, State, concatenate, restored, uniform_numbers
from support.mutations import damaged
from support.sampling_reference import NEAR, Past, check_frequencies, expected, scores_of
from support.small_bundles import ADAPTIVE, TIED, UNTIED, bare_bundle, make_model

V = 300  # two blocks
ALL_OPTIONS = GenerationConfig(
    temperature=0.9,
    top_k=60,
    top_p=0.95,
    min_p=0.001,
    typical_p=0.9,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
)
CONFIGS = [
    GenerationConfig(),
    GenerationConfig(temperature=0.0),
    GenerationConfig(temperature=0.7, top_k=20),
    GenerationConfig(temperature=1.2, top_p=0.6),
    GenerationConfig(top_p=0.9, min_p=0.05),
    GenerationConfig(typical_p=0.5),
    GenerationConfig(do_sample=False, repetition_penalty=1.5, frequency_penalty=0.5),
    GenerationConfig(temperature=0.5, repetition_penalty=1.4, presence_penalty=-0.3),
    GenerationConfig(top_p=0.7, frequency_penalty=0.8),
    ALL_OPTIONS,
]
KINDS: dict[str, tuple[ModelSettings, str]] = {
    "fp32": (TIED, "fp32"),
    "fp16": (TIED, "fp16"),
    "int8": (TIED, "int8"),
    "int4": (UNTIED, "int4"),
    "adaptive": (ADAPTIVE, "fp32"),
    "adaptive-int8": (ADAPTIVE, "int8"),
}
PROMPTS = [[1, 30], [1, 4, 50, 299], [1], [1, 270, 270, 270, 8, 9, 10]]

Opened = Callable[[str], Sampler]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The sampler of a kind, opened once."""

    @cache
    def open_kind(kind: str) -> Sampler:
        return Sampler(bare_bundle(tmp_path_factory.mktemp(kind) / "bundle", *KINDS[kind], V), threads=1)

    return open_kind


@pytest.fixture
def bundle(opened: Opened) -> Bundle:
    return opened("fp32").bundle


def same(first: State, second: State) -> bool:
    """Whether two states are the same to the last bit."""
    of_first, of_second = ([generator.bit_generator.state for generator in state.generators] for state in (first, second))
    arrays = (field.name for field in fields(State) if field.name != "generators")
    return of_first == of_second and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays if getattr(first, name) is not None
    )


@given(st.lists(st.tuples(st.integers(1, 33), st.sampled_from((1, 24))), max_size=9), st.integers(0, 9))
def test_numbers_that_are_drawn_ahead_are_those_of_the_generator(shapes: list[tuple[int, int]], seed: int) -> None:
    """Whatever is asked for at a time; and what continues it is where the generator is."""
    generator, ahead = np.random.default_rng(seed), DrawnAhead(np.random.default_rng(seed))
    for shape in shapes:
        assert np.array_equal(ahead.random(shape, np.float32), generator.random(shape, np.float32))
        assert ahead.bit_generator.state == generator.bit_generator.state


# --- generating tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_the_lengths_of_calls(kind: str, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one call, one per call, or texts one by one: the tokens are the same, by the graph that reads no prompts too."""
    sampler = opened(kind)
    monkeypatch.setattr(sampler_module, "MANY_CALLS", 10)
    random = np.random.default_rng(0)
    bias = np.where(random.random(V) < 0.1, -np.inf, 0).astype(np.float32)
    of_rows: list[tuple[NDArray[np.float32] | None, NDArray[np.bool_] | None]] = [(None, None)] * len(CONFIGS)
    of_rows[-1] = random.normal(size=(4, V)).astype(np.float32), random.random((4, V)) < 0.2
    for config, (row_bias, in_prompt) in zip(CONFIGS, of_rows, strict=True):
        start = sampler.start(PROMPTS).seeded(3)
        options: dict[str, Any] = {"bias": bias, "row_bias": row_bias, "in_prompt": in_prompt}
        tokens, after = sampler.generate(start, config, 20, **options)
        assert tokens.shape == (20, 4)
        assert np.isfinite(bias[tokens]).all()
        for lengths in ([1] * 20, [7, 13]):
            pieces, state = [], start
            for length in lengths:
                piece, state = sampler.generate(state, config, length, **options)
                pieces.append(piece)
            assert np.array_equal(np.concatenate(pieces), tokens), config
            np.testing.assert_array_equal(state.tokens, after.tokens)
            np.testing.assert_allclose(state.model, after.model, atol=1e-5)
        for row in range(4):
            of_row: dict[str, Any] = {
                name: None if value is None else value[row : row + 1] for name, value in options.items() if name != "bias"
            }
            alone, _ = sampler.generate(start.rows([row]), config, 20, bias=bias, **of_row)
            assert np.array_equal(alone[:, 0], tokens[:, row]), (config, row)
    assert bool(sampler.continuing_sessions) is sampler.runtime.as_is


@pytest.mark.parametrize("kind", ["fp32", "adaptive"])
def test_tokens_are_those_of_the_reference(kind: str, opened: Opened) -> None:
    """Each token is sampled from the logits after all tokens before it, as docs/sampling.md says."""
    sampler = opened(kind)
    random = np.random.default_rng(1)
    bias = np.where(random.random(V) < 0.1, -np.inf, random.integers(-4, 5, V) / 4).astype(np.float32)
    row_bias = np.where(random.random((2, V)) < 0.1, -np.inf, random.integers(-4, 5, (2, V)) / 4).astype(np.float32)
    in_prompt = random.random((2, V)) < 0.2
    prompts = [[1, 5, 6], [1]]
    unsure = 0
    for config in CONFIGS:
        features = features_of(config, False)
        options: dict[str, Any] = {"row_bias": row_bias, "in_prompt": in_prompt} if features.adjusted else {}
        tokens, _ = sampler.generate(sampler.start(prompts).seeded(5), config, 15, bias=bias, **options)
        for row, prompt in enumerate(prompts):
            uniform = np.random.default_rng([5, row]).random((15, features.attempts), np.float32)
            counts = np.zeros(V)
            for place, token in enumerate(tokens[:, row].tolist()):
                logits, _ = sampler.next_logits([*prompt, *tokens[:place, row].tolist()])
                past = Past(counts.tolist(), in_prompt[row].tolist(), row_bias[row].tolist()) if options else None
                total = (logits[0] + bias).tolist()
                if config.greedy:
                    assert token == np.argmax(scores_of(total, config, past))
                else:
                    right = expected(total, config, past)
                    [wanted], [certain] = right.sampled(uniform[place, :1])
                    assert token in right.tokens or right.margin < NEAR
                    unsure += not certain or right.margin < NEAR
                    # After a rejected token a second number is used: test_sampling_nodes.py checks the distribution.
                    assert token == wanted or not certain or right.margin < NEAR or features.attempts > 1
                counts[token] += 1
    assert unsure < 10


def test_what_a_config_suppresses_is_never_generated(opened: Opened) -> None:
    sampler = opened("fp32")
    favored = tuple(([token], 4.0) for token in (0, 5, 9))
    forbidden_ones: list[dict[str, Any]] = [
        {},
        {"suppress_tokens": ()},
        {"suppress_tokens": (0, 5)},
        {"bad_words_ids": ([9], [7, 3])},
    ]
    for forbidden in forbidden_ones:
        config = GenerationConfig(sequence_bias=favored, **forbidden)
        tokens, _ = sampler.generate(sampler.start([[1, 7]] * 4).seeded(1), config, 50)
        banned = {*config.suppress_tokens, *(9 for _ in config.bad_words_ids)}
        assert {0, 5, 9} & set(tokens.ravel().tolist()) == {0, 5, 9} - banned
    with pytest.raises(UsageError, match="no token is left to sample"):
        sampler.generate(sampler.start([[1]]).seeded(1), GenerationConfig(suppress_tokens=tuple(range(V))), 1)


def test_the_seed_decides_and_rows_do_not_depend_on_the_others(opened: Opened) -> None:
    sampler, config = opened("fp32"), GenerationConfig(top_p=0.8)
    prompts = [PROMPTS[1]] * 3
    three, _ = sampler.generate(sampler.start(prompts).seeded(4), config, 40)
    assert np.array_equal(sampler.generate(sampler.start(prompts).seeded(4), config, 40)[0], three)
    assert np.array_equal(sampler.generate(sampler.start(prompts[:2]).seeded(4), config, 40)[0], three[:, :2])
    assert not np.array_equal(sampler.generate(sampler.start(prompts).seeded(5), config, 40)[0], three)
    assert not np.array_equal(three[:, 0], three[:, 1])


def test_tokens_of_any_seed_follow_the_models_distribution(opened: Opened) -> None:
    sampler = opened("int8")
    logits, _ = sampler.next_logits([1, 7])
    state = sampler.prefill(sampler.start([[1, 7]]))
    for config in (GenerationConfig(), GenerationConfig(top_p=0.8), GenerationConfig(min_p=0.02, temperature=1.5)):
        right = expected((logits[0] + fixed_bias(config, V)).tolist(), config)
        tokens, _ = sampler.generate(state.fork(4_000, seed=9), config, 1)
        assert set(tokens[0].tolist()) <= set(right.tokens)
        check_frequencies(tokens[0], dict(zip(right.tokens, right.probabilities, strict=True)))


def test_tokens_that_were_prefilled_are_not_read_again(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece or in several, rows of any length: the tokens that follow are those after the prompt."""
    sampler = opened("fp32")
    prompts = [*PROMPTS, [1, *range(2, 25)]]
    for config in (GenerationConfig(), ALL_OPTIONS):
        tokens, _ = sampler.generate(sampler.start(prompts).seeded(2), config, 10)
        for at_once in (512, 24, 23, 5, 2):
            monkeypatch.setattr("lmdist_export.sampling.sampler.PREFILL_TOKENS", at_once)
            state = sampler.prefill(sampler.start(prompts), config)
            assert state.tokens.shape == (5, 1)
            assert np.array_equal(state.tokens[:, 0], [prompt[-1] for prompt in prompts])
            assert np.array_equal(sampler.generate(state.seeded(2), config, 10)[0], tokens)


def test_an_early_stop_changes_nothing_after_it(opened: Opened) -> None:
    """A call returns fewer tokens if all rows have stopped, and the next call returns the rest."""
    sampler = opened("fp32")
    for config in (GenerationConfig(), ALL_OPTIONS, GenerationConfig(top_p=0.8, presence_penalty=0.5)):
        start = sampler.start(PROMPTS).seeded(1)
        tokens, end = sampler.generate(start, config, 80)
        ends = [2, 6, 3, 5]
        stops = {int(tokens[place, row]) for row, place in enumerate(ends)}
        first = max(int(np.flatnonzero(np.isin(tokens[:, row], list(stops)))[0]) for row in range(4)) + 1
        assert 1 < first <= 7
        some, state = sampler.generate(start, config, 80, stops=sorted(stops))
        assert np.array_equal(some, tokens[:first])
        rest, after = sampler.generate(state, config, 80 - first)
        assert np.array_equal(rest, tokens[first:])
        assert same(after, end)
        # One text has no such token: all are generated.
        never = next(token for token in range(V) if token not in tokens[:, 0])
        assert len(sampler.generate(start, config, 80, stops=[never])[0]) == 80


def test_no_tokens_at_all(opened: Opened) -> None:
    sampler = opened("fp32")
    for config in CONFIGS:
        tokens, state = sampler.generate(sampler.start(PROMPTS).seeded(1), config, 0)
        assert tokens.shape == (0, 4)
        after, _ = sampler.generate(state, config, 6)
        assert np.array_equal(after, sampler.generate(sampler.start(PROMPTS).seeded(1), config, 6)[0])


def test_options_beyond_the_range_of_fp32(opened: Opened) -> None:
    """Values that are allowed, and that fp32 rounds to zero or to infinity."""
    sampler = opened("fp32")
    start = sampler.start([[1, 5]] * 3).seeded(0)
    most_likely, _ = sampler.generate(start, GenerationConfig(temperature=0.0), 5)
    narrowest: list[dict[str, Any]] = [
        *({"temperature": 1e-37}, {"temperature": 1e-45}, {"temperature": sys.float_info.min}, {"top_p": 1e-50}),
        *({"min_p": 1.0}, {"min_p": 1.0, "top_p": 1e-9}, {"top_p": 1e-50, "top_k": 7}, {"top_k": 1}),
    ]
    for narrow in narrowest:
        assert np.array_equal(sampler.generate(start, GenerationConfig(**narrow), 5)[0], most_likely), narrow
    largest: dict[str, Any] = {"repetition_penalty": 1e6, "presence_penalty": 1e6, "frequency_penalty": -1e6}
    for temperature in (1e-45, 1.0, 1e60):
        tokens, _ = sampler.generate(start, GenerationConfig(temperature=temperature, **largest), 40)
        assert tokens.max() < V
    tokens, _ = sampler.generate(start, GenerationConfig(temperature=1e60), 100)
    assert len(np.unique(tokens)) > 100  # all tokens are equally likely
    tokens, _ = sampler.generate(start, GenerationConfig(typical_p=1e-50), 20)
    assert tokens.max() < V


# --- states --------------------------------------------------------------------------------------------------------


def test_forks_continue_as_texts_of_their_own(opened: Opened) -> None:
    sampler, config = opened("fp32"), GenerationConfig(top_k=40, frequency_penalty=0.3)
    tokens, _ = sampler.generate(sampler.start([PROMPTS[1]] * 3).seeded(8), config, 12)
    fork = sampler.prefill(sampler.start([PROMPTS[1]]), config).fork(3, seed=8)
    assert len(fork) == 3
    assert np.array_equal(sampler.generate(fork, config, 12)[0], tokens)
    assert len({tuple(column) for column in tokens.T.tolist()}) == 3


def test_rows_of_a_state_continue_as_they_would_have(opened: Opened) -> None:
    sampler, config = opened("fp32"), ALL_OPTIONS
    _, state = sampler.generate(sampler.start(PROMPTS).seeded(1), config, 5)
    tokens, _ = sampler.generate(state, config, 8)
    some = state.rows([3, 1, 1])
    for _ in range(2):  # the state itself does not change
        assert np.array_equal(sampler.generate(some, config, 8)[0], tokens[:, [3, 1, 1]])
    assert np.array_equal(sampler.generate(state, config, 8)[0], tokens)


def test_joined_states_continue_as_they_would_have(opened: Opened) -> None:
    """One with tokens still to read and no counts, one inside its text."""
    sampler, config = opened("fp32"), ALL_OPTIONS
    _, old = sampler.generate(sampler.start(PROMPTS[:2]).seeded(1), config, 9)
    new = sampler.start(PROMPTS[2:]).seeded(2)
    assert old.counts is not None
    assert new.counts is None
    for states in ([old, new], [new, old]):
        tokens, after = sampler.generate(concatenate(states), config, 8)
        apart = [sampler.generate(state, config, 8) for state in states]
        assert np.array_equal(tokens, np.concatenate([piece for piece, _ in apart], axis=1))
        again, _ = sampler.generate(after, config, 8)
        assert np.array_equal(again, np.concatenate([sampler.generate(state, config, 8)[0] for _, state in apart], axis=1))
    plain = concatenate([sampler.start(PROMPTS[:1]).seeded(1), new])
    assert plain.counts is None
    assert len(plain) == 3


@pytest.mark.parametrize("config", [GenerationConfig(), ALL_OPTIONS], ids=["plain", "counted"])
def test_a_state_continues_from_its_file(config: GenerationConfig, opened: Opened, tmp_path: Path) -> None:
    sampler = opened("adaptive")
    for state in (sampler.start(PROMPTS).seeded(6), sampler.generate(sampler.start(PROMPTS).seeded(6), config, 7)[1]):
        state.save(tmp_path / "state.npz")
        loaded = State.load(tmp_path / "state.npz")
        assert same(loaded, state)
        fresh = Sampler(sampler.bundle, threads=1)
        assert np.array_equal(fresh.generate(loaded, config, 9)[0], sampler.generate(state, config, 9)[0])
    unseeded = sampler.start(PROMPTS)
    unseeded.save(tmp_path / "state.npz")
    assert State.load(tmp_path / "state.npz").generators == ()


def test_a_state_of_another_model_is_rejected(opened: Opened, tmp_path: Path) -> None:
    here = opened("fp32")
    other = Sampler(bare_bundle(tmp_path / "other", UNTIED), threads=1)
    larger = Sampler(bare_bundle(tmp_path / "larger", TIED, vocabulary_size=2 * V), threads=1)
    for state, message in (
        (other.start([[1, 4], [5]]), r"h is float32 \(2, 20\); float32 \(2, 32\) is expected"),
        (
            replace(here.start([[1]]), model=(here.initial_state(1)[0], np.zeros((1, 5), np.float32))),
            r"c is float32 \(1, 5\); float32 \(1, 32\) is expected",
        ),
        (
            larger.generate(larger.start([[1]]).seeded(1), ALL_OPTIONS, 1)[1],
            r"counts is float32 \(1, 768\); float32 \(1, 512\) is expected",
        ),
        (larger.start([[1, V]]), f"token is {V}; one from 0 to {V - 1} is expected"),
        (replace(here.start([[1]]), tokens=np.ones((1, 1))), r"tokens is float64 \(1, 1\); int64 \(1, 1\) is expected"),
    ):
        with pytest.raises(UsageError, match=f"the state is not this model's: .*{message}"):
            here.generate(state.seeded(1), ALL_OPTIONS, 2)
        with pytest.raises(UsageError, match="not this model's"):
            here.prefill(state)


def test_a_file_that_holds_no_state(opened: Opened, tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    with pytest.raises(MissingInputError, match=r"state\.npz does not exist"):
        State.load(path)
    np.save(tmp_path / "other.npy", np.zeros(3))
    np.savez(tmp_path / "names.npz", words=np.zeros((1, 1), np.int64))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text").write_text("no state", encoding="utf-8")
    (tmp_path / "empty").touch()
    for name in ("other.npy", "names.npz", "pickle.npy", "text", "empty", "."):
        with pytest.raises(DataError, match=r"is not a state written by State\.save") as raised:
            State.load(tmp_path / name)
        assert "\n" not in str(raised.value)
    sampler = opened("fp32")
    sampler.generate(sampler.start(PROMPTS).seeded(6), ALL_OPTIONS, 2)[1].save(path)
    whole, messages = path.read_bytes(), []
    for seed in range(200):
        path.write_bytes(damaged(whole, np.random.default_rng(seed)))
        try:
            State.load(path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 150
    assert "\n" not in "".join(messages)


# --- reading and scoring -------------------------------------------------------------------------------------------


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logarithms of probabilities."""
    return torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_steps_and_of_torch(kind: str, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = opened(kind)
    random = np.random.default_rng(2)
    tokens, targets = random.integers(0, V, (2, 3, 9))
    h, c = random.uniform(-0.5, 0.5, (2, 3, sampler.sizes.state_size)).astype(np.float32)
    scores, after = sampler.score(tokens, targets, (h, c))
    logits, state = sampler.step(tokens, (h, c))
    of_steps = np.take_along_axis(log_softmax(logits), targets[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(scores, of_steps, atol=1e-4)
    np.testing.assert_allclose(after, state, atol=1e-5)

    model = make_model(KINDS[kind][0], V)
    with torch.no_grad():
        hidden, _ = model(torch.from_numpy(tokens), (torch.from_numpy(h), torch.from_numpy(c)))
        of_torch = log_softmax(model.logits(hidden).numpy())
    right = np.take_along_axis(of_torch, targets[..., None], axis=2)[..., 0]
    allowed = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.2, "int4": 1.0}[sampler.sizes.precision]
    assert np.abs(scores - right).max() < allowed

    for places in (1, 2, 12, 30):
        monkeypatch.setattr("lmdist_export.sampling.sampler.LOGITS_AT_ONCE", places * sampler.sizes.padded)
        in_pieces, end = sampler.score(tokens, targets, (h, c))
        np.testing.assert_allclose(in_pieces, scores, atol=1e-4)
        np.testing.assert_allclose(end, after, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "int8", "adaptive"])
def test_scores_do_not_depend_on_later_tokens(kind: str, opened: Opened) -> None:
    sampler = opened(kind)
    random = np.random.default_rng(3)
    tokens, targets = random.integers(0, V, (2, 3, 12))
    lengths = [12, 7, 1]
    scores, _ = sampler.score(tokens, targets)
    for row, length in enumerate(lengths):
        tokens[row, length:], targets[row, length:] = random.integers(0, V, (2, 12 - length))
    others, _ = sampler.score(tokens, targets)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(others[row, :length], scores[row, :length], atol=1e-5)
        alone, _ = sampler.score(tokens[row : row + 1, :length], targets[row : row + 1, :length])
        np.testing.assert_allclose(alone[0], scores[row, :length], atol=1e-5)
    assert np.abs(others[1, 7:] - scores[1, 7:]).max() > 0.1


def test_reading_at_once_is_reading_token_by_token(opened: Opened) -> None:
    sampler = opened("fp32")
    context = np.random.default_rng(0).integers(0, V, 2 * STEP_TOKENS + 5).tolist()
    logits, state = sampler.next_logits(context)
    step_logits, step_state = np.zeros(0), sampler.initial_state(1)
    for token in context:
        step_logits, step_state = sampler.step(np.array([[token]]), step_state)
    assert logits.shape == (1, V)
    np.testing.assert_allclose(logits, step_logits[:, -1], atol=1e-5)
    np.testing.assert_allclose(state, step_state, atol=1e-5)
    # The generation graph reads as the step graph does.
    after = sampler.prefill(sampler.start([context]))
    np.testing.assert_allclose(after.model, sampler.next_logits(context[:-1])[1], atol=1e-5)


def test_threads_change_nothing(bundle: Bundle) -> None:
    tokens = np.arange(12).reshape(3, 4)
    one, two = Sampler(bundle, threads=1), Sampler(bundle, threads=2)
    np.testing.assert_allclose(one.step(tokens, one.initial_state(3))[0], two.step(tokens, two.initial_state(3))[0], atol=1e-5)
    generated = [sampler.generate(sampler.start(PROMPTS).seeded(1), GenerationConfig(), 20)[0] for sampler in (one, two)]
    assert np.array_equal(generated[0], generated[1])


# --- the same tokens elsewhere -------------------------------------------------------------------------------------

NEUTRAL = GenerationConfig(
    # In fp32 they are 1, 0 and 1, so that the graph has the nodes and they do nothing.
    **{"top_p": 1 - 1e-9, "min_p": 1e-60, "typical_p": 1 - 1e-9, "repetition_penalty": 1 + 1e-9, "top_k": V}
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_graph_alone_generates_the_same_tokens(kind: str, opened: Opened) -> None:
    """The file, its inputs by name and onnxruntime, without code of lmdist."""
    sampler = opened(kind)
    session = onnxruntime.InferenceSession(sampler.bundle.folder / GENERATION_GRAPH, providers=["CPUExecutionProvider"])
    for config in (ALL_OPTIONS, NEUTRAL):
        assert features_of(config, False) == EVERY_FEATURE
        start = sampler.start(PROMPTS).seeded(3)
        generators = [restored(generator.bit_generator.state) for generator in start.generators]
        tokens, after = sampler.generate(start, config, 20)
        rows, padded = len(PROMPTS), sampler.sizes.padded
        feed = {
            "prompt": start.tokens,
            "lengths": start.lengths,
            "h": np.zeros((rows, sampler.sizes.state_size), np.float32),
            "c": np.zeros((rows, sampler.sizes.state_size), np.float32),
            "uniform": uniform_numbers(generators, 20, 1),
            "bias": sampler.padded(fixed_bias(config, sampler.sizes.vocabulary_size)),
            "stops": np.array([-1]),
            "going": np.ones(rows, np.bool_),
            "counts": np.zeros((rows, padded), np.float32),
            "in_prompt": np.zeros((rows, padded), np.bool_),
            "row_bias": np.zeros((1, padded), np.float32),
            "top_k": np.array([config.top_k]),
        }
        inverse = 1 / config.temperature
        numbers = {
            "inverse_temperature": inverse,
            "top_p": config.top_p,
            "min_p": config.min_p,
            "typical_p": config.typical_p,
            "repetition_penalty": config.repetition_penalty,
            # The graph subtracts these after it has divided the logits by the temperature.
            "presence_penalty": config.presence_penalty * inverse,
            "frequency_penalty": config.frequency_penalty * inverse,
        }
        feed |= {name: np.array(value, np.float32) for name, value in numbers.items()}
        assert set(feed) == {value.name for value in session.get_inputs()}
        found: dict[str, Any] = dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))
        assert np.array_equal(found["words"], tokens)
        np.testing.assert_allclose([found["next_h"], found["next_c"]], after.model, atol=1e-6)
        assert np.array_equal(found["next_counts"].sum(axis=1), [20] * rows)


@pytest.mark.parametrize("kind", ["int8", "int4", "adaptive-int8"])
def test_processors_whose_products_saturate_generate_the_same_tokens(
    kind: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = opened(kind).bundle
    found = []
    for saturates in (False, True):
        monkeypatch.setattr(runtime, "int8_saturates", lambda threads, saturates=saturates: saturates)
        if not saturates and Sampler(bundle).runtime.target.int8_saturates:
            pytest.skip("this processor's products saturate")
        sampler = Sampler(bundle, threads=1)
        assert sampler.runtime.target.int8_saturates == saturates
        tokens = np.arange(12).reshape(3, 4)
        generated = [sampler.generate(sampler.start(PROMPTS).seeded(1), config, 20)[0] for config in (CONFIGS[0], ALL_OPTIONS)]
        found.append((*generated, sampler.step(tokens, sampler.initial_state(3))[0], sampler.score(tokens, tokens)[0]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_quantized_weights_do_not_run_on_cuda(opened: Opened) -> None:
    for kind in ("int8", "int4"):
        with pytest.raises(UsageError, match=f"precision {kind} runs on a CPU only: use the provider cpu, or export .* fp16"):
            Sampler(opened(kind).bundle, provider="cuda")


# --- onnxruntime ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [(("tpu", 0), "'tpu'"), (("cpu", -1), "threads is -1")])
def test_wrong_arguments(bundle: Bundle, arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampler(bundle, *arguments)


class FakeOptions(SimpleNamespace):
    def add_session_config_entry(self, name: str, value: str) -> None: ...

    def add_initializer(self, name: str, value: Any) -> None: ...

    def add_external_initializers(self, names: list[str], values: list[Any]) -> None: ...


class FakeRuntime(SimpleNamespace):
    """An onnxruntime built with CUDA, whose sessions run on `running`, or fail."""

    def __init__(self, running: str | None) -> None:
        def make_session(*arguments: object, **options: object) -> SimpleNamespace:
            assert options == {"providers": ["CUDAExecutionProvider"], "enable_fallback": 0}
            if running is None:
                raise RuntimeError("no\n  cuDNN")
            return SimpleNamespace(get_providers=lambda: [running], get_inputs=lambda: [])

        super().__init__(
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            set_default_logger_severity=lambda level: None,
            preload_dlls=lambda: sys.stdout.write("something was not found"),
            SessionOptions=FakeOptions,
            OrtValue=SimpleNamespace(ortvalue_from_numpy=lambda array: array),
            InferenceSession=make_session,
        )


def on_cuda() -> Any:
    """A session of any graph on CUDA."""
    sizes = Sizes([8], 300, 8, tied=True)
    bundle: Any = SimpleNamespace(folder=Path(), name="fake", sizes=sizes, weights=bytes(file_length(sizes)))
    return Runtime(bundle, "cuda", 1).open(step_graph)


def test_cuda_that_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: FakeRuntime("CUDAExecutionProvider"))
    assert on_cuda().get_providers() == ["CUDAExecutionProvider"]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("running", "message"), [("CPUExecutionProvider", "fell back to the CPU"), (None, "here: no cuDNN")])
def test_cuda_that_does_not_run(monkeypatch: pytest.MonkeyPatch, running: str | None, message: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: FakeRuntime(running))
    with pytest.raises(UsageError, match=f"{message}.*use the provider cpu"):
        on_cuda()


def test_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: FakeRuntime("CUDAExecutionProvider"))
    with pytest.raises(UsageError, match="no NVIDIA driver"):
        on_cuda()


def test_cuda_with_the_wheel_for_cpus(bundle: Bundle) -> None:
    if "CUDAExecutionProvider" in runtime.import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime is built with CUDA")
    with pytest.raises(UsageError, match=r"built without CUDA.*pip install .*\[gpu\]"):
        Sampler(bundle, provider="cuda")


@pytest.mark.parametrize(
    ("kind", "saturates", "optimized"), [("fp32", False, False), ("fp16", False, True), ("int8", True, True)]
)
def test_only_weights_that_are_computed_need_the_optimizer(
    kind: str, saturates: bool, optimized: bool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it fp16 weights would be cast, and int8 ones shifted, again at each call."""
    monkeypatch.setattr(runtime, "int8_saturates", lambda threads: saturates)
    level = Sampler(opened(kind).bundle, threads=1).step_session.get_session_options().graph_optimization_level
    assert (level != runtime.import_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL) == optimized


def test_onnxruntime_that_is_missing_or_installed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels: set[str] = {"onnxruntime", "onnxruntime-gpu"}
    monkeypatch.setattr(runtime, "installed", lambda name: name in wheels)
    with pytest.raises(UsageError, match="both installed"):
        runtime.import_onnxruntime()
    # What uninstalling one of the two leaves: a module with nothing in it.
    monkeypatch.setattr(runtime.importlib, "import_module", lambda name: SimpleNamespace())
    wheels.remove("onnxruntime-gpu")
    with pytest.raises(UsageError, match=r"pip install --force-reinstall onnxruntime$"):
        runtime.import_onnxruntime()
    wheels.clear()

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(runtime.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"pip install .*\[cpu\]"):
        runtime.import_onnxruntime()


def test_wheels_are_found_beside_folders_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Onnxruntime_GPU-1.20.dist-info").mkdir()  # as old builds of wheels spell it
    names, installed = os.listdir, getattr(runtime.installed, "__wrapped__")  # noqa: B009 (without its cache)

    def listed(folder: str) -> list[str]:
        if folder == "closed":
            raise PermissionError(folder)
        return names(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listed)
        patch.setattr(sys, "path", ["closed", str(tmp_path)])
        found = [installed(name) for name in ("onnxruntime", "onnxruntime-gpu")]
    assert found == [False, True]


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_onnxruntime_sends_telemetry_only_if_asked_to(monkeypatch, given, kept):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given or "")
    if given is None:
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    runtime.import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == kept
