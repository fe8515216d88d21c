"""Requests that share batches get the texts that each gets alone, and a failing one does not affect the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from lmdist.errors import UsageError
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.generation import Text, continuations
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.state import State
from lmdist_export.serving import batching
from lmdist_export.serving.batching import Batcher, Request, RequestTimeout
from support.small_bundles import bare_bundle

CONFIG = GenerationConfig(max_new_tokens=40)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return Sampler(bare_bundle(tmp_path_factory.mktemp("batching") / "bare"), threads=1)


def words_of(texts: Sequence[Text]) -> list[tuple[int, int, list[int], str]]:
    return [(text.prompt_number, text.number, text.tokens, text.finish_reason) for text in texts]


def alone(sampler: Sampler, request: Request) -> list[tuple[int, int, list[int], str]]:
    """The texts of a request without others in its batches."""
    given = request.generation
    settings = given.config, request.seed, request.n, given.stops, given.ignore_end
    texts = continuations(sampler, request.prompts, *settings, batch_size=1)
    return words_of([text for text, _ in texts if text.finish_reason])


def test_requests_of_many_settings_get_what_each_gets_alone(sampler: Sampler) -> None:
    configs = [CONFIG, replace(CONFIG, top_p=0.9), replace(CONFIG, temperature=0.5), replace(CONFIG, min_new_tokens=30)]
    requests = [
        Request(sampler, [[2 + number], []], configs[number % 4], number, 1 + number % 3, [[5, 6]], number % 5 == 0)
        for number in range(24)
    ]
    batcher = Batcher(sampler, batch_size=4)
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda request: batcher.generate(request, 60), requests))
    assert [words_of(texts) for texts in answers] == [alone(sampler, request) for request in requests]
    assert not batcher.batches


def test_a_request_that_fails_does_not_fail_others(sampler: Sampler) -> None:
    """A token outside the vocabulary fails the batch; the other requests are then generated alone."""
    config = replace(CONFIG, max_new_tokens=200)
    prompts = [[], [300], [7]]
    batcher = Batcher(sampler)

    def answer(prompt: list[int]) -> list[Text] | str:
        try:
            return batcher.generate(Request(sampler, [prompt], config, 1, ignore_end=True), 60)
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(3) as clients:
        first, second, third = clients.map(answer, prompts)
    assert isinstance(second, str)
    assert "the id of a token is 300" in second
    for texts in (first, third):
        assert isinstance(texts, list)
        assert len(texts[0].tokens) == 200


def test_a_request_that_times_out_leaves_the_batch(sampler: Sampler) -> None:
    batcher = Batcher(sampler, batch_size=1)
    config = replace(CONFIG, max_new_tokens=1_000_000)
    with pytest.raises(RequestTimeout):
        batcher.generate(Request(sampler, [[]], config, 1, ignore_end=True), 0.2)
    request = Request(sampler, [[3]], replace(config, max_new_tokens=5), 1, ignore_end=True)
    assert words_of(batcher.generate(request, 60)) == alone(sampler, request)
    with pytest.raises(RequestTimeout):  # of the same settings, so that it follows a cancelled one
        batcher.generate(Request(sampler, [[]], config, 1, ignore_end=True), 0.2)


def test_cancelled_texts_leave_the_batch_and_the_others_stay(sampler: Sampler) -> None:
    """Cancelled while its first text begins, when the batch is being filled."""
    config = replace(CONFIG, max_new_tokens=3_000)
    left = Request(sampler, [[3]], config, 1, n=3, ignore_end=True)
    unchanged = left.new_texts

    def leaving() -> Iterator[tuple[Text, State]]:
        for text, state in unchanged:
            left.cancel()
            yield text, state

    left.new_texts = leaving()
    stays = Request(sampler, [[4]], config, 2, ignore_end=True)
    batcher = Batcher(sampler, batch_size=2)
    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(batcher.generate, request, 60) for request in (left, stays)]
    with pytest.raises(RequestTimeout):
        asked[0].result()
    assert words_of(asked[1].result()) == alone(sampler, stays)
    assert [text.finish_reason for text in left.texts] == ["cancelled"]
    assert len(left.texts[0].tokens) < 3_000


def test_a_cancelled_search_ends_with_its_prompt(sampler: Sampler) -> None:
    request = Request(sampler, [[3], [4]], replace(CONFIG, max_new_tokens=5, num_beams=3), 0)
    request.cancel()
    with pytest.raises(RequestTimeout):
        Batcher(sampler).generate(request, 60)
    assert not request.texts


def test_a_search_waits_for_another_no_longer_than_its_time(sampler: Sampler) -> None:
    batcher = Batcher(sampler)
    request = Request(sampler, [[3], [4]], replace(CONFIG, max_new_tokens=5, num_beams=3), 0, 2)
    assert [(text.prompt_number, text.number) for text in batcher.generate(request, 60)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with batcher.searching, pytest.raises(RequestTimeout):
        batcher.generate(request, 0.05)


def test_graphs_are_kept_for_a_few_kinds_of_options(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_GRAPHS", 2)
    batcher = Batcher(sampler)
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.9}, {}):
        request = Request(sampler, [[3]], replace(CONFIG, **options), 1)
        assert words_of(batcher.generate(request, 60)) == alone(sampler, request)
