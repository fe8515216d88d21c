"""Generation: batches, stops, banned tokens, beam search; texts do not depend on how tokens are divided into calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmdist.errors import UsageError
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID
from lmdist_export.bundle import Bundle
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling import generation
from lmdist_export.sampling.beam_search import beam_search, highest_score
from lmdist_export.sampling.generation import Generation, Text, append, banned_tokens, continuations, forks, log_probabilities
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.stops import Stops
from support.small_bundles import PLAIN_WORDS, UNTIED, make_bundle, make_model, neutral

ROOT = Path(__file__).parents[2]
SIZE = len(PLAIN_WORDS) + 2
PROMPTS = ([], [3, 4], [5, 6, 7, 8, 9, 2], [4], [3, 4])


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return Sampler(Bundle.load(neutral(make_bundle(tmp_path_factory.mktemp("bundle"), UNTIED, "whitespace", PLAIN_WORDS))))


def generated(
    sampler: Sampler, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any
) -> dict[tuple[int, int], Text]:
    """Return all texts, by the number of their prompt and their own."""
    options = {"seed": 3} | options
    texts: dict[tuple[int, int], Text] = {}
    streamed: dict[tuple[int, int], list[int]] = {}
    for text, tokens in continuations(sampler, prompts, config, **options):
        key = text.prompt_number, text.number
        texts[key] = text
        streamed[key] = streamed.get(key, []) + tokens
    assert all(text.finish_reason for text in texts.values())
    assert {key: text.tokens for key, text in texts.items()} == streamed  # a streamed token is final
    return texts


def tokens_of(texts: dict[tuple[int, int], Text]) -> dict[tuple[int, int], list[int]]:
    return {key: text.tokens for key, text in texts.items()}


CONFIGS = {
    "plain": GenerationConfig(max_new_tokens=40),
    "top_k": GenerationConfig(max_new_tokens=40, top_k=5, temperature=0.7),
    "top_p": GenerationConfig(max_new_tokens=40, top_p=0.6, min_p=0.05),
    "typical_p": GenerationConfig(max_new_tokens=40, typical_p=0.7),
    "penalties": GenerationConfig(
        max_new_tokens=40, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, temperature=1.3
    ),
    "lengths": GenerationConfig(max_new_tokens=30, min_new_tokens=11),
    "sequences": GenerationConfig(max_new_tokens=30, no_repeat_ngram_size=2, bad_words_ids=([5, 6], [7]), min_new_tokens=4),
    "bias": GenerationConfig(max_new_tokens=30, sequence_bias=(([4], 2.0), ([9], -1.5)), bad_words_ids=([3],)),
    "greedy": GenerationConfig(max_new_tokens=30, temperature=0, frequency_penalty=0.5),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_texts_are_the_same_alone_and_in_batches_at_once_and_token_by_token(
    sampler: Sampler, config: GenerationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({}, {"ignore_end": True}, {"stops": Stops([[4], [5, 8]])}):
        expected = tokens_of(generated(sampler, PROMPTS, config, n=2, **options))
        for batch_size in (1, 3):
            assert tokens_of(generated(sampler, PROMPTS, config, n=2, batch_size=batch_size, **options)) == expected
        for number, prompt in enumerate(PROMPTS):
            alone = tokens_of(generated(sampler, [prompt], config, **options))
            assert alone[0, 0] == expected[number, 0]
        with monkeypatch.context() as patch:
            patch.setattr(generation, "TOKENS_PER_CALL", 1)
            assert tokens_of(generated(sampler, PROMPTS, config, n=2, **options)) == expected
        assert tokens_of(generated(sampler, PROMPTS, config, n=2, stream=True, **options)) == expected
    assert tokens_of(generated(sampler, PROMPTS, config, n=2, seed=4)) != expected or config.greedy


def test_a_process_that_flushes_denormal_numbers_samples_the_same_tokens(sampler: Sampler) -> None:
    config = CONFIGS["typical_p"]
    expected = tokens_of(generated(sampler, PROMPTS, config, ignore_end=True))
    torch.set_flush_denormal(False)
    kept = tokens_of(generated(sampler, PROMPTS, config, ignore_end=True))
    torch.set_flush_denormal(True)  # as each training does
    try:
        assert tokens_of(generated(sampler, PROMPTS, config, ignore_end=True)) == kept == expected
    finally:
        torch.set_flush_denormal(False)


def test_texts_of_one_prompt_differ_and_equal_prompts_do_not(sampler: Sampler) -> None:
    texts = tokens_of(generated(sampler, PROMPTS, CONFIGS["plain"], n=3, ignore_end=True))
    assert len({tuple(texts[1, number]) for number in range(3)}) == 3
    assert [texts[1, number] for number in range(3)] == [texts[4, number] for number in range(3)]
    assert texts[0, 0] != texts[3, 0]


def test_a_long_prompt_is_read_in_pieces(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.random.default_rng(0).integers(2, SIZE, 50).tolist()
    expected = tokens_of(generated(sampler, [prompt, prompt[:9]], CONFIGS["plain"]))
    for pieces in (2, 7, 50):
        monkeypatch.setattr("lmdist_export.sampling.sampler.PREFILL_TOKENS", pieces)
        monkeypatch.setattr(generation, "PREFILL_TOKENS", pieces)
        assert tokens_of(generated(sampler, [prompt, prompt[:9]], CONFIGS["plain"])) == expected


def test_lengths(sampler: Sampler) -> None:
    free = generated(sampler, PROMPTS, GenerationConfig(max_new_tokens=9), n=6)
    assert {text.finish_reason for text in free.values()} == {"stop", "length"}
    for text in free.values():
        assert (len(text.tokens) == 9) == (text.finish_reason == "length")
        assert END_ID not in text.tokens
        assert UNKNOWN_ID not in text.tokens
    assert min(len(text.tokens) for text in free.values()) < 8
    least = generated(sampler, PROMPTS, GenerationConfig(max_new_tokens=60, min_new_tokens=8), n=4)
    assert min(len(text.tokens) for text in least.values()) >= 8
    on = generated(sampler, PROMPTS, GenerationConfig(max_new_tokens=60), n=4, ignore_end=True)
    assert {(len(text.tokens), text.finish_reason) for text in on.values()} == {(60, "length")}


def test_a_text_ends_before_the_first_of_its_stops(sampler: Sampler) -> None:
    config = GenerationConfig(max_new_tokens=200)
    whole = generated(sampler, PROMPTS, config, ignore_end=True)
    stops = [[4, 5], [6, 7, 8], [9]]
    stopped = generated(sampler, PROMPTS, config, ignore_end=True, stops=Stops(stops))
    for key, text in stopped.items():
        words = whole[key].tokens
        places = [place for place in range(len(words)) if any(words[place : place + len(stop)] == stop for stop in stops)]
        # The stop that is complete first ends the text.
        ends = sorted(
            (place + len(stop), place) for place in places for stop in stops if words[place : place + len(stop)] == stop
        )
        assert text.tokens == words[: ends[0][1]]
        assert text.finish_reason == "stop"


@given(
    tokens=st.lists(st.integers(2, 5), max_size=30),
    stops=st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_streamed_tokens_do_not_depend_on_the_calls(tokens: list[int], stops: list[list[int]], cuts: list[int]) -> None:
    config = GenerationConfig(max_new_tokens=25)

    def streamed(pieces: list[list[int]]) -> tuple[list[int], str]:
        text, result = Text([], 0, 0), []
        for piece in pieces:
            if not text.finish_reason:
                result += append(text, piece, Generation(config, Stops(stops)))
        if text.finish_reason:
            assert result == text.tokens
        return result, text.finish_reason

    starts = np.cumsum([0, *cuts]).tolist()
    pieces = [tokens[start : start + cut] for start, cut in zip(starts, cuts, strict=False) if tokens[start:]]
    assert streamed(pieces) == streamed([tokens]) == streamed([[token] for token in tokens])


@given(tokens=st.lists(st.integers(2, 5), max_size=20), size=st.integers(1, 4))
def test_a_banned_token_would_repeat_a_sequence(tokens: list[int], size: int) -> None:
    found = set(banned_tokens(Text(tokens[:3], 0, 0, tokens[3:]), GenerationConfig(no_repeat_ngram_size=size), (END_ID,)))
    seen = {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}
    expected = {
        token for token in range(2, 6) if len(tokens) >= size - 1 and (*tokens[len(tokens) - size + 1 :], token)[-size:] in seen
    }
    assert found == expected


def test_banned_sequences(sampler: Sampler) -> None:
    free = tokens_of(generated(sampler, PROMPTS, GenerationConfig(max_new_tokens=150), n=3, ignore_end=True))
    config = GenerationConfig(max_new_tokens=150, no_repeat_ngram_size=3, bad_words_ids=([4, 5], [6]))
    kept = tokens_of(generated(sampler, PROMPTS, config, n=3, ignore_end=True))

    def count(texts: dict[tuple[int, int], list[int]], sequence: tuple[int, ...]) -> int:
        size = len(sequence)
        return sum(tuple(text[at : at + size]) == sequence for text in texts.values() for at in range(len(text)))

    assert count(free, (4, 5)) > 0
    assert count(free, (6,)) > 0
    assert count(kept, (4, 5)) == count(kept, (6,)) == 0
    for (prompt, _), text in kept.items():
        words = [*PROMPTS[prompt], *text]
        triples = [tuple(words[at : at + 3]) for at in range(len(words) - 2)]
        assert len(set(triples)) == len(triples)


def test_a_prompt_with_unknown_words_at_its_end_has_random_numbers_of_its_own(sampler: Sampler) -> None:
    """The id of <unk> is 0, and NumPy takes numbers that are padded with zeros for the same seed."""
    prompts, drawn = ([5], [5, UNKNOWN_ID], [5, UNKNOWN_ID, UNKNOWN_ID]), set()
    for prompt in prompts:
        ((_, state),) = forks(sampler, sampler.start([[END_ID, *prompt]]), prompt, 0, GenerationConfig(), 1, [0])
        drawn.add(float(state.generators[0].random((1,), np.float32)[0]))
    assert len(drawn) == len(prompts)


def test_a_rule_of_the_caller(sampler: Sampler) -> None:
    def no_word_twice_in_a_row(words: Sequence[int]) -> np.ndarray:
        added = np.zeros(SIZE)
        added[words[-1:]] = -np.inf
        return added

    config = GenerationConfig(max_new_tokens=100)
    free = tokens_of(generated(sampler, PROMPTS, config, ignore_end=True))
    ruled = tokens_of(generated(sampler, PROMPTS, config, ignore_end=True, custom_bias=no_word_twice_in_a_row))
    assert any(one == other for text in free.values() for one, other in pairwise(text))
    assert not any(one == other for text in ruled.values() for one, other in pairwise(text))


def test_no_token_is_left(sampler: Sampler) -> None:
    """A text ends if all tokens are banned, and the others continue."""
    config = GenerationConfig(no_repeat_ngram_size=1, max_new_tokens=15)
    every = list(range(1, SIZE))  # but <unk>, which never comes
    prompts = [[], every[:10], every]
    expected = generated(sampler, prompts, config, ignore_end=True)
    assert {key: (len(text.tokens), text.finish_reason) for key, text in expected.items()} == {
        (0, 0): (15, "length"),
        (1, 0): (len(every) - 10, "exhausted"),
        (2, 0): (0, "exhausted"),
    }
    for options in ({"batch_size": 1}, {"stream": True}, {"n": 2}):
        texts = generated(sampler, prompts, config, ignore_end=True, **options)
        assert tokens_of(texts) | tokens_of(expected) == tokens_of(texts)
    # The first word of a stop waits for its second, which may not come.
    stops = [[word, word] for word in every]
    assert generated(sampler, prompts, config, ignore_end=True, stops=Stops(stops)) == expected
    with pytest.raises(UsageError, match="mask all of them"):
        generated(sampler, [[]], GenerationConfig(bad_words_ids=tuple([word] for word in range(SIZE))))


def test_log_probabilities_are_those_of_torch(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text([3, 4], 0, 0, np.random.default_rng(1).integers(1, SIZE, 30).tolist())
    model = make_model(UNTIED, SIZE)
    with torch.inference_mode():
        hidden, _ = model(torch.tensor([[END_ID, *text.prompt, *text.tokens]]), model.initial_state(1))
        expected = model.logits(hidden).log_softmax(-1)[0, 2:-1]  # (T, V)
    for pieces in (64, 7):
        monkeypatch.setattr("lmdist_export.sampling.log_probabilities.STEP_TOKENS", pieces)
        of_words, tops = log_probabilities(sampler, text, 4)
        np.testing.assert_allclose(of_words, expected[range(30), text.tokens], atol=1e-5)
        best, ids = expected.topk(4)
        assert [[index for index, _ in top] for top in tops] == ids.tolist()
        np.testing.assert_allclose([[value for _, value in top] for top in tops], best, atol=1e-5)
    assert log_probabilities(sampler, Text([3], 0, 0), 2) == ([], [])


# --- search --------------------------------------------------------------------------------------------------------


def every_text(sampler: Sampler, prompt: list[int], config: GenerationConfig) -> list[tuple[float, tuple[int, ...]]]:
    """Return all possible texts and their scores, the best first, by exhaustive search."""
    bias = generation.fixed_bias(config, SIZE)
    found = []

    def follow(words: tuple[int, ...], score: float) -> None:
        if len(words) == config.max_new_tokens:
            found.append((score / len(words) ** config.length_penalty, words))
            return
        logits, _ = sampler.next_logits([END_ID, *prompt, *words])
        scores = torch.from_numpy(logits[0]).double().log_softmax(0).numpy() + bias
        for word in np.flatnonzero(np.isfinite(scores)).tolist():
            if word == END_ID:
                found.append(((score + scores[word]) / (len(words) + 1) ** config.length_penalty, words))
            else:
                follow((*words, word), score + scores[word])

    follow((), 0.0)
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_search_wide_enough_finds_the_best_texts(sampler: Sampler, length_penalty: float) -> None:
    # Two words, since all texts are looked at: 1 + 17 + 17 * 17.
    config = GenerationConfig(max_new_tokens=2, num_beams=17, length_penalty=length_penalty)
    expected = every_text(sampler, [3, 5], config)[:6]
    found = beam_search(sampler, [3, 5], config, n=6)
    assert [tuple(text.tokens) for text in found] == [words for _, words in expected]
    assert [text.number for text in found] == list(range(6))


@pytest.mark.parametrize(
    ("best", "bias", "penalty", "expected"),
    [(-6.0, 0.0, 1.0, -0.3), (-6.0, 0.0, -1.0, -12.0), (1.0, 0.5, 1.0, 5.0), (1.0, 0.5, -1.0, 200.0), (-6.0, -3.0, 0.0, -6.0)],
)
def test_a_positive_bias_may_still_raise_a_score(best: float, bias: float, penalty: float, expected: float) -> None:
    config = GenerationConfig(max_new_tokens=20, num_beams=2, length_penalty=penalty)
    assert highest_score(best, 2, config, np.array([bias, -np.inf], np.float32)) == pytest.approx(expected)


def test_a_search_of_one_beam_without_an_end_is_greedy(sampler: Sampler) -> None:
    config = GenerationConfig(max_new_tokens=25, do_sample=False)
    greedy = generated(sampler, [[3, 5]], config, ignore_end=True)[0, 0]
    (found,) = beam_search(sampler, [3, 5], config, ignore_end=True)
    assert (found.tokens, found.finish_reason) == (greedy.tokens, "length")


def test_a_wider_search_is_no_worse_and_keeps_the_rules(sampler: Sampler) -> None:
    def score(words: list[int]) -> float:
        tokens = np.array([[END_ID, 3, 5, *words]])
        return float(sampler.score(tokens[:, :-1], tokens[:, 1:])[0][0, 2:].sum())

    def best(beams: int, **options: Any) -> list[int]:
        config = GenerationConfig(max_new_tokens=12, num_beams=beams, min_new_tokens=12, **options)
        return beam_search(sampler, [3, 5], config)[0].tokens

    assert score(best(8)) >= score(best(1)) - 1e-5
    free, kept = best(4), best(4, no_repeat_ngram_size=1, bad_words_ids=([7],))
    assert len(set(free)) < len(free)
    assert len(set(kept)) == len(kept) == 12
    assert 7 not in kept


def test_a_search_where_no_token_is_left(sampler: Sampler) -> None:
    config = GenerationConfig(no_repeat_ngram_size=1, max_new_tokens=20, num_beams=3)
    every = list(range(1, SIZE))
    texts = beam_search(sampler, every[:-2], config, n=3, ignore_end=True)
    assert sorted(text.tokens for text in texts) == [every[-2:], every[:-3:-1]]
    (text,) = beam_search(sampler, every, config, n=3, ignore_end=True)
    assert [text.tokens, *(text.finish_reason for text in texts), text.finish_reason] == [[], *["exhausted"] * 3]
    # Texts that end are found before those that cannot go on, however many of these there are.
    found = beam_search(sampler, every[1:-2], config, n=3)
    assert [text.finish_reason for text in found] == ["stop"] * 3


def test_a_search_stops_before_a_stop(sampler: Sampler) -> None:
    config = GenerationConfig(max_new_tokens=20, num_beams=3)
    free = beam_search(sampler, [3], config, ignore_end=True)[0].tokens
    stop = free[4:6]
    texts = beam_search(sampler, [3], config, n=3, stops=Stops([stop]), ignore_end=True)
    for text in texts:
        assert not any(text.tokens[at : at + 2] == stop for at in range(len(text.tokens)))


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sampler.bundle.folder.parent)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, "docs/sampling.md", "exec"), {})
    *_, last = capsys.readouterr().out.split("\n\n")
    assert set(last.split()) <= {*PLAIN_WORDS, "<eos>"}
