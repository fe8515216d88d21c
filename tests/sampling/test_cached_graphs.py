"""The neural cache in the graphs: scores, next tokens and generated texts are torch's, for any batch, length and cut."""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lmdist.cache_settings import NeuralCache, write_tuned
from lmdist.errors import DataError, UsageError
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import find_checkpoint
from lmdist_export import export, generate, score
from lmdist_export.bundle import Bundle
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.generation import continuations, fixed_bias
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.scoring import score_batch, score_stream
from lmdist_export.sampling.state import State, concatenate
from lmdist_export.serving.batching import Batcher, Request
from support.neural_cache_reference import distributions, mixture
from support.sampling_reference import expected
from support.small_bundles import ADAPTIVE, PLAIN_WORDS, TIED, UNTIED, bare_bundle, edit_json, make_model, make_run

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
    without_config = sampler.prefill(sampler.start([[END_ID, *text(20)]], cached=True)).seeded(2)
    assert np.array_equal(sampler.generate(without_config, config, 8)[0], sampler.generate(one, config, 8)[0])
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


def test_requests_share_a_batch(pair: tuple[Any, Sampler]) -> None:
    _, sampler = pair
    config = replace(config_of(), max_new_tokens=20)
    prompts = [text(12), text(3, seed=1)]
    expected_texts = {
        text.prompt_number: text.tokens for text, _ in continuations(sampler, prompts, config, seed=4) if text.finish_reason
    }
    found = Batcher(sampler).generate(Request(sampler, prompts, config, 4), timeout_seconds=60)
    assert {text.prompt_number: text.tokens for text in found} == expected_texts


def test_mistakes(tmp_path: Path) -> None:
    _, sampler = model_and_sampler("tied", tmp_path / "bundle", None)
    with pytest.raises(UsageError, match="has no neural cache: tune one by lmdist-evaluate RUN --cache 2000"):
        _ = sampler.cache
    sampler.bundle = replace(sampler.bundle, cache=CACHE)
    with pytest.raises(UsageError, match="the state has no memory"):
        sampler.generate(sampler.start([[END_ID]]).seeded(0), config_of(), 3)
    tokens = np.array([[5, 6]])
    with pytest.raises(UsageError, match="the state has no memory"):
        sampler.score(tokens, tokens, sampler.initial_state(1), CACHE)


def test_without_a_cache_a_memory_is_left_out(pair: tuple[Any, Sampler]) -> None:
    _, sampler = pair
    tokens, cached = np.array([text(9)]), sampler.initial_state(1, cached=True)
    for with_memory, without in (
        (sampler.step(tokens, cached), sampler.step(tokens, cached[:2])),
        (sampler.score(tokens, tokens, cached), sampler.score(tokens, tokens, cached[:2])),
    ):
        assert np.array_equal(with_memory[0], without[0])
        assert len(with_memory[1]) == len(without[1]) == 2
    for states in itertools.permutations([sampler.start([[END_ID]], cached=True), sampler.start([[END_ID]])]):
        with pytest.raises(AssertionError, match="states with a memory and without one"):
            concatenate(states)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (3, np.array([[10**6]]), "the id of a remembered token is 1000000; one from -1 to 299"),
        (3, np.array([[2.0]]), r"cache_tokens is float64 \(1, 1\); int64"),
        (3, np.array(2), r"cache_tokens is int64 \(\); int64 \(1, 1\)"),
        (3, np.zeros((1, 0), np.int64), r"cache_tokens is int64 \(1, 0\); int64 \(1, 1\)"),
        (2, np.full((1, 1, 20), np.nan, np.float32), "cache_hidden holds numbers that are not finite"),
        (2, np.array([[[np.inf, -np.inf] * 10]], np.float32), "cache_hidden holds numbers that are not finite"),
        (2, np.zeros((1, 2, 20), np.float32), r"cache_hidden is float32 \(1, 2, 20\); float32 \(1, 1, 20\)"),
    ],
)
def test_a_foreign_memory_is_rejected(tmp_path: Path, part: int, value: np.ndarray, message: str) -> None:
    _, sampler = model_and_sampler("adaptive", tmp_path / "bundle")
    state = sampler.start([[END_ID]], cached=True).seeded(1)
    replace(state, model=(*state.model[:part], value, *state.model[part + 1 :])).save(tmp_path / "state.npz")
    with pytest.raises(UsageError, match=f"the state is not this model's: .*{message}"):
        sampler.generate(State.load(tmp_path / "state.npz"), config_of(), 3)


# --- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run for which a cache was tuned, and its bundle."""
    folder = tmp_path_factory.mktemp("exported")
    run = make_run(folder, TIED, "whitespace", PLAIN_WORDS)
    manifest = json.loads((find_checkpoint(run) / "manifest.json").read_text())
    write_tuned(run, manifest["files"]["model.safetensors"]["sha256"], CACHE)
    export.main([str(run), "-o", str(folder / "bundle")])
    return run, folder / "bundle"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs a command in this process, checks its exit code, and returns stdout and stderr."""

    def run(module: ModuleType, *arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) if code else nullcontext() as ended:
            module.main([str(argument) for argument in arguments])
        assert code == (ended.value.code if ended else 0)
        return capsys.readouterr()

    return run


def test_the_bundle_remembers_what_was_tuned(exported: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path) -> None:
    run, bundle = exported
    assert Bundle.load(bundle).cache == CACHE
    assert Bundle.load(bundle).generation.cache_weight == 0
    write_tuned(run, "0" * 64, CACHE)  # another training, at the same step
    output = command(export, run, "-o", tmp_path / "other")
    assert "cache.json: it is not of this checkpoint" in output.err
    assert Bundle.load(tmp_path / "other").cache is None


def test_scores_of_the_command(exported: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path) -> None:
    run, bundle = exported
    model = open_checkpoint(find_checkpoint(run)).model()
    vocabulary = Bundle.load(bundle).vocabulary
    lines = ["the cat said that the cat said it", "the dog said that the cat", "the cat"]
    ids = [[*vocabulary.encode(line.split()), END_ID] for line in lines]
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(lines) + "\n")
    for flags, texts in ((["--carry-state"], [[token for line in ids for token in line]]), ([], ids)):
        nats = -np.concatenate([scores(model, tokens) for tokens in texts]).mean()
        figures = json.loads(command(score, bundle, file, "--cache", "--json", *flags).out)
        assert figures["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    share = np.exp(log_probabilities(model, ids[0][:-1])[-1])
    best = next(token for token in np.argsort(-share) if token != UNKNOWN_ID)
    word, probability = command(score, bundle, file, "--cache", "--next=1").out.splitlines()[0].split("\t")
    assert (word, float(probability)) == (vocabulary.words[best], pytest.approx(share[best], rel=1e-4))
    assert "top_1_accuracy" in command(score, bundle, file, "--cache", "--accuracy", "--json").out


def test_texts_of_the_command(exported: tuple[Path, Path], command: Callable[..., Any]) -> None:
    bundle = Bundle.load(exported[1])
    flags = (exported[1], "--prompt=the cat said", "--seed=3", "--json", "--max-new-tokens=30")
    found = json.loads(command(generate, *flags, "--cache-weight=0.5").out)
    config = replace(bundle.generation, cache_weight=0.5, max_new_tokens=30)
    prompt = bundle.vocabulary.encode("the cat said".split())
    *_, (expected_text, _) = continuations(Sampler(bundle), [prompt], config, seed=3)
    assert found["words"] == bundle.vocabulary.decode(expected_text.tokens)
    assert found["words"] != json.loads(command(generate, *flags).out)["words"]
    assert command(generate, *flags, "--cache-weight=0").out == command(generate, *flags).out


def test_mistakes_of_the_commands(exported: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path) -> None:
    bundle = exported[1]
    assert "nowhere does not exist" in command(generate, tmp_path / "nowhere", code=66).err
    assert gc.isenabled()
    message = "--cache-weight is 1.0; it must be at least 0 and below 1 (0 is off)"
    assert message in command(generate, bundle, "--cache-weight=1", code=64).err
    both = command(generate, bundle, "--cache-weight=0.1", "--num-beams=2", code=64).err
    assert "--num-beams is for beam search, and --cache-weight for sampling" in both
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit_json(copy / "manifest.json", cache=None)
    for output in (
        command(generate, copy, "--cache-weight=0.1", code=64),
        command(score, copy, "--cache", str(copy / "vocab.txt"), code=64),
    ):
        assert "this bundle has no neural cache: tune one by lmdist-evaluate RUN --cache 2000" in output.err
        assert len(output.err.splitlines()) == 1
    for values, expected_message in (({"size": 0}, "cache.size is 0"), ({"theta": "x"}, "cache.theta is 'x'")):
        edit_json(copy / "manifest.json", cache=asdict(CACHE) | values)
        with pytest.raises(DataError, match=expected_message):
            Bundle.load(copy)
