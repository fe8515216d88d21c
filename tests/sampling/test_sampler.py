"""The sampler: runs of any length make the same words, states fork, join and rest in files, scores are those of torch."""

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
from numpy.typing import NDArray

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.settings import ModelSettings
from lmdist_export.bundle import GENERATION, Bundle
from lmdist_export.graph.graphs import step_graph
from lmdist_export.graph.sizes import Sizes
from lmdist_export.options import EVERY_FEATURE, GenerationConfig, features_of
from lmdist_export.sampling import runtime
from lmdist_export.sampling.runtime import Runtime
from lmdist_export.sampling.sampler import STEP_TOKENS, Sampler
from lmdist_export.sampling.state import State, concatenate, restored, uniform_numbers
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


# --- making words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_words_do_not_depend_on_how_they_are_asked_for(kind: str, opened: Opened) -> None:
    """Many in one run, one in each of many, or texts one by one: they are the same."""
    made = opened(kind)
    random = np.random.default_rng(0)
    bias = np.where(random.random(V) < 0.1, -np.inf, 0).astype(np.float32)
    of_rows: list[tuple[NDArray[np.float32] | None, NDArray[np.bool_] | None]] = [(None, None)] * len(CONFIGS)
    of_rows[-1] = random.normal(size=(4, V)).astype(np.float32), random.random((4, V)) < 0.2
    for config, (row_bias, in_prompt) in zip(CONFIGS, of_rows, strict=True):
        start = made.start(PROMPTS).seeded(3)
        options: dict[str, Any] = {"bias": bias, "row_bias": row_bias, "in_prompt": in_prompt}
        words, after = made.generate(start, config, 20, **options)
        assert words.shape == (20, 4)
        assert np.isfinite(bias[words]).all()
        for lengths in ([1] * 20, [7, 13]):
            pieces, state = [], start
            for length in lengths:
                piece, state = made.generate(state, config, length, **options)
                pieces.append(piece)
            assert np.array_equal(np.concatenate(pieces), words), config
            np.testing.assert_array_equal(state.tokens, after.tokens)
            np.testing.assert_allclose(state.model, after.model, atol=1e-5)
        for row in range(4):
            of_row: dict[str, Any] = {
                name: None if value is None else value[row : row + 1] for name, value in options.items() if name != "bias"
            }
            alone, _ = made.generate(start.rows([row]), config, 20, bias=bias, **of_row)
            assert np.array_equal(alone[:, 0], words[:, row]), (config, row)


@pytest.mark.parametrize("kind", ["fp32", "adaptive"])
def test_words_are_those_of_the_reference(kind: str, opened: Opened) -> None:
    """Each word is drawn from the logits after all words before it, as the documents say."""
    made = opened(kind)
    random = np.random.default_rng(1)
    bias = np.where(random.random(V) < 0.1, -np.inf, random.integers(-4, 5, V) / 4).astype(np.float32)
    row_bias = np.where(random.random((2, V)) < 0.1, -np.inf, random.integers(-4, 5, (2, V)) / 4).astype(np.float32)
    in_prompt = random.random((2, V)) < 0.2
    prompts = [[1, 5, 6], [1]]
    unsure = 0
    for config in CONFIGS:
        features = features_of(config, False)
        options: dict[str, Any] = {"row_bias": row_bias, "in_prompt": in_prompt} if features.adjusted else {}
        words, _ = made.generate(made.start(prompts).seeded(5), config, 15, bias=bias, **options)
        for row, prompt in enumerate(prompts):
            uniform = np.random.default_rng([5, row]).random((15, features.attempts), np.float32)
            counts = np.zeros(V)
            for place, word in enumerate(words[:, row].tolist()):
                logits, _ = made.next_logits([*prompt, *words[:place, row].tolist()])
                past = Past(counts.tolist(), in_prompt[row].tolist(), row_bias[row].tolist()) if options else None
                total = (logits[0] + bias).tolist()
                if config.greedy:
                    assert word == np.argmax(scores_of(total, config, past))
                else:
                    right = expected(total, config, past)
                    [wanted], [certain] = right.sampled(uniform[place, :1])
                    assert word in right.tokens or right.margin < NEAR
                    unsure += not certain or right.margin < NEAR
                    # Where a first word is refused it takes more than one number: test_sampling_nodes.py has the law of it.
                    assert word == wanted or not certain or right.margin < NEAR or features.attempts > 1
                counts[word] += 1
    assert unsure < 10


def test_the_seed_decides_and_rows_do_not_depend_on_the_others(opened: Opened) -> None:
    made, config = opened("fp32"), GenerationConfig(top_p=0.8)
    prompts = [PROMPTS[1]] * 3
    three, _ = made.generate(made.start(prompts).seeded(4), config, 40)
    assert np.array_equal(made.generate(made.start(prompts).seeded(4), config, 40)[0], three)
    assert np.array_equal(made.generate(made.start(prompts[:2]).seeded(4), config, 40)[0], three[:, :2])
    assert not np.array_equal(made.generate(made.start(prompts).seeded(5), config, 40)[0], three)
    assert not np.array_equal(three[:, 0], three[:, 1])


def test_words_of_any_seed_follow_the_models_law(opened: Opened) -> None:
    made = opened("int8")
    logits, _ = made.next_logits([1, 7])
    state = made.prefill(made.start([[1, 7]]))
    for config in (GenerationConfig(), GenerationConfig(top_p=0.8), GenerationConfig(min_p=0.02, temperature=1.5)):
        right = expected(logits[0].tolist(), config)
        words, _ = made.generate(state.fork(4_000, seed=9), config, 1)
        assert set(words[0].tolist()) <= set(right.tokens)
        check_frequencies(words[0], dict(zip(right.tokens, right.probabilities, strict=True)))


def test_what_was_read_is_not_read_again(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece or in several, rows of any length: words go on from there as from the prompt."""
    made = opened("fp32")
    prompts = [*PROMPTS, [1, *range(2, 25)]]
    for config in (GenerationConfig(), ALL_OPTIONS):
        words, _ = made.generate(made.start(prompts).seeded(2), config, 10)
        for at_once in (512, 24, 23, 5, 2):
            monkeypatch.setattr("lmdist_export.sampling.sampler.PREFILL_TOKENS", at_once)
            state = made.prefill(made.start(prompts), config)
            assert state.tokens.shape == (5, 1)
            assert np.array_equal(state.tokens[:, 0], [prompt[-1] for prompt in prompts])
            assert np.array_equal(made.generate(state.seeded(2), config, 10)[0], words)


def test_an_early_stop_is_no_stop(opened: Opened) -> None:
    """Fewer words come where all rows are at an end, and what comes after them is what would have come."""
    made = opened("fp32")
    for config in (GenerationConfig(), ALL_OPTIONS, GenerationConfig(top_p=0.8, presence_penalty=0.5)):
        start = made.start(PROMPTS).seeded(1)
        words, end = made.generate(start, config, 80)
        ends = [2, 6, 3, 5]
        stops = {int(words[place, row]) for row, place in enumerate(ends)}
        first = max(int(np.flatnonzero(np.isin(words[:, row], list(stops)))[0]) for row in range(4)) + 1
        assert 1 < first <= 7
        some, state = made.generate(start, config, 80, stops=sorted(stops))
        assert np.array_equal(some, words[:first])
        rest, after = made.generate(state, config, 80 - first)
        assert np.array_equal(rest, words[first:])
        assert same(after, end)
        # One text has no such word: all are made.
        never = next(word for word in range(V) if word not in words[:, 0])
        assert len(made.generate(start, config, 80, stops=[never])[0]) == 80


def test_no_words_at_all(opened: Opened) -> None:
    made = opened("fp32")
    for config in CONFIGS:
        words, state = made.generate(made.start(PROMPTS).seeded(1), config, 0)
        assert words.shape == (0, 4)
        after, _ = made.generate(state, config, 6)
        assert np.array_equal(after, made.generate(made.start(PROMPTS).seeded(1), config, 6)[0])


def test_options_that_fp32_does_not_know(opened: Opened) -> None:
    """Values that are allowed and rounded to nothing, or to more than any number."""
    made = opened("fp32")
    start = made.start([[1, 5]] * 3).seeded(0)
    likeliest, _ = made.generate(start, GenerationConfig(temperature=0.0), 5)
    narrowest: list[dict[str, Any]] = [
        *({"temperature": 1e-37}, {"temperature": 1e-45}, {"temperature": sys.float_info.min}, {"top_p": 1e-50}),
        *({"min_p": 1.0}, {"min_p": 1.0, "top_p": 1e-9}, {"top_p": 1e-50, "top_k": 7}, {"top_k": 1}),
    ]
    for narrow in narrowest:
        assert np.array_equal(made.generate(start, GenerationConfig(**narrow), 5)[0], likeliest), narrow
    largest: dict[str, Any] = {"repetition_penalty": 1e6, "presence_penalty": 1e6, "frequency_penalty": -1e6}
    for temperature in (1e-45, 1.0, 1e60):
        words, _ = made.generate(start, GenerationConfig(temperature=temperature, **largest), 40)
        assert words.max() < V
    words, _ = made.generate(start, GenerationConfig(temperature=1e60), 100)
    assert len(np.unique(words)) > 100  # all words are equally likely
    words, _ = made.generate(start, GenerationConfig(typical_p=1e-50), 20)
    assert words.max() < V


# --- states --------------------------------------------------------------------------------------------------------


def test_forks_go_on_as_texts_of_their_own(opened: Opened) -> None:
    made, config = opened("fp32"), GenerationConfig(top_k=40, frequency_penalty=0.3)
    words, _ = made.generate(made.start([PROMPTS[1]] * 3).seeded(8), config, 12)
    fork = made.prefill(made.start([PROMPTS[1]]), config).fork(3, seed=8)
    assert len(fork) == 3
    assert np.array_equal(made.generate(fork, config, 12)[0], words)
    assert len({tuple(column) for column in words.T.tolist()}) == 3


def test_rows_of_a_state_go_on_as_they_would_have(opened: Opened) -> None:
    made, config = opened("fp32"), ALL_OPTIONS
    _, state = made.generate(made.start(PROMPTS).seeded(1), config, 5)
    words, _ = made.generate(state, config, 8)
    some = state.rows([3, 1, 1])
    for _ in range(2):  # a state is not used up
        assert np.array_equal(made.generate(some, config, 8)[0], words[:, [3, 1, 1]])
    assert np.array_equal(made.generate(state, config, 8)[0], words)


def test_joined_states_go_on_as_they_would_have(opened: Opened) -> None:
    """One with words still to read and no counts, one in the midst of its text."""
    made, config = opened("fp32"), ALL_OPTIONS
    _, old = made.generate(made.start(PROMPTS[:2]).seeded(1), config, 9)
    new = made.start(PROMPTS[2:]).seeded(2)
    assert old.counts is not None
    assert new.counts is None
    for states in ([old, new], [new, old]):
        words, after = made.generate(concatenate(states), config, 8)
        apart = [made.generate(state, config, 8) for state in states]
        assert np.array_equal(words, np.concatenate([piece for piece, _ in apart], axis=1))
        again, _ = made.generate(after, config, 8)
        assert np.array_equal(again, np.concatenate([made.generate(state, config, 8)[0] for _, state in apart], axis=1))
    plain = concatenate([made.start(PROMPTS[:1]).seeded(1), new])
    assert plain.counts is None
    assert len(plain) == 3


@pytest.mark.parametrize("config", [GenerationConfig(), ALL_OPTIONS], ids=["plain", "counted"])
def test_a_state_goes_on_from_its_file(config: GenerationConfig, opened: Opened, tmp_path: Path) -> None:
    made = opened("adaptive")
    for state in (made.start(PROMPTS).seeded(6), made.generate(made.start(PROMPTS).seeded(6), config, 7)[1]):
        state.save(tmp_path / "state.npz")
        loaded = State.load(tmp_path / "state.npz")
        assert same(loaded, state)
        fresh = Sampler(made.bundle, threads=1)
        assert np.array_equal(fresh.generate(loaded, config, 9)[0], made.generate(state, config, 9)[0])
    unseeded = made.start(PROMPTS)
    unseeded.save(tmp_path / "state.npz")
    assert State.load(tmp_path / "state.npz").generators == ()


def test_a_state_of_another_model_is_refused(opened: Opened, tmp_path: Path) -> None:
    here = opened("fp32")
    other = Sampler(bare_bundle(tmp_path / "other", UNTIED), threads=1)
    larger = Sampler(bare_bundle(tmp_path / "larger", TIED, vocabulary_size=2 * V), threads=1)
    for state, message in (
        (other.start([[1, 4], [5]]), r"h is \(2, 20\); \(2, 32\) is expected"),
        (
            replace(here.start([[1]]), model=(here.initial_state(1)[0], np.zeros((1, 5), np.float32))),
            r"c is \(1, 5\); \(1, 32\) is expected",
        ),
        (larger.generate(larger.start([[1]]).seeded(1), ALL_OPTIONS, 1)[1], r"counts is \(1, 768\); \(1, 512\) is expected"),
        (larger.start([[1, V]]), f"token is {V}; one below {V} is expected"),
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
    made = opened("fp32")
    made.generate(made.start(PROMPTS).seeded(6), ALL_OPTIONS, 2)[1].save(path)
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
    made = opened(kind)
    random = np.random.default_rng(2)
    tokens, targets = random.integers(0, V, (2, 3, 9))
    h, c = random.uniform(-0.5, 0.5, (2, 3, made.sizes.state_size)).astype(np.float32)
    scores, after = made.score(tokens, targets, (h, c))
    logits, state = made.step(tokens, (h, c))
    of_steps = np.take_along_axis(log_softmax(logits), targets[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(scores, of_steps, atol=1e-4)
    np.testing.assert_allclose(after, state, atol=1e-5)

    model = make_model(KINDS[kind][0], V)
    with torch.no_grad():
        hidden, _ = model(torch.from_numpy(tokens), (torch.from_numpy(h), torch.from_numpy(c)))
        of_torch = log_softmax(model.logits(hidden).numpy())
    right = np.take_along_axis(of_torch, targets[..., None], axis=2)[..., 0]
    allowed = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.2, "int4": 1.0}[made.sizes.precision]
    assert np.abs(scores - right).max() < allowed

    for places in (1, 2, 12, 30):
        monkeypatch.setattr("lmdist_export.sampling.sampler.LOGITS_AT_ONCE", places * made.sizes.padded)
        in_pieces, end = made.score(tokens, targets, (h, c))
        np.testing.assert_allclose(in_pieces, scores, atol=1e-4)
        np.testing.assert_allclose(end, after, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "int8", "adaptive"])
def test_scores_do_not_depend_on_what_is_on_the_right(kind: str, opened: Opened) -> None:
    made = opened(kind)
    random = np.random.default_rng(3)
    tokens, targets = random.integers(0, V, (2, 3, 12))
    lengths = [12, 7, 1]
    scores, _ = made.score(tokens, targets)
    for row, length in enumerate(lengths):
        tokens[row, length:], targets[row, length:] = random.integers(0, V, (2, 12 - length))
    others, _ = made.score(tokens, targets)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(others[row, :length], scores[row, :length], atol=1e-5)
        alone, _ = made.score(tokens[row : row + 1, :length], targets[row : row + 1, :length])
        np.testing.assert_allclose(alone[0], scores[row, :length], atol=1e-5)
    assert np.abs(others[1, 7:] - scores[1, 7:]).max() > 0.1


def test_reading_at_once_is_reading_word_by_word(opened: Opened) -> None:
    made = opened("fp32")
    context = np.random.default_rng(0).integers(0, V, 2 * STEP_TOKENS + 5).tolist()
    logits, state = made.next_logits(context)
    step_logits, step_state = np.zeros(0), made.initial_state(1)
    for word in context:
        step_logits, step_state = made.step(np.array([[word]]), step_state)
    assert logits.shape == (1, V)
    np.testing.assert_allclose(logits, step_logits[:, -1], atol=1e-5)
    np.testing.assert_allclose(state, step_state, atol=1e-5)
    # What makes words reads as the step graph does.
    after = made.prefill(made.start([context]))
    np.testing.assert_allclose(after.model, made.next_logits(context[:-1])[1], atol=1e-5)


def test_threads_change_nothing(bundle: Bundle) -> None:
    tokens = np.arange(12).reshape(3, 4)
    one, two = Sampler(bundle, threads=1), Sampler(bundle, threads=2)
    np.testing.assert_allclose(one.step(tokens, one.initial_state(3))[0], two.step(tokens, two.initial_state(3))[0], atol=1e-5)
    words = [made.generate(made.start(PROMPTS).seeded(1), GenerationConfig(), 20)[0] for made in (one, two)]
    assert np.array_equal(words[0], words[1])


# --- the same words elsewhere --------------------------------------------------------------------------------------

NEUTRAL = GenerationConfig(
    # In fp32 they are 1, 0 and 1, so that the graph has the nodes and they do nothing.
    **{"top_p": 1 - 1e-9, "min_p": 1e-60, "typical_p": 1 - 1e-9, "repetition_penalty": 1 + 1e-9, "top_k": V}
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_graph_makes_the_same_words_by_itself(kind: str, opened: Opened) -> None:
    """As a stranger would run it: the file, its inputs by name, onnxruntime and nothing of ours."""
    made = opened(kind)
    session = onnxruntime.InferenceSession(made.bundle.folder / GENERATION, providers=["CPUExecutionProvider"])
    for config in (ALL_OPTIONS, NEUTRAL):
        assert features_of(config, False) == EVERY_FEATURE
        start = made.start(PROMPTS).seeded(3)
        generators = [restored(generator.bit_generator.state) for generator in start.generators]
        words, after = made.generate(start, config, 20)
        rows, padded = len(PROMPTS), made.sizes.padded
        feed = {
            "prompt": start.tokens,
            "lengths": start.lengths,
            "h": np.zeros((rows, made.sizes.state_size), np.float32),
            "c": np.zeros((rows, made.sizes.state_size), np.float32),
            "uniform": uniform_numbers(generators, 20, 1),
            "bias": np.zeros(padded, np.float32),
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
            # What is taken from logits is taken after they are over the temperature.
            "presence_penalty": config.presence_penalty * inverse,
            "frequency_penalty": config.frequency_penalty * inverse,
        }
        feed |= {name: np.array(value, np.float32) for name, value in numbers.items()}
        assert set(feed) == {value.name for value in session.get_inputs()}
        found: dict[str, Any] = dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))
        assert np.array_equal(found["words"], words)
        np.testing.assert_allclose([found["next_h"], found["next_c"]], after.model, atol=1e-6)
        assert np.array_equal(found["next_counts"].sum(axis=1), [20] * rows)


@pytest.mark.parametrize("kind", ["int8", "int4", "adaptive-int8"])
def test_processors_whose_products_saturate_make_the_same_words(
    kind: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = opened(kind).bundle
    found = []
    for saturates in (False, True):
        monkeypatch.setattr(runtime, "int8_saturates", lambda threads, saturates=saturates: saturates)
        if not saturates and Sampler(bundle).runtime.target.int8_saturates:
            pytest.skip("this processor's products saturate")
        made = Sampler(bundle, threads=1)
        assert made.runtime.target.int8_saturates == saturates
        tokens = np.arange(12).reshape(3, 4)
        words = [made.generate(made.start(PROMPTS).seeded(1), config, 20)[0] for config in (CONFIGS[0], ALL_OPTIONS)]
        found.append((*words, made.step(tokens, made.initial_state(3))[0], made.score(tokens, tokens)[0]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_of_whole_numbers_do_not_run_on_cuda(opened: Opened) -> None:
    for kind in ("int8", "int4"):
        with pytest.raises(UsageError, match=f"precision {kind} runs on a CPU only: use --provider cpu, or export .* fp16"):
            Sampler(opened(kind).bundle, provider="cuda")


# --- onnxruntime ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [(("tpu", 0), "'tpu'"), (("cpu", -1), "threads is -1")])
def test_wrong_arguments(bundle: Bundle, arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampler(bundle, *arguments)


class FakeRuntime(SimpleNamespace):
    """An onnxruntime built with CUDA, whose sessions run on `running`, or fail."""

    def __init__(self, running: str | None) -> None:
        def make_session(*arguments: object, **options: object) -> SimpleNamespace:
            assert options == {"providers": ["CUDAExecutionProvider"], "enable_fallback": 0}
            if running is None:
                raise RuntimeError("no\n  cuDNN")
            return SimpleNamespace(get_providers=lambda: [running])

        super().__init__(
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            set_default_logger_severity=lambda level: None,
            preload_dlls=lambda: sys.stdout.write("something was not found"),
            SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda name, value: None),
            InferenceSession=make_session,
        )


def on_cuda() -> Any:
    """A session of any graph on CUDA."""
    return Runtime(Path(), Sizes([8], 300, 8, tied=True), "cuda", 1).open(step_graph)


def test_cuda_that_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: FakeRuntime("CUDAExecutionProvider"))
    assert on_cuda().get_providers() == ["CUDAExecutionProvider"]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("running", "message"), [("CPUExecutionProvider", "fell back to the CPU"), (None, "here: no cuDNN")])
def test_cuda_that_does_not_run(monkeypatch: pytest.MonkeyPatch, running: str | None, message: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: FakeRuntime(running))
    with pytest.raises(UsageError, match=f"{message}.*--provider cpu"):
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
    with pytest.raises(UsageError, match=r"built without CUDA.*lmdist\[gpu\]"):
        Sampler(bundle, provider="cuda")


def test_onnxruntime_that_is_not_there_or_twice(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(UsageError, match=r"pip install 'lmdist\[cpu\]'"):
        runtime.import_onnxruntime()


def test_a_folder_without_weights(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened by onnxruntime") as raised:
        _ = Sampler(replace(bundle, folder=tmp_path)).step_session
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_onnxruntime_reports_to_its_makers_only_where_that_is_asked_for(monkeypatch, given, kept):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given or "")
    if given is None:
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    runtime.import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == kept
