"""Requests that share the batching thread get what each gets alone, and none of them holds up the others for long."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmdist.errors import DataError, UsageError
from lmdist.storage.held import HeldFolder
from lmdist.text.vocabulary import Vocabulary
from lmdist_export.bundle import Bundle
from lmdist_export.conversion.weights import write_graphs
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling import sampler as sampler_module
from lmdist_export.sampling.beam_search import beam_search
from lmdist_export.sampling.generation import Text, continuations, log_probabilities
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.stops import Stops
from lmdist_export.serving import batching, shared_batch
from lmdist_export.serving.batching import Batcher, QueueFull, Request, RequestTimeout, Scoring
from lmdist_export.serving.requests import Work
from support.small_bundles import UNTIED, bare_bundle, make_model

CONFIG = GenerationConfig(max_new_tokens=40)
LONG = replace(CONFIG, max_new_tokens=100_000)
SIZE = 300
PROMPT = np.random.default_rng(0).integers(2, SIZE, 3_000).tolist()


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return Sampler(bare_bundle(tmp_path_factory.mktemp("batching") / "bare", vocabulary_size=SIZE), threads=1)


@pytest.fixture
def make_batcher(sampler: Sampler) -> Iterator[Callable[..., Batcher]]:
    """Make batchers, and close them at the end, after whatever they have to do has been cancelled."""
    made: list[Batcher] = []

    def make(**settings: Any) -> Batcher:
        made.append(Batcher(sampler, **settings))
        return made[-1]

    yield make
    for batcher in made:
        for work in [*batcher.works]:
            work.cancel()
        batcher.close()
        assert not batcher.thread.is_alive()
        assert not batcher.batches


def words_of(texts: Sequence[Text]) -> list[tuple[int, int, list[int], str]]:
    return [(text.prompt_number, text.number, text.tokens, text.finish_reason) for text in texts]


def alone(sampler: Sampler, request: Request) -> list[tuple[int, int, list[int], str]]:
    """The texts of a request without others in its batches."""
    given = request.generation
    if given.config.num_beams > 1:
        found = [
            replace(text, prompt_number=number)
            for number, prompt in enumerate(request.prompts)
            for text in beam_search(sampler, prompt, given.config, request.n, given.stops, given.ignore_end)
        ]
        return words_of(found)
    settings = given.config, request.seed, request.n, given.stops, given.ignore_end
    texts = continuations(sampler, request.prompts, *settings, batch_size=1)
    return words_of([text for text, _ in texts if text.finish_reason])


def wait(work: Work) -> Work:
    assert work.finished.wait(300)
    return work


# --- the same texts ------------------------------------------------------------------------------------------------


def test_requests_of_many_settings_get_what_each_gets_alone(
    sampler: Sampler, make_batcher: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With long prompts, texts that lose their places to others, beam searches and scores among them."""
    monkeypatch.setattr(shared_batch, "TURN_SECONDS", 0.001)
    configs = [CONFIG, replace(CONFIG, top_p=0.9), replace(CONFIG, presence_penalty=0.5), replace(CONFIG, min_new_tokens=30)]
    configs += [replace(CONFIG, max_new_tokens=7, num_beams=3)]
    asked = [
        Request(
            sampler,
            [[2 + number], PROMPT[: 40 * number], []],
            configs[number % 5],
            number,
            1 + number % 3,
            Stops([[5, 6]]),
            number % 5 == 0,
            number % 4 or None,
        )
        for number in range(15)
    ]
    scorings = [Scoring(sampler, [PROMPT[number : 5 * number], []], 2) for number in range(1, 60, 10)]
    batcher = make_batcher(batch_size=4)
    for scoring in scorings:
        batcher.submit(scoring)
    with ThreadPoolExecutor(15) as clients:
        answers = list(clients.map(lambda request: batcher.generate(request, 300), asked))
    assert [words_of(texts) for texts in answers] == [alone(sampler, request) for request in asked]
    for request, texts in zip(asked, answers, strict=True):
        for text in texts:
            expected = None if request.logprobs is None else log_probabilities(sampler, text, request.logprobs)
            assert text.scores == expected
    for scoring in scorings:
        assert wait(scoring).error is None
        assert scoring.scores == [log_probabilities(sampler, Text([], 0, 0, list(ids)), 2) for ids in scoring.given]
    assert not batcher.batches


def test_what_is_reported_of_a_text_as_it_grows_is_the_text(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    reported: dict[tuple[int, int], list[int]] = {}
    ends: list[tuple[int, int]] = []
    done = threading.Event()

    def on_growth(text: Text, tokens: list[int]) -> None:
        assert tokens or text.finish_reason
        key = text.prompt_number, text.number
        reported.setdefault(key, []).extend(tokens)
        ends.extend([key] if text.finish_reason else [])

    for config in (CONFIG, replace(CONFIG, num_beams=3)):
        reported.clear()
        ends.clear()
        done.clear()
        request = Request(sampler, [[3], [4]], config, 1, 3, Stops([[5, 6]]), on_growth=on_growth, on_end=done.set)
        make_batcher().submit(request)
        assert done.wait(300)
        assert reported == {(text.prompt_number, text.number): text.tokens for text in request.texts}
        assert sorted(ends) == sorted(reported)
        assert len(ends) == 6


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_request_that_cannot_be_done_is_refused_before_it_is_queued(sampler: Sampler) -> None:
    with pytest.raises(UsageError, match="the id of a token is 300; one from 0 to 299 is expected"):
        Request(sampler, [[5], [7, 300]], CONFIG, 1)
    with pytest.raises(UsageError, match="the id of a token is -1"):
        Scoring(sampler, [[-1]], 0)
    stops = Stops([[2 + number % 7] * 600 for number in range(400)])
    with pytest.raises(UsageError, match="stop and bad_words have 240,000 tokens together; a server accepts at most 4,096"):
        Request(sampler, [[]], CONFIG, 1, stops=stops)
    with pytest.raises(UsageError, match="no token is left to sample"):
        Request(sampler, [[]], replace(CONFIG, suppress_tokens=tuple(range(SIZE))), 1)


def test_a_request_that_fails_does_not_fail_others(tmp_path: Path) -> None:
    """A token whose embedding is not a number fails the batch; the other requests are then generated alone, and go on.

    What was reported of them is not reported again.
    """
    model = make_model(UNTIED, SIZE)
    with torch.no_grad():
        model.embedding.weight[SIZE - 1] = torch.nan
    (tmp_path / "bad").mkdir()
    sizes = write_graphs(model, tmp_path / "bad", "small", "fp32")
    words = Vocabulary(["<unk>", "<eos>", *(f"word{number}" for number in range(2, SIZE))])
    sampler = Sampler(Bundle(HeldFolder(tmp_path / "bad"), {}, sizes, words, GenerationConfig()), threads=1)
    config = replace(CONFIG, max_new_tokens=1_000, suppress_tokens=(0, SIZE - 1))
    reported: dict[int, list[int]] = {3: [], 7: []}
    growing = threading.Event()

    def report(key: int) -> Callable[[Text, list[int]], None]:
        def on_growth(_: Text, tokens: list[int]) -> None:
            reported[key] += tokens
            growing.set()

        return on_growth

    good = [Request(sampler, [[key]], config, 1, ignore_end=True, on_growth=report(key)) for key in reported]
    batcher = Batcher(sampler)
    for request in good:
        batcher.submit(request)
    assert growing.wait(300)
    with pytest.raises(DataError, match="not finite"):
        batcher.generate(Request(sampler, [[SIZE - 1]], config, 1, ignore_end=True), 300)
    for request, tokens in zip(good, reported.values(), strict=True):
        assert wait(request).error is None
        assert words_of(request.texts) == alone(sampler, request)
        assert tokens == request.texts[0].tokens
    batcher.close()


def test_a_callback_that_fails_ends_its_own_request_alone(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    """As where the event loop of a client has been closed."""

    def fail(*_: Any) -> None:
        raise RuntimeError("Event loop is closed")

    batcher = make_batcher()
    stays = Request(sampler, [[3]], replace(CONFIG, max_new_tokens=200), 1, ignore_end=True)
    batcher.submit(stays)
    for on_end in (None, fail):
        failing = Request(sampler, [[4]], LONG, 1, ignore_end=True, on_growth=fail, on_end=on_end)
        batcher.submit(failing)
        assert isinstance(wait(failing).error, RuntimeError)
    assert words_of(wait(stays) and stays.texts) == alone(sampler, stays)


def test_a_defect_ends_what_is_being_done_and_not_the_server(
    sampler: Sampler, make_batcher: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a row")

    batcher = make_batcher(max_queued_tokens=10**9)
    asked = [Request(sampler, [[seed]], LONG, seed, ignore_end=True) for seed in (3, 4)]
    for request in asked:
        batcher.submit(request)
    while not asked[0].num_written:
        time.sleep(0.001)
    with monkeypatch.context() as patch:
        patch.setattr(shared_batch.SharedBatch, "remove", fail)
        asked[0].cancel()
        assert isinstance(wait(asked[1]).error, KeyError)
    assert "the batching thread has failed" in caplog.text
    request = Request(sampler, [[5]], CONFIG, 1)
    assert words_of(batcher.generate(request, 300)) == alone(sampler, request)


@pytest.mark.parametrize("length_penalty", [1e308, 1e16])
def test_a_length_penalty_beyond_all_bounds_is_one_clear_error(length_penalty: float) -> None:
    with pytest.raises(UsageError, match=r"length_penalty is 1e\+\d+; .*-20 to 20"):
        replace(CONFIG, num_beams=2, length_penalty=length_penalty)


# --- cancelled -----------------------------------------------------------------------------------------------------


def test_a_request_that_times_out_leaves_the_batch(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    batcher = make_batcher(batch_size=1, max_queued_tokens=10**9)
    with pytest.raises(RequestTimeout):
        batcher.generate(Request(sampler, [[]], LONG, 1, ignore_end=True), 0.2)
    request = Request(sampler, [[3]], replace(LONG, max_new_tokens=5), 1, ignore_end=True)
    assert words_of(batcher.generate(request, 300)) == alone(sampler, request)
    with pytest.raises(RequestTimeout):  # of the same settings, so that it follows a cancelled one
        batcher.generate(Request(sampler, [[]], LONG, 1, ignore_end=True), 0.2)


def work_of_each_kind(sampler: Sampler, **settings: Any) -> dict[str, Work]:
    """Work that takes minutes, each of which does not end before it is cancelled."""
    greedy = replace(LONG, temperature=0, presence_penalty=0.1)
    beams = replace(LONG, num_beams=8)
    return {
        "texts": Request(sampler, [[3]], replace(LONG, max_new_tokens=5_000), 1, n=1_000, ignore_end=True, **settings),
        "prompts": Request(sampler, [PROMPT] * 300, replace(greedy, max_new_tokens=1), 1, n=2, **settings),
        "search": Request(sampler, [[3], [4]], beams, 1, ignore_end=True, **settings),
        "scores": Scoring(sampler, [PROMPT] * 300, 5, **settings),
    }


@pytest.mark.parametrize("kind", ["texts", "prompts", "search", "scores"])
def test_cancelled_work_ends_after_its_step_and_the_others_stay(
    sampler: Sampler, make_batcher: Callable[..., Batcher], kind: str
) -> None:
    batcher = make_batcher(batch_size=2, max_queued_tokens=10**9)
    ended: list[str] = []
    left = work_of_each_kind(sampler, on_end=lambda: ended.append(kind))[kind]
    stays = Request(sampler, [[4]], replace(LONG, max_new_tokens=1_500), 2, ignore_end=True)
    batcher.submit(left)
    batcher.submit(stays)
    while not (left.num_written if kind == "texts" else left.seconds):
        time.sleep(0.001)
    left.cancel()
    assert words_of(wait(stays) and stays.texts) == alone(sampler, stays)
    assert ended == [kind]
    assert not batcher.figures().tokens_queued
    if isinstance(left, Request) and kind == "texts":
        assert "cancelled" in {text.finish_reason for text in left.texts if text.tokens}


def test_work_that_is_cancelled_before_its_first_step_has_none(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    batcher = make_batcher(max_queued_tokens=10**9)
    for work in work_of_each_kind(sampler).values():
        done = threading.Event()
        work.on_end = done.set
        work.cancel()
        batcher.submit(work)
        assert done.wait(300)
    assert batcher.figures() == batching.Figures(0, 0, 0, 0, {}, 0, 0)


# --- fair turns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "prompts", "search", "scores"])
def test_short_work_is_done_while_long_work_goes_on(sampler: Sampler, make_batcher: Callable[..., Batcher], kind: str) -> None:
    """Also where the long one has all rows of the batch that the short one needs."""
    batcher = make_batcher(batch_size=2, max_queued_tokens=10**9)
    long = work_of_each_kind(sampler)[kind]
    batcher.submit(long)
    while not long.seconds:
        time.sleep(0.001)
    for config in (CONFIG, replace(CONFIG, max_new_tokens=10), replace(CONFIG, num_beams=2)):
        short = Request(sampler, [[5]], config, 1, ignore_end=True)
        assert words_of(batcher.generate(short, 300)) == alone(sampler, short)
    scoring = Scoring(sampler, [[3, 4, 5]], 1)
    batcher.submit(scoring)
    wait(scoring)
    assert not long.finished.is_set()
    assert batcher.figures().requests_running + batcher.figures().requests_waiting == 1


def test_of_long_work_of_one_kind_all_have_their_share(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    """Twenty clients with long texts to score, and then one with a short text: its turn comes after a step of each at most."""
    batcher = make_batcher(max_queued_tokens=10**9)
    long = [Scoring(sampler, [PROMPT] * 100, 1) for _ in range(20)]
    for work in long:
        batcher.submit(work)
    short = Scoring(sampler, [PROMPT[:10]], 1)
    batcher.submit(short)
    wait(short)
    assert all(not work.scores for work in long)


def test_the_next_place_is_for_who_has_had_the_least(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    """A client with one text waits for one of those of a client with many, who waits for none of one that comes later."""
    order: list[int] = []

    def asked(seed: int, n: int) -> Request:
        def on_growth(text: Text, _: list[int]) -> None:
            order.extend([seed] if text.finish_reason else [])

        return Request(sampler, [[3]], CONFIG, seed, n, ignore_end=True, on_growth=on_growth)

    batcher = make_batcher(batch_size=1, max_queued_tokens=10**9)
    many, others = asked(0, 100_000), [asked(seed, 2) for seed in range(1, 6)]
    batcher.submit(many)
    while len(order) < 10:
        time.sleep(0.001)
    before = len(order)
    for request in others:
        batcher.submit(request)
    for request in others:
        wait(request)
    assert not many.finished.is_set()
    assert order[before:].count(0) < 20


def test_a_text_that_made_room_for_others_comes_back(
    sampler: Sampler, make_batcher: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_batch, "TURN_SECONDS", 0.01)
    batcher = make_batcher(batch_size=2)
    asked = [
        Request(sampler, [[number]], replace(CONFIG, max_new_tokens=150), number, 2, ignore_end=True) for number in (3, 4, 5)
    ]
    order: list[int] = []
    for request in asked:
        request.on_growth = lambda _, tokens, seed=request.seed: order.append(seed)
        batcher.submit(request)
    for request in asked:
        wait(request)
        assert words_of(request.texts) == alone(sampler, request)
    last_of_first = len(order) - order[::-1].index(3)
    assert {4, 5} & set(order[:last_of_first])


# --- the queue -----------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_by_what_it_costs(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    batcher = make_batcher(max_queued_tokens=5_000)
    large = Request(sampler, [[3, 4]], replace(CONFIG, max_new_tokens=10_000), 1, ignore_end=True)
    assert large.cost == 10_003
    batcher.submit(large)  # alone it may be larger than that
    small = Request(sampler, [[3]], CONFIG, 1)
    with pytest.raises(QueueFull, match="try again in") as refused:
        batcher.submit(small)
    assert refused.value.retry_after_seconds >= 1
    assert batcher.figures().tokens_queued > 5_000
    large.cancel()
    while batcher.figures().tokens_queued:
        time.sleep(0.001)
    assert words_of(batcher.generate(small, 300)) == alone(sampler, small)
    for number in range(100):  # they cost little
        batcher.submit(Request(sampler, [[3]], replace(CONFIG, max_new_tokens=10), number))


def test_what_a_request_costs(sampler: Sampler) -> None:
    def cost(**settings: Any) -> int:
        config = replace(CONFIG, max_new_tokens=10, num_beams=settings.pop("num_beams", 1))
        return Request(sampler, [[3, 4], []], config, 1, **settings).cost

    assert cost() == 4 + 2 * 10
    assert cost(n=3) == 4 + 6 * 10
    assert cost(num_beams=5, n=2) == 4 + 10 * 10
    assert cost(n=3, logprobs=0) == 4 + 6 * 10 + 4 + 6 * 10  # each prompt is read once more, however many texts are scored
    assert Scoring(sampler, [[3, 4], []], 1).cost == 4


def test_the_scores_of_many_texts_read_their_prompt_once(sampler: Sampler, make_batcher: Callable[..., Batcher]) -> None:
    asked = Request(sampler, [PROMPT, [3]], replace(CONFIG, max_new_tokens=5), 1, 8, ignore_end=True, logprobs=2)
    for text in make_batcher().generate(asked, 300):
        assert text.scores == log_probabilities(sampler, text, 2)
    assert (asked.num_read, asked.num_written, asked.left) == (2 * (1 + len(PROMPT) + 2) + 16 * 5, 16 * 5, 0)


def test_figures_and_the_end_of_a_batcher_that_is_closed(sampler: Sampler) -> None:
    batcher = Batcher(sampler, batch_size=4)
    asked = [Request(sampler, [[3, number]], replace(CONFIG, max_new_tokens=50), 1, 2, ignore_end=True) for number in range(6)]
    for request in asked:
        batcher.submit(request)
    batcher.close()
    for request in asked:
        assert words_of(request.texts) == alone(sampler, request)
    found = batcher.figures()
    assert (found.requests_waiting, found.requests_running, found.tokens_queued) == (0, 0, 0)
    assert (found.tokens_read, found.tokens_written) == (6 * 3, 12 * 50)
    assert max(found.calls_by_rows) == 4
    assert [request.left for request in asked] == [0] * 6
    with pytest.raises(QueueFull):
        batcher.submit(asked[0])


# --- graphs --------------------------------------------------------------------------------------------------------


def test_graphs_are_kept_for_a_few_kinds_of_options_and_opened_again_from_what_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the folder: another model lies in it, and then nothing."""
    monkeypatch.setattr(batching, "MAX_GRAPHS", 2)
    monkeypatch.setattr(sampler_module, "MANY_CALLS", 1)
    bundle = bare_bundle(tmp_path / "bundle", vocabulary_size=SIZE)
    assert bundle.weights  # as Bundle.load reads them
    sampler, kept = Sampler(bundle, threads=1), Sampler(bare_bundle(tmp_path / "kept", vocabulary_size=SIZE), threads=1)
    batcher = Batcher(sampler)
    for number, options in enumerate([{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.9}, {}]):
        if number == 2:
            shutil.rmtree(tmp_path / "bundle")
            bare_bundle(tmp_path / "bundle", UNTIED, vocabulary_size=SIZE)
        if number == 4:
            shutil.rmtree(tmp_path / "bundle")
        request = Request(sampler, [[3]], replace(CONFIG, **options), 1)
        assert words_of(batcher.generate(request, 300)) == alone(kept, request)
    assert len(sampler.generation_sessions) <= 3
    assert set(sampler.calls_that_continue) >= set(sampler.continuing_sessions)
    assert 0 < len(sampler.continuing_sessions) <= 3
    batcher.close()


def test_a_graph_that_reads_no_prompts_and_cannot_be_opened_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampler = Sampler(bare_bundle(tmp_path / "bundle", vocabulary_size=SIZE), threads=1)
    monkeypatch.setattr(sampler_module, "MANY_CALLS", 0)
    request = Request(sampler, [[3]], CONFIG, 1)
    expected, opened = alone(sampler, request), sampler.opened

    def no_memory(sessions: Any, features: Any, **how: bool) -> Any:
        if how:
            raise DataError("bad_alloc")
        return opened(sessions, features)

    monkeypatch.setattr(sampler, "opened", no_memory)
    batcher = Batcher(sampler)
    assert words_of(batcher.generate(Request(sampler, [[3]], CONFIG, 1), 300)) == expected
    batcher.close()
