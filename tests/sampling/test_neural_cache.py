"""The neural cache in the graphs: scores, next tokens and generated texts are torch's, for any batch, length and cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdist.errors import UsageError
from lmdist.neural_cache import NeuralCache
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.generation import continuations, fixed_bias
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.scoring import score_batch, score_stream
from lmdist_export.sampling.state import State, concatenate
from support.neural_cache_reference import distributions, mixture
from support.sampling_reference import expected
from support.small_bundles import ADAPTIVE, TIED, UNTIED, bare_bundle, make_model

CACHE = NeuralCache(size=11, theta=0.4, weight=0.3)
SETTINGS = {"tied": TIED, "untied": UNTIED, "adaptive": ADAPTIVE}
VOCABULARY = 300


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Sampler]:
    """A model and the sampler of its bundle."""
    return model_and_sampler(request.param, tmp_path_factory.mktemp("cache") / "bundle")


def model_and_sampler(name: str, folder: Path, cache: NeuralCache | None = CACHE) -> tuple[Any, Sampler]:
    bundle = replace(bare_bundle(folder, SETTINGS[name], vocabulary_size=VOCABULARY), cache=cache)
    return make_model(SETTINGS[name], VOCABULARY), Sampler(bundle, threads=1)


def text(length: int, seed: int = 0) -> list[int]:
    """Return tokens in which some come again and again."""
    return (np.random.default_rng(seed).integers(2, 60, length) ** 2 // 60 + 2).tolist()


def log_probabilities(model: Any, tokens: list[int], cache: NeuralCache = CACHE) -> np.ndarray:
    """Return the mixture (N + 1, V) before each token and after the last, by NumPy in fp64."""
    return mixture(*distributions(model, tokens, cache.size, cache.theta), cache.weight)


def scores(model: Any, tokens: list[int], cache: NeuralCache = CACHE) -> np.ndarray:
    return log_probabilities(model, tokens, cache)[np.arange(len(tokens)), tokens]


def test_scores_are_those_of_torch(pair: tuple[Any, Sampler]) -> None:
    model, sampler = pair
    texts = [text(40), text(3, seed=1), text(40)[:9] + text(6, seed=2), [], text(1)]
    for found, tokens in zip(score_batch(sampler, texts, CACHE), texts, strict=True):
        assert found == pytest.approx(scores(model, tokens), abs=1e-5)


@pytest.mark.parametrize("cuts", [[40], [1, 39], [13, 2, 25], [1] * 40])
def test_a_stream_is_the_same_in_any_pieces(pair: tuple[Any, Sampler], cuts: list[int]) -> None:
    model, sampler = pair
    tokens, found = text(40), []
    state = sampler.initial_state(1, cached=True)
    before = END_ID
    for length in cuts:
        piece = tokens[len(found) : len(found) + length]
        values, state = sampler.score(np.array([[before, *piece[:-1]]]), np.array([piece]), state, CACHE)
        found += values[0].tolist()
        before = piece[-1]
    assert found == pytest.approx(scores(model, tokens), abs=1e-5)
    assert [part.shape[1:] for part in state[-2:]] == [(CACHE.size, model.layer_sizes[-1]), (CACHE.size,)]


@pytest.mark.parametrize("length", [0, 1, 30])
def test_the_next_token_is_that_of_torch(pair: tuple[Any, Sampler], length: int) -> None:
    model, sampler = pair
    found, _ = sampler.next_logits([END_ID, *text(length)], CACHE)
    assert found[0] == pytest.approx(log_probabilities(model, text(length))[-1], abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 500])
def test_sizes(tmp_path: Path, size: int) -> None:
    cache = replace(CACHE, size=size)
    model, sampler = model_and_sampler("tied", tmp_path / "bundle", cache)
    tokens = text(25)
    assert score_stream(sampler, [tokens], sampler.initial_state(1, cached=True), cache)[0][0] == pytest.approx(
        scores(model, tokens, cache), abs=1e-5
    )


def test_without_weight_the_scores_are_the_models(pair: tuple[Any, Sampler]) -> None:
    _, sampler = pair
    tokens = text(20)
    none = replace(CACHE, weight=0.0)
    assert score_batch(sampler, [tokens], none)[0] == pytest.approx(score_batch(sampler, [tokens])[0], abs=1e-5)


# --- generating ----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"do_sample": False},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "top_k": {"top_k": 7},
    "typical_p": {"top_k": 6, "typical_p": 0.8},
    "suppressed": {"suppress_tokens": (UNKNOWN_ID, 5, 9), "sequence_bias": (([7], 1.5),), "temperature": 0.9},
}


def config_of(**options: Any) -> GenerationConfig:
    return GenerationConfig(cache_weight=CACHE.weight, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_generated_tokens_are_sampled_from_the_mixture(pair: tuple[Any, Sampler], name: str) -> None:
    """Each token is the one that the plain Python reference samples from torch's mixture by the same uniform number."""
    model, sampler = pair
    config = config_of(**OPTIONS[name])
    bias = fixed_bias(config, VOCABULARY)
    prompts = [text(14), text(2, seed=3), []]
    state = sampler.start([[END_ID, *prompt] for prompt in prompts], cached=True).seeded(5)
    tokens, _ = sampler.generate(state, config, 12, bias=bias)  # (N, B)
    checked = 0
    for row, prompt in enumerate(prompts):
        uniform = np.random.default_rng([5, row]).random(12, np.float32)
        for place, token in enumerate(tokens[:, row].tolist()):
            logits = log_probabilities(model, [*prompt, *tokens[:place, row].tolist()])[-1] + bias
            if config.greedy:
                assert token == int(np.argmax(logits))
                checked += 1
                continue
            reference = expected(logits.tolist(), config)
            assert token in reference.tokens
            if name == "top_p":  # it may have rejected the first tokens
                continue
            sampled, certain = reference.sampled(uniform[place : place + 1])
            if certain[0] and reference.margin > 1e-4:
                assert token == sampled[0]
                checked += 1
    assert checked > 25 or name == "top_p"


def test_texts_do_not_depend_on_their_batch_nor_on_the_calls(pair: tuple[Any, Sampler]) -> None:
    _, sampler = pair
    config = config_of()
    prompts = [text(30), text(2, seed=3), [], text(9, seed=4)]
    alone = [
        sampler.generate(replace(sampler.start([[END_ID, *prompt]], cached=True), generators=generators(row)), config, 24)[0]
        for row, prompt in enumerate(prompts)
    ]
    state = sampler.start([[END_ID, *prompt] for prompt in prompts], cached=True)
    state = replace(state, generators=tuple(generator for row in range(4) for generator in generators(row)))
    together, _ = sampler.generate(state, config, 24)
    assert together.T.tolist() == [tokens[:, 0].tolist() for tokens in alone]
    pieces = []
    for length in (1, 5, 11, 7):
        tokens, state = sampler.generate(state, config, length)
        pieces.append(tokens)
    assert np.concatenate(pieces).tolist() == together.tolist()


def generators(row: int) -> tuple[np.random.Generator, ...]:
    return (np.random.default_rng([1, row]),)


def test_states_join_part_and_wait_in_a_file(pair: tuple[Any, Sampler], tmp_path: Path) -> None:
    _, sampler = pair
    config = config_of()
    one, other = (
        sampler.prefill(sampler.start([[END_ID, *prompt]], cached=True).seeded(2), config) for prompt in (text(20), text(3))
    )
    joined = concatenate([one, other]).seeded(2)
    joined.save(tmp_path / "state.npz")
    tokens, _ = sampler.generate(State.load(tmp_path / "state.npz"), config, 8)
    assert sampler.generate(joined, config, 8)[0].tolist() == tokens.tolist()
    second = sampler.generate(joined.rows([1]), config, 8)[0]
    assert second[:, 0].tolist() == tokens[:, 1].tolist()


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, pair: tuple[Any, Sampler]) -> None:
    _, sampler = pair
    config, prompt = config_of(), text(40)
    expected_text = [text.tokens for text, _ in continuations(sampler, [prompt], replace(config, max_new_tokens=6), seed=1)][-1]
    monkeypatch.setattr("lmdist_export.sampling.sampler.PREFILL_TOKENS", 7)
    monkeypatch.setattr("lmdist_export.sampling.generation.PREFILL_TOKENS", 7)
    found = [text.tokens for text, _ in continuations(sampler, [prompt], replace(config, max_new_tokens=6), seed=1)][-1]
    assert found == expected_text


def test_what_is_banned_stays_banned(pair: tuple[Any, Sampler]) -> None:
    """A token that the cache would make likely, and `<unk>`, are never generated."""
    _, sampler = pair
    config = replace(config_of(suppress_tokens=(UNKNOWN_ID, 4)), cache_weight=0.999, max_new_tokens=60)
    prompt = [4, UNKNOWN_ID] * 10
    for generated, _ in continuations(sampler, [prompt], config, seed=3, n=4):
        assert not {4, UNKNOWN_ID} & set(generated.tokens)


def test_mistakes(tmp_path: Path) -> None:
    _, sampler = model_and_sampler("tied", tmp_path / "bundle", None)
    with pytest.raises(UsageError, match="has no neural cache: tune one by lmdist-evaluate RUN --cache 2000"):
        _ = sampler.cache
    sampler.bundle = replace(sampler.bundle, cache=CACHE)
    with pytest.raises(UsageError, match="the state has no memory"):
        sampler.generate(sampler.start([[END_ID]]).seeded(0), config_of(), 3)
