"""What is asked of a generation and what comes of it, as people write both: options by name in, texts and JSON out.

Shared by the command (generate.py) and the server (served_model.py), so that both take the same options, refuse the same
mistakes and give the same objects. Needs neither numpy nor onnxruntime until there is a text.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from lmdist.errors import UsageError
from lmdist.text.vocabulary import UNKNOWN_ID

if TYPE_CHECKING:
    from lmdist_export.bundle import Bundle, GenerationConfig
    from lmdist_export.sampling.generation import Text
    from lmdist_export.sampling.sampler import Sampler

# Options that are fields of generation_config.json; the first have no say in a search.
DRAWN = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
NUMBERS = (*DRAWN, "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "length_penalty")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for, by the names of lmdist-generate's flags; None is what the bundle's generation_config.json says."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    stop: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    logit_bias: Sequence[str] = ()
    ignore_eos: bool = False
    allow_unk: bool = False
    echo: bool = True

    def __post_init__(self) -> None:
        """Raise UsageError for what is wrong with any bundle."""
        if self.n < 1:
            raise UsageError(f"{self.called('n')} is {self.n}; it must be at least 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"{self.called('logprobs')} is {self.logprobs}; it must be 0 (those of the words alone) or above")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"{self.called('seed')} is {self.seed}; it must not be negative")

    def called(self, name: str) -> str:
        """What whoever gave an option calls it."""
        return name

    def generation_config(self, bundle: Bundle) -> GenerationConfig:
        """The bundle's values, and above them those given; raises UsageError for what does not go together."""
        values: dict[str, Any] = {name: getattr(self, name) for name in NUMBERS if getattr(self, name) is not None}
        if self.temperature is not None:
            values["do_sample"] = self.temperature > 0
        if self.allow_unk:
            values["suppress_tokens"] = tuple(index for index in bundle.generation.suppress_tokens if index != UNKNOWN_ID)
        if self.bad_words:
            bad = (self.known_words(bundle, words, "bad_words") for words in self.bad_words)
            values["bad_words_ids"] = (*bundle.generation.bad_words_ids, *bad)
        if self.logit_bias:
            added = (self.added(bundle, one) for one in self.logit_bias)
            values["sequence_bias"] = (*bundle.generation.sequence_bias, *added)
        if self.min_new_tokens is not None and self.max_new_tokens is None:
            # Asked for so many, it may have them.
            values["max_new_tokens"] = max(self.min_new_tokens, bundle.generation.max_new_tokens)
        config = dataclasses.replace(bundle.generation, **values)
        if config.num_beams > 1:
            drawn = next((name for name in (*DRAWN, "seed") if getattr(self, name) is not None), None)
            if drawn:
                raise UsageError(self.no_search(self.called(drawn)))
            if self.n > config.num_beams:
                raise UsageError(
                    f"{self.called('n')} is {self.n}; a search with {config.num_beams} beams finds at most so many texts"
                )
        elif self.length_penalty is not None:
            raise UsageError(f"{self.called('length_penalty')} is for a search: give {self.called('num_beams')} as well")
        return config

    def no_search(self, option: str) -> str:
        """That an option is none of a search."""
        return f"{self.called('num_beams')} searches for the likeliest text and draws nothing: {option} does not go with it"

    def stops(self, bundle: Bundle) -> list[list[int]]:
        """The ids of the sequences that end a text."""
        return [self.known_words(bundle, stop, "stop") for stop in self.stop]

    def added(self, bundle: Bundle, given: str) -> tuple[list[int], float]:
        """A word's id, in a list, and what is to be added to its logit, of WORD=X."""
        name = self.called("logit_bias")
        word, _, number = given.rpartition("=")
        try:
            value = float(number)
            if not word or math.isnan(value):
                raise ValueError
        except ValueError:
            raise UsageError(
                f"{name} {reprlib.repr(given)} is not understood; WORD=X is expected, as in {name} the=-2.5"
            ) from None
        return [self.known_word(bundle, word, "logit_bias")], value

    def known_words(self, bundle: Bundle, text: str, name: str) -> list[int]:
        """The ids of the words of a text; raises UsageError where there are none, or where the model has no such word."""
        words = bundle.tokenizer.tokenize(text)
        if not words:
            raise UsageError(f"{self.called(name)} {reprlib.repr(text)} has no words")
        return [self.known_word(bundle, word, name) for word in words]

    def known_word(self, bundle: Bundle, word: str, name: str) -> int:
        """The id of a word."""
        if word not in bundle.vocabulary.ids:
            raise UsageError(
                f"{self.called(name)}: {reprlib.repr(word)} is not in the vocabulary, so that it never comes; "
                "vocab.txt has all words"
            )
        return bundle.vocabulary.ids[word]


def readable(bundle: Bundle, text: Text, prompt: Sequence[str], *, echo: bool) -> str:
    """The words of a text as people write them, with its prompt or without."""
    words = [*prompt, *(bundle.vocabulary.words[index] for index in text.words)]
    pieces = bundle.tokenizer.pieces(words)
    return "".join(pieces) if echo else "".join(islice(pieces, len(prompt), None)).removeprefix(" ")


def as_object(sampler: Sampler, text: Text, prompt: Sequence[str], options: Options) -> dict[str, Any]:
    """A text as an object of JSON, by the names of the OpenAI completions API where it has one."""
    bundle = sampler.bundle
    made: dict[str, Any] = {
        "prompt_number": text.prompt_number,
        "index": text.number,
        "text": readable(bundle, text, prompt, echo=options.echo),
        "words": [bundle.vocabulary.words[index] for index in text.words],
        "finish_reason": text.finish_reason,
    }
    if options.logprobs is not None:
        from lmdist_export.sampling.generation import log_probabilities

        of_words, likeliest = log_probabilities(sampler, text, options.logprobs)
        made["logprobs"] = {
            "tokens": made["words"],
            "token_logprobs": of_words,
            "top_logprobs": [{bundle.vocabulary.words[index]: value for index, value in top} for top in likeliest],
        }
    return made
