"""Generated text as people read it: all texts of a request in the order of their prompts, or the pieces of one as it grows.

    for completion in completions(sampler, prompts, resolved):
        completion.text, completion.finish_reason
    for piece in Stream(sampler, prompt, resolved):
        print(piece, end="")

The Python API, the command lmdist-generate and the server share it, so the same options and the same seed give the same texts.
This module needs neither numpy nor onnxruntime until there is a text.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from lmdist_export.sampling.resolved_options import ResolvedOptions, warning_of_prompt
from lmdist_export.sampling.writing import Writer, WrittenPrompt, taken_again, whole_words

if TYPE_CHECKING:
    from lmdist_export.sampling.generation import Text
    from lmdist_export.sampling.prompt import Prompt
    from lmdist_export.sampling.sampler import Sampler
    from lmdist_export.sampling.state import State


@dataclass(frozen=True, eq=False)
class Completion:
    """A generated text."""

    text: str
    """As people write it; it begins with the prompt, unless the option `echo` is false."""
    tokens: list[str]
    """The words that were generated, without the prompt, and without the end mark or the stop that ended the text."""
    finish_reason: str
    """`stop`: it ended, or a stop came; `length`: it has `max_new_tokens` tokens; `exhausted`: the options left no token."""
    prompt: Prompt = field(repr=False)
    """What it continues; `prompt.unknown_words` are those that the model does not know and has read as `<unk>`."""
    seed: int | None = None
    """The seed that gives this text again; None where nothing was random."""
    token_logprobs: list[float] | None = field(default=None, repr=False)
    """With the option `logprobs`: the log-probability of each token, in nats, by the model itself, whatever the options are."""
    top_logprobs: list[dict[str, float]] | None = field(default=None, repr=False)
    """With the option `logprobs`: the most likely tokens in the place of each, the best first, with their log-probabilities."""
    warnings: list[str] = field(default_factory=list)
    """Sentences that name words of the prompt, or of an option, which are not in the vocabulary."""
    prompt_number: int = field(default=0, repr=False)
    """The number of the prompt among those of the request."""
    index: int = field(default=0, repr=False)
    """The number of the text among those of its prompt."""
    follows_all: bool = field(default=True, repr=False)
    """Whether its tokens follow all of those of the prompt; otherwise the first one is in the place of the prompt's last."""

    @property
    def unknown_words(self) -> list[str]:
        """Return the words of the prompt that are not in the vocabulary, each once."""
        return self.prompt.unknown_words

    def as_object(self) -> dict[str, Any]:
        """Return the text as a JSON object; the names are those of the OpenAI completions API where it has one."""
        result: dict[str, Any] = {
            "prompt_number": self.prompt_number,
            "index": self.index,
            "text": self.text,
            "words": self.tokens,
            "finish_reason": self.finish_reason,
        }
        if self.token_logprobs is not None:
            logprobs = {"tokens": self.tokens, "token_logprobs": self.token_logprobs, "top_logprobs": self.top_logprobs}
            result["logprobs"] = logprobs
        return result


def to_completion(sampler: Sampler, text: Text, prompt: Prompt, resolved: ResolvedOptions) -> Completion:
    """Return a text of ids that has ended as people read it; its prompt is as `ResolvedOptions.asked` returns it."""
    bundle, options = sampler.bundle, resolved.options
    written = WrittenPrompt(bundle, prompt, has_space=not options.echo)
    writer = Writer(written, taken_again(text, prompt))
    pieces = [*(written.shown if options.echo else []), *writer.write(text.tokens), writer.end(text)]
    token_logprobs = top_logprobs = None
    if options.logprobs is not None:
        from lmdist_export.sampling.generation import log_probabilities

        token_logprobs, tops = text.scores or log_probabilities(sampler, text, options.logprobs)
        top_logprobs = [{bundle.vocabulary.words[token]: value for token, value in top} for top in tops]
    return Completion(
        "".join(pieces),
        bundle.vocabulary.decode(text.tokens),
        text.finish_reason,
        prompt,
        resolved.seed,
        token_logprobs,
        top_logprobs,
        [*filter(None, [warning_of_prompt(prompt, bundle)]), *resolved.warnings],
        text.prompt_number,
        text.number,
        follows_all=not text.tokens or len(text.prompt) == len(prompt.tokens),
    )


def completions(
    sampler: Sampler, prompts: Iterable[Prompt], resolved: ResolvedOptions, batch_size: int
) -> Iterator[Completion]:
    """Yield the texts in the order of their prompts, each as soon as those before it; prompts are read in turn."""
    grown = grow_texts(sampler, prompts, resolved, batch_size)
    ended = ((prompt, text) for prompt, text, _ in grown if text.finish_reason)
    for prompt, text in ended if resolved.config.num_beams > 1 else in_order(ended, resolved.options.n):
        yield to_completion(sampler, text, prompt, resolved)


def grow_texts(
    sampler: Sampler,
    prompts: Iterable[Prompt],
    resolved: ResolvedOptions,
    batch_size: int,
    *,
    stream: bool = False,
) -> Iterator[tuple[Prompt, Text, list[int]]]:
    """Yield (prompt, text, new tokens) as the texts of prompts grow; each prompt is read when it is its turn."""
    from lmdist_export.sampling.beam_search import beam_search
    from lmdist_export.sampling.generation import Generation, forks, grow

    options, config, n = resolved.options, resolved.config, resolved.options.n
    prompts = map(resolved.asked, prompts)
    cached = config.cache_weight > 0 and config.num_beams == 1
    growing: dict[int, Prompt] = {}
    """The prompts, by number, whose texts have not all ended."""
    ended: Counter[int] = Counter()

    def states() -> Iterator[tuple[int, Prompt, State]]:
        for number, prompt in enumerate(prompts):
            growing[number] = prompt
            opened = prompt.open()
            yield number, opened, opened.start(sampler, config.bos_token_id, cached=cached)

    if config.num_beams > 1:
        for number, prompt, state in states():
            for text in beam_search(sampler, prompt.ids, config, n, resolved.stops, options.ignore_eos, state):
                yield prompt, dataclasses.replace(text, prompt_number=number), text.tokens
            del growing[number]
        return
    texts = (
        text
        for number, opened, state in states()
        for text in forks(
            sampler, state, opened.ids, number, config, resolved.seed or 0, opened.numbers(n), growing[number].begin
        )
    )
    generation = Generation(config, resolved.stops, options.ignore_eos)
    for text, tokens in grow(sampler, texts, generation, batch_size, stream=stream):
        number = text.prompt_number
        yield growing[number], text, tokens
        ended[number] += bool(text.finish_reason)
        if ended[number] == n:
            del growing[number], ended[number]


def in_order(texts: Iterable[tuple[Prompt, Text]], n: int) -> Iterator[tuple[Prompt, Text]]:
    """Yield texts in the order of their prompts, and the `n` of each by their number, each as soon as those before it are.

    At Ctrl-C those that wait for others are yielded too.
    """
    waiting: dict[int, tuple[Prompt, Text]] = {}
    turn = 0
    try:
        for prompt, text in texts:
            waiting[text.prompt_number * n + text.number] = prompt, text
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1
    except KeyboardInterrupt:
        yield from (waiting[place] for place in sorted(waiting))
        raise


class Stream(Iterator[str]):
    """The pieces of one text, each word as soon as it is generated; together they are the text."""

    def __init__(self, sampler: Sampler, prompt: Prompt, resolved: ResolvedOptions) -> None:
        self.completion: Completion | None = None
        """The text as `generate` returns it, once it has ended."""
        self.pieces = self.run(sampler, prompt, resolved)

    def __next__(self) -> str:
        return next(self.pieces)

    def run(self, sampler: Sampler, prompt: Prompt, resolved: ResolvedOptions) -> Iterator[str]:
        """Yield the pieces, each with its leading space, if any."""
        growth = grow_texts(sampler, [prompt], resolved, 1, stream=True)
        first = asked, text, _ = next(growth)  # what cannot be generated is an error before the prompt is written
        echo, has_pieces = resolved.options.echo, sampler.bundle.tokenizer.settings.has_pieces
        written = WrittenPrompt(sampler.bundle, asked, has_space=not echo)
        writer = Writer(written, taken_again(text, asked))

        def pieces() -> Iterator[str]:
            for *_, tokens in chain([first], growth):
                yield from writer.write(tokens)
            if end := writer.end(text):
                yield end

        if echo:
            yield from written.shown
        yield from whole_words(pieces()) if has_pieces else pieces()
        self.completion = to_completion(sampler, text, asked, resolved)
