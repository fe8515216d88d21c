"""The answers of /v1/completions: all texts at their end, or a stream of events as they grow.

    answer = await complete(asked, service, receive, note, deadline)
    events, close = await stream(asked, service, receive, note, deadline)

What is asked is known by openai_request.py, the form of an answer by openai_answer.py; this module runs it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from lmdist_export.sampling.generation import Text
from lmdist_export.sampling.log_probabilities import TokenScores
from lmdist_export.serving.batching import Request, Scoring
from lmdist_export.serving.failures import error_object, status_and_message
from lmdist_export.serving.json_body import Message, Receive
from lmdist_export.serving.observing import Note
from lmdist_export.serving.openai_answer import Writer, choice, finish_reason, usage
from lmdist_export.serving.openai_request import CompletionRequest
from lmdist_export.serving.running import Event, Growth, finish
from lmdist_export.serving.service import Service

DONE = b"data: [DONE]\n\n"


async def complete(asked: CompletionRequest, service: Service, receive: Receive, note: Note, deadline: float) -> dict[str, Any]:
    """Return the answer to a request; raises as `finish`."""
    if asked.only_scores:
        texts = [Text(prompt.ids, number, 0, finish_reason="length") for number, prompt in enumerate(asked.prompts)]
    else:
        growth = Growth()
        job = await asyncio.to_thread(
            lambda: service.request(asked.prompts, asked.resolved, logprobs=own_logprobs(asked), on_end=growth.on_end)
        )
        note.work = job
        await finish(service.batcher, job, growth, receive, deadline)
        texts = in_order(job.texts)
    counted = usage(asked, texts)
    if asked.ranks:
        texts = best(asked, texts)
    scores = await scores_of(asked, service, texts, receive, note, deadline)

    def choices() -> list[dict[str, Any]]:
        return [choice(asked, text, index, of_text) for index, (text, of_text) in enumerate(zip(texts, scores, strict=True))]

    return asked.envelope() | {"choices": await asyncio.to_thread(choices), "usage": counted}


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
    how = {"logprobs": own_logprobs(asked), "on_growth": growth.on_growth, "on_end": growth.on_end}
    job = await asyncio.to_thread(lambda: service.request(asked.prompts, asked.resolved, **how))
    service.batcher.submit(job)
    note.work = job

    def time_out() -> None:
        job.cancel()
        growth.on_end()

    timer = growth.loop.call_at(deadline, time_out)

    def close() -> None:
        timer.cancel()
        job.cancel()

    return Streaming(asked, service, note, deadline).events(job, growth), close


async def once(asked: CompletionRequest, answer: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yield an answer that has ended as a stream."""
    counted = answer.pop("usage")
    yield event(answer | ({"usage": None} if asked.include_usage else {}))
    if asked.include_usage:
        yield event(asked.envelope() | {"choices": [], "usage": counted})
    yield DONE


class Streaming:
    """The answer to a request, as it grows."""

    def __init__(self, asked: CompletionRequest, service: Service, note: Note, deadline: float) -> None:
        self.asked, self.service, self.note, self.deadline = asked, service, note, deadline
        self.envelope = asked.envelope()
        self.writers: dict[tuple[int, int], Writer] = {}
        self.ended: set[tuple[int, int]] = set()

    async def events(self, job: Request, growth: Growth) -> AsyncIterator[bytes]:
        """Yield the events of a request; those that come together at once. An error is the last of them."""
        try:
            async for grown in gathered(growth):
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
            prompt, given = self.asked.prompts[text.prompt_number], self.asked.given[text.prompt_number]
            self.writers[key] = Writer(self.asked.bundle, prompt, given, self.asked.written[text.prompt_number])
            written = given if self.asked.echo else ""
        written += "".join(self.writers[key].write(tokens))
        if reason:
            written += self.writers[key].end(text)
        ends = bool(reason) and self.asked.logprobs is None  # log-probabilities come with the end
        if ends:
            self.ended.add(key)
        return self.chunk(key, written, reason if ends else "") if written or ends else b""

    def chunk(self, key: tuple[int, int], written: str, reason: str, logprobs: Any = None) -> bytes:
        """Return an event with more of a text."""
        index = key[0] * self.asked.n + key[1]
        found = {"text": written, "index": index, "logprobs": logprobs, "finish_reason": finish_reason(reason)}
        return event(self.envelope | {"choices": [found]} | ({"usage": None} if self.asked.include_usage else {}))

    async def end(self, texts: Sequence[Text]) -> bytes:
        """Return the last events: of each text what was not sent before, the usage, and the mark of the end."""
        asked, events = self.asked, []
        found = await scores_of(asked, self.service, texts, nobody, self.note, self.deadline)
        for text, of_text in zip(texts, found, strict=True):
            key = (text.prompt_number, text.number)
            if key in self.ended:
                continue
            whole = choice(asked, text, 0, of_text)
            # A text of a beam search has no piece before its end.
            written = "" if key in self.writers else whole["text"]
            events.append(self.chunk(key, written, text.finish_reason, whole["logprobs"]))
        if asked.include_usage:
            events.append(event(self.envelope | {"choices": [], "usage": usage(asked, texts)}))
        return b"".join([*events, DONE])


async def gathered(growth: Growth) -> AsyncIterator[list[Event]]:
    """Yield the events that wait, together: all that a step of the batching thread has brought."""
    async for first in growth:
        found = [first]
        while not growth.events.empty():
            coming = growth.events.get_nowait()
            if coming is None:
                growth.events.put_nowait(None)
                break
            found.append(coming)
        yield found


def event(data: dict[str, Any]) -> bytes:
    """Return an event of a stream."""
    return b"data: %b\n\n" % json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def error_event(error: BaseException) -> bytes:
    """Return the event of an error, the last of a stream."""
    return event(error_object(error, *status_and_message(error)))


async def nobody() -> Message:
    """Receive nothing: whoever sends the stream knows when its client leaves."""
    return await asyncio.Future()
