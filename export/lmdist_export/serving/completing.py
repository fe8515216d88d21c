"""The answers of /v1/completions: all texts at their end, or a stream of events as they grow.

    answer = await complete(asked, service, receive, note, deadline)
    events, close = await stream(asked, service, receive, note, deadline)

What is asked is known by openai_request.py, the form of an answer by openai_answer.py; this module runs it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from json.encoder import encode_basestring
from typing import Any

from lmdist_export.sampling.generation import Text
from lmdist_export.sampling.log_probabilities import TokenScores
from lmdist_export.sampling.writing import Writer
from lmdist_export.serving.batching import Request, Scoring
from lmdist_export.serving.failures import error_object, status_and_message
from lmdist_export.serving.json_body import Message, Receive, encoded
from lmdist_export.serving.observing import Note
from lmdist_export.serving.openai_answer import choice, echoed, finish_reason, logprobs_object, usage, writer_of
from lmdist_export.serving.openai_request import CompletionRequest
from lmdist_export.serving.running import SHORT_TOKENS, Growth, done_by, finish
from lmdist_export.serving.service import Service

DONE = b"data: [DONE]\n\n"


async def complete(asked: CompletionRequest, service: Service, receive: Receive, note: Note, deadline: float) -> dict[str, Any]:
    """Return the answer to a request; raises as `finish`."""
    if asked.only_scores:
        texts = [Text(prompt.ids, number, 0, finish_reason="length") for number, prompt in enumerate(asked.tokenized)]
    else:
        growth = Growth()
        job = await job_of(asked, service, on_end=growth.on_end)
        note.work = job
        await finish(service.batcher, job, growth, receive, deadline)
        texts = in_order(job.texts)
    counted = usage(asked, texts)
    if asked.ranks:
        texts = best(asked, texts)
    scores = await scores_of(asked, service, texts, receive, note, deadline)

    def choices() -> list[dict[str, Any]]:
        return [choice(asked, text, index, of_text) for index, (text, of_text) in enumerate(zip(texts, scores, strict=True))]

    has_prompts = asked.echo or asked.logprobs is not None
    is_long = sum(len(text.tokens) + len(text.prompt) * has_prompts for text in texts) > SHORT_TOKENS
    return asked.envelope() | {"choices": await done_by(is_long, choices), "usage": counted}


async def job_of(asked: CompletionRequest, service: Service, **callbacks: Any) -> Request:
    """Return what the batching thread does for a request that generates."""

    def make() -> Request:
        return service.request(asked.tokenized, asked.resolved, logprobs=own_logprobs(asked), **callbacks)

    return await done_by(asked.prompt_tokens > SHORT_TOKENS, make)


def own_logprobs(asked: CompletionRequest) -> int | None:
    """Return how many likely tokens the scores of a text have, where those of its own tokens are wanted."""
    return asked.logprobs or 0 if asked.ranks or (asked.logprobs is not None and not asked.echo) else None


async def scores_of(
    asked: CompletionRequest, service: Service, texts: Sequence[Text], receive: Receive, note: Note, deadline: float
) -> Sequence[TokenScores | None]:
    """Return the scores that are asked for; raises as `finish`.

    Where the prompt is echoed, those of its tokens too, and of an end mark that was generated: lm-evaluation-harness asks for
    one token after a text, and drops the last score.
    """
    if asked.logprobs is None:
        return [None] * len(texts)
    if not asked.echo:
        return [text.scores for text in texts]
    growth = Growth()
    ids = [[*text.prompt, *text.tokens, *end_of(asked, text)] for text in texts]
    job = Scoring(service.sampler, ids, asked.logprobs, growth.on_end)
    note.work = note.work or job
    await finish(service.batcher, job, growth, receive, deadline, completes=not asked.only_scores)
    return job.scores


def end_of(asked: CompletionRequest, text: Text) -> list[int]:
    """Return the end mark where it has ended a text."""
    by_mark = text.finish_reason == "stop" and not asked.resolved.stops and not asked.only_scores
    return [asked.resolved.config.eos_token_id] if by_mark else []


def in_order(texts: Sequence[Text]) -> list[Text]:
    """Return texts in the order of their prompts, those of one by their numbers."""
    return sorted(texts, key=lambda text: (text.prompt_number, text.number))


def best(asked: CompletionRequest, texts: Sequence[Text]) -> list[Text]:
    """Return the `n` texts of each prompt with the highest log-probability per token, the best first."""

    def mean(text: Text) -> float:
        assert text.scores, "texts are ranked by their scores"
        of_tokens, _ = text.scores
        return sum(of_tokens) / len(of_tokens) if of_tokens else -math.inf

    by_prompt = [[text for text in texts if text.prompt_number == number] for number in range(len(asked.prompts))]
    return [text for found in by_prompt for text in sorted(found, key=mean, reverse=True)[: asked.n]]


# --- streams -------------------------------------------------------------------------------------------------------


async def stream(
    asked: CompletionRequest, service: Service, receive: Receive, note: Note, deadline: float
) -> tuple[AsyncIterator[bytes], Callable[[], None]]:
    """Return the events of an answer, and what ends its request, to be called when they end. Raise as `finish`."""
    if asked.only_scores:
        return once(asked, await complete(asked, service, receive, note, deadline)), lambda: None
    growth = Growth()
    job = await job_of(asked, service, on_growth=growth.on_growth, on_end=growth.on_end)
    service.batcher.submit(job)
    note.work = job

    def time_out() -> None:
        job.cancel()
        growth.take(None)

    timer = growth.loop.call_at(deadline, time_out)

    def close() -> None:
        timer.cancel()
        job.cancel()

    return Streaming(asked, service, note, deadline).events(job, growth), close


async def once(asked: CompletionRequest, answer: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yield an answer that has ended as a stream."""
    counted = answer.pop("usage")
    whole = answer | ({"usage": None} if asked.include_usage else {})
    is_long = counted["total_tokens"] > SHORT_TOKENS
    yield event(await done_by(is_long, lambda: encoded(whole, is_long=is_long)))
    if asked.include_usage:
        yield event(encoded(asked.envelope() | {"choices": [], "usage": counted}))
    yield DONE


class Streaming:
    """The answer to a request, as it grows."""

    def __init__(self, asked: CompletionRequest, service: Service, note: Note, deadline: float) -> None:
        self.asked, self.service, self.note, self.deadline = asked, service, note, deadline
        # An event is written around its text: to make a dictionary of it first takes longer than all else.
        self.before = encoded(asked.envelope() | {"choices": []})[:-2]
        self.after = b',"usage":null}' if asked.include_usage else b"}"
        self.writers: dict[tuple[int, int], Writer] = {}
        self.pieces: dict[tuple[int, int], list[str]] = {}
        """Those of each text, where its log-probabilities come with its end."""

    async def events(self, job: Request, growth: Growth) -> AsyncIterator[bytes]:
        """Yield the events of a request; those that come together at once. An error is the last of them."""
        try:
            async for grown in growth:
                yield b"".join(self.grown(*event) for event in grown)
            if job.error:
                raise job.error
            if job.cancelled:  # whatever its texts have by now: not all of it has been sent, nor scored
                raise TimeoutError
            yield await self.end(in_order(job.texts))
        except Exception as error:
            yield error_event(error)

    def grown(self, text: Text, tokens: Sequence[int], reason: str) -> bytes:
        """Return the event of tokens that were appended to a text."""
        if tokens and self.note.first_token_seconds is None:
            self.note.first_token_seconds = self.note.seconds
        key = (text.prompt_number, text.number)
        written = ""
        if key not in self.writers:
            self.writers[key] = writer_of(self.asked, text)
            written = echoed(self.asked, text)
        pieces = self.writers[key].write(tokens)
        written += "".join(pieces)
        if reason:
            written += self.writers[key].end(text)
        if self.asked.logprobs is not None:
            self.pieces.setdefault(key, []).extend(pieces)
        ends = bool(reason) and self.asked.logprobs is None  # log-probabilities come with the end
        if ends:
            del self.writers[key]
        return self.chunk(key, written, reason if ends else "") if written or ends else b""

    def chunk(self, key: tuple[int, int], written: str, reason: str, logprobs: bytes = b"null") -> bytes:
        """Return an event with more of a text."""
        index = key[0] * self.asked.n + key[1]
        text, finished = encode_basestring(written).encode(), encoded(finish_reason(reason)) if reason else b"null"
        choice = b'{"text":%b,"index":%d,"logprobs":%b,"finish_reason":%b}]' % (text, index, logprobs, finished)
        return event(self.before + choice + self.after)

    async def end(self, texts: Sequence[Text]) -> bytes:
        """Return the last events: of each text what was not sent before, the usage, and the mark of the end."""
        asked, events = self.asked, []
        if asked.logprobs is not None:
            found = await scores_of(asked, self.service, texts, nobody, self.note, self.deadline)
            is_long = sum(len(text.prompt) + len(text.tokens) for text in texts) > SHORT_TOKENS
            events = await done_by(is_long, lambda: [*map(self.scored, texts, found)])
        if asked.include_usage:
            events.append(event(encoded(asked.envelope() | {"choices": [], "usage": usage(asked, texts)})))
        return b"".join([*events, DONE])

    def scored(self, text: Text, scores: TokenScores | None) -> bytes:
        """Return the event that ends a text with its log-probabilities."""
        key = (text.prompt_number, text.number)
        assert scores, "they were asked for"
        logprobs = logprobs_object(self.asked, text, self.pieces[key], scores)
        return self.chunk(key, "", text.finish_reason, encoded(logprobs, is_long=len(text.tokens) > SHORT_TOKENS))


def event(data: bytes) -> bytes:
    """Return an event of a stream."""
    return b"data: %b\n\n" % data


def error_event(error: BaseException) -> bytes:
    """Return the event of an error, the last of a stream."""
    return event(encoded(error_object(error, *status_and_message(error))))


async def nobody() -> Message:
    """Receive nothing: whoever sends the stream knows when its client leaves."""
    return await asyncio.Future()
