"""The figures of the commands against an independent model in plain NumPy and fp64 (support/numpy_reference.py).

The commands compute in fp32, so a log-probability of theirs is off by some 1e-6: TOLERANCE is what is allowed, and a perplexity
agrees to six digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdist.settings import ModelSettings, Tokenizer
from lmdist.training import evaluate
from lmdist_export import export, generate, score
from support.numpy_reference import Reference, distribution
from support.small_bundles import ADAPTIVE, PLAIN_WORDS, TIED, UNTIED, make_run, neutral

TOLERANCE = 5e-6
"""Of a log-probability in nats."""
SIX_DIGITS = 5e-7
"""Of a perplexity, relative."""
TEXT = "the cat said that it is old\n\nwe zebra not so\n  \nthe president said it\n"
"""Lines, one with an unknown word, one empty and one blank."""
MODELS = {"tied": TIED, "untied": UNTIED, "adaptive": ADAPTIVE}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_exported(tmp_path_factory.mktemp(name), settings, "whitespace") for name, settings in MODELS.items()}


@pytest.fixture(params=MODELS)
def run(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    return runs[request.param]


def make_exported(folder: Path, settings: ModelSettings, tokenizer: Tokenizer) -> Path:
    """Make a run, its bundle beside it, and the text."""
    words = [*PLAIN_WORDS, *(f"word{number}" for number in range(180))] if settings is ADAPTIVE else PLAIN_WORDS
    run = make_run(folder, settings, tokenizer, words)
    export.main([str(run), "-o", str(folder / "bundle"), "--data", "none"])
    neutral(folder / "bundle")
    (folder / "text").write_text(TEXT)
    return run


def reference_of(run: Path) -> Reference:
    return Reference(next((run / "checkpoints").glob("step-*")))


def bundle_of(run: Path) -> Path:
    return run.parents[1] / "bundle"


def output(capsys: pytest.CaptureFixture[str], main: Any, *arguments: object) -> list[dict[str, Any]]:
    """Return the objects that a command prints."""
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def lines_of(reference: Reference) -> list[list[int]]:
    """Return the ids of each line of the text with its end mark."""
    return [[*reference.ids(line.split()), 1] for line in TEXT.splitlines()]


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = reference_of(run)
    valid = np.fromfile(run.parents[1] / "data" / "valid.bin", "<u2").tolist()
    whole = [token for line in lines_of(reference) for token in line]
    for arguments, tokens in ((("--split", "valid"), valid), (("--file", run.parents[1] / "text"), whole)):
        [found] = output(capsys, evaluate.main, run, *arguments, "--json", "--device", "cpu")
        nats = reference.nats(tokens).mean()
        assert found["words"] == len(tokens)
        assert found["unknown_rate"] == tokens.count(0) / len(tokens)
        assert found["nats_per_token"] == pytest.approx(nats, abs=TOLERANCE)
        assert found["perplexity"] == pytest.approx(np.exp(nats), rel=SIX_DIGITS)


@pytest.mark.parametrize("carry", [False, True])
def test_score(run: Path, carry: bool, capsys: pytest.CaptureFixture[str]) -> None:
    reference = reference_of(run)
    lines = lines_of(reference)
    nats = [reference.nats(line) for line in lines]
    if carry:
        whole = reference.nats([token for line in lines for token in line])
        nats = np.split(whole, np.cumsum([len(line) for line in lines])[:-1])
    flags = ["--json", *(["--carry-state"] if carry else [])]
    words = output(capsys, score.main, bundle_of(run), run.parents[1] / "text", "--words", *flags)
    np.testing.assert_allclose([-word["log_probability"] for word in words], np.concatenate(nats), atol=TOLERANCE)
    sentences = output(capsys, score.main, bundle_of(run), run.parents[1] / "text", "--sentences", *flags)
    assert [-line["log_probability"] for line in sentences] == pytest.approx([line.sum() for line in nats], abs=4 * TOLERANCE)
    [total] = output(capsys, score.main, bundle_of(run), run.parents[1] / "text", *flags)
    assert total["perplexity"] == pytest.approx(np.exp(np.concatenate(nats).mean()), rel=SIX_DIGITS)


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "tied": [
        {"temperature": 0.6},
        {"top_p": 0.8},
        {"top_k": 12, "top_p": 0.7, "temperature": 0.9},
        {"presence_penalty": 0.7, "frequency_penalty": 0.5, "temperature": 0.8},
    ],
    "untied": [{}, {"temperature": 0.3, "top_k": 7}, {"min_p": 0.2, "temperature": 1.3}, {"repetition_penalty": 1.8}],
    "adaptive": [{"repetition_penalty": 0.6, "frequency_penalty": -0.4, "top_p": 0.9}],
}
CASES = [(model, options) for model, several in OPTIONS.items() for options in several]
N = 3_000
PROMPT = "the cat said"


@pytest.mark.parametrize(("model", "options"), CASES, ids=str)
def test_frequencies_of_sampled_tokens(
    model: str, options: dict[str, Any], runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first token after a prompt, and the second one after the most frequent first one, by lmdist-generate.

    The tests have the power to fail: tokens drawn at twice the temperature do.
    """
    reference = reference_of(runs[model])
    prompt = reference.ids(PROMPT.split())
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    length = ["--n", N, "--max-new-tokens", 2, "--ignore-eos", "--batch-size", 500, "--seed", 11, "--json"]
    found = output(capsys, generate.main, bundle_of(runs[model]), "--prompt", PROMPT, *length, *flags)
    texts = [reference.ids(line["words"]) for line in found]
    assert [len(tokens) for tokens in texts] == [2] * N
    expected = distribution(reference.logits(prompt)[-1], [], prompt, **options)
    check_frequencies([tokens[0] for tokens in texts], expected)
    first = int(np.bincount([tokens[0] for tokens in texts]).argmax())
    after = [tokens[1] for tokens in texts if tokens[0] == first]
    check_frequencies(after, distribution(reference.logits([*prompt, first])[-1], [first], prompt, **options))

    other = {**options, "temperature": 2 * options.get("temperature", 1.0)}
    neighbour = distribution(reference.logits(prompt)[-1], [], prompt, **other)
    with pytest.raises(AssertionError):
        check_frequencies(np.random.default_rng(0).choice(len(expected), N, p=neighbour).tolist(), expected)


def check_frequencies(tokens: list[int], expected: np.ndarray) -> None:
    """Assert by a chi-squared test that tokens are drawn from a distribution; what cannot be drawn never is."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any()
    wanted = len(tokens) * expected
    rare = wanted < 5  # together they are one class
    counts, wanted = np.append(counts[~rare], counts[rare].sum()), np.append(wanted[~rare], wanted[rare].sum())
    possible = wanted > 0
    statistic, degrees = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum(), max(1, possible.sum() - 1)
    # What one in 100,000 is above, by Wilson and Hilferty's approximation: 4.26 standard deviations of a normal.
    bound = degrees * (1 - 2 / (9 * degrees) + 4.26 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert statistic < bound, (statistic, bound, degrees)


@pytest.mark.parametrize("tokenizer", ["whitespace", "wordpunct"])
def test_lines_without_a_word(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are documents, of nothing but an end mark, to the tokenizer that reads line by line, and to no other."""
    run = make_exported(tmp_path, UNTIED, tokenizer)
    reference = reference_of(run)
    lines = [line for line in lines_of(reference) if len(line) > 1 or tokenizer == "whitespace"]
    tokens = [token for line in lines for token in line]
    nats = reference.nats(tokens)
    text = tmp_path / "text"
    [by_torch] = output(capsys, evaluate.main, run, "--file", text, "--lines", "--json", "--device", "cpu")
    for batch_size in (2, 256):
        [carried] = output(capsys, score.main, tmp_path / "bundle", text, "--carry-state", "--json", "--batch-size", batch_size)
        assert by_torch["words"] == carried["words"] == len(tokens)
        for figure in (by_torch["perplexity"], carried["perplexity"]):
            assert figure == pytest.approx(np.exp(nats.mean()), rel=SIX_DIGITS)
    sentences = output(capsys, score.main, tmp_path / "bundle", text, "--carry-state", "--json", "--sentences")
    assert [line["text"] for line in sentences] == TEXT.splitlines()
    assert sum(line["words"] for line in sentences) == len(tokens)
    [accuracy] = output(capsys, score.main, tmp_path / "bundle", text, "--carry-state", "--json", "--accuracy")
    assert accuracy["words"] == len(tokens)
