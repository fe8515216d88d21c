"""The options of a request, resolved for a bundle: its options with theirs in them, words as ids, what is to be warned of.

    resolved = resolve(options, bundle)     # once a request

The Python API, the command lmdist-generate and the server share it, so all accept the same options and report the same
mistakes. options.py has the options. This module needs neither numpy nor onnxruntime.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmdist.errors import UsageError
from lmdist.text.vocabulary import UNKNOWN, UNKNOWN_ID
from lmdist_export.options import MAX_BIAS, NO_CACHE, PARAMS, GenerationConfig, Options
from lmdist_export.sampling.stops import Stops

if TYPE_CHECKING:
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.prompt import Prompt


@dataclass(frozen=True)
class ResolvedOptions:
    """The options of a request, resolved for a bundle."""

    options: Options
    config: GenerationConfig
    """The bundle's, with the values of the options in it."""
    stops: Stops
    """The stops that can be generated: all their words are known."""
    seed: int | None
    """The given one or a random one; None where nothing is random."""
    warnings: list[str]
    """A sentence for each option that names words which are not in the vocabulary: a list may serve many bundles."""

    def asked(self, prompt: Prompt) -> Prompt:
        """Return a prompt as it is continued: without its seam where a search, or log-probabilities, follow its own tokens."""
        follows_all = self.options.logprobs is not None or self.config.num_beams > 1
        return dataclasses.replace(prompt, seam=None) if follows_all and prompt.seam else prompt


def resolve(options: Options, bundle: Bundle, *, stream: bool = False) -> ResolvedOptions:
    """Return options, resolved for a bundle; raises UsageError for those that exclude each other, or a `stream`."""
    phrases = {name: word_sequences(options, bundle, name) for name in ("stop", "bad_words")}
    biases = [pair for given in options.logit_bias for pair in words_and_biases(options, bundle, given)]
    config = generation_config(options, bundle, token_sequences(bundle, phrases["bad_words"]), biases)
    check_search(options, config)
    if stream:
        check_stream(options, config)
    if config.cache_weight and bundle.cache is None:
        raise UsageError(f"{options.name_for_caller('cache_weight')} is {config.cache_weight:g}, and {NO_CACHE}")
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    named = {name: [word for words in found for word in words] for name, found in phrases.items()}
    named["logit_bias"] = [word for word, _ in biases]
    unknown = {
        name: [word for word in dict.fromkeys(words) if word not in bundle.vocabulary.ids] for name, words in named.items()
    }
    warnings = [
        f"{options.name_for_caller(name)}: not in the vocabulary, so never generated: {reprlib.repr(words)[1:-1]}"
        for name, words in unknown.items()
        if words
    ]
    is_random = config.num_beams == 1 and not config.greedy
    return ResolvedOptions(options, config, stops_of(options, bundle, phrases["stop"]), seed if is_random else None, warnings)


def generation_config(
    options: Options, bundle: Bundle, bad_words: list[list[int]], biases: list[tuple[str, float]]
) -> GenerationConfig:
    """Return the bundle's config with the values of `options` in it."""
    values: dict[str, Any] = dict(options.given)
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
    if options.allow_unk:
        values["suppress_tokens"] = tuple(token for token in bundle.generation.suppress_tokens if token != UNKNOWN_ID)
    if bad_words:
        values["bad_words_ids"] = (*bundle.generation.bad_words_ids, *bad_words)
    if biases:
        ids = bundle.vocabulary.ids
        known = (([ids[word]], bias) for word, bias in biases if word in ids)
        values["sequence_bias"] = (*bundle.generation.sequence_bias, *known)
    if "min_new_tokens" in values and "max_new_tokens" not in values:
        values["max_new_tokens"] = max(values["min_new_tokens"], bundle.generation.max_new_tokens)
    return dataclasses.replace(bundle.generation, **values)


def check_search(options: Options, config: GenerationConfig) -> None:
    """Raise UsageError for options of sampling beside a beam search, and for options of a beam search without one."""
    num_beams = options.name_for_caller("num_beams")
    if config.num_beams > 1:
        for name, row in PARAMS.items():
            if row.option.sampling_only and options.is_given(name):
                raise UsageError(no_search(options, options.name_for_caller(name)))
        if options.n > config.num_beams:
            raise UsageError(
                f"{options.name_for_caller('n')} is {options.n}; a beam search with {config.num_beams} beams finds at most "
                "so many texts"
            )
    elif options.is_given("length_penalty"):
        raise UsageError(f"{options.name_for_caller('length_penalty')} is for a beam search: give {num_beams} as well")


def check_stream(options: Options, config: GenerationConfig) -> None:
    """Raise UsageError for several texts, and for a beam search, which has no text before its end."""
    name = "--stream" if options.as_flags else "a stream"
    if options.n > 1:
        raise UsageError(f"{options.name_for_caller('n')} is {options.n}; {name} is one text")
    if config.num_beams > 1:
        raise UsageError(no_search(options, name))


def no_search(options: Options, name: str) -> str:
    """Return the message that an option has no meaning in a beam search."""
    return f"{options.name_for_caller('num_beams')} is for beam search, and {name} for sampling: give only one of them"


def stops_of(options: Options, bundle: Bundle, sequences: list[list[str]]) -> Stops:
    """Return the stops that can be generated: sequences of known words, or texts where there are pieces of words."""
    if model := bundle.tokenizer.model:
        return Stops([as_written(text, bundle).encode() for text in options.stop], model.entries.contents)
    return Stops(token_sequences(bundle, sequences))


def as_written(text: str, bundle: Bundle) -> str:
    """Return a text as a model of pieces writes it: in lowercase, or normalized, where the text that it has learned from is.

    The whitespace around it stays, which some models of pieces leave out.
    """
    stripped = text.strip()
    words = bundle.tokenizer.tokenize(stripped)
    written = "" if UNKNOWN in words else bundle.tokenizer.detokenize(words)
    return text.replace(stripped, written) if written else text


def token_sequences(bundle: Bundle, sequences: list[list[str]]) -> list[list[int]]:
    """Return the ids of the word sequences that can be generated: all their words are known."""
    ids = bundle.vocabulary.ids
    return [bundle.vocabulary.encode(words) for words in sequences if all(word in ids for word in words)]


def word_sequences(options: Options, bundle: Bundle, name: str) -> list[list[str]]:
    """Return how each text of the option `name` is written; raises UsageError for a text without words."""
    found: list[list[str]] = []
    for text in dict.fromkeys(getattr(options, name)):
        spellings = bundle.tokenizer.spellings(text)
        if not spellings[0]:
            raise UsageError(f"{options.name_for_caller(name)} {reprlib.repr(text)} has no words")
        found += spellings
    return found


def words_and_biases(options: Options, bundle: Bundle, given: str) -> list[tuple[str, float]]:
    """Return the words that WORD=X names, of pieces with and without a space before it, each with the bias of its logit."""
    word, value = word_and_bias(options, given)
    if word in bundle.vocabulary.ids or not bundle.tokenizer.settings.has_pieces:
        return [(word, value)]
    return [(words[0], value) for words in bundle.tokenizer.spellings(word) if len(words) == 1] or [(word, value)]


def word_and_bias(options: Options, given: str) -> tuple[str, float]:
    """Return a word and what is added to its logit, from WORD=X."""
    name = options.name_for_caller("logit_bias")
    word, _, number = given.rpartition("=")
    try:
        value = float(number)
        if not word or not (value == -math.inf or abs(value) <= MAX_BIAS):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{name} is {reprlib.repr(given)}; WORD=X is expected with X from {-MAX_BIAS:,} to {MAX_BIAS:,}, or -inf, as in "
            f"{name} the=-2.5"
        ) from None
    return word, value


def warning_of_prompt(prompt: Prompt, bundle: Bundle) -> str:
    """Return a sentence that names the words of a prompt which are not in the vocabulary, or nothing."""
    if not prompt.unknown_words:
        return ""
    known = [word.lower() for word in prompt.unknown_words if word.lower() in bundle.vocabulary.ids]
    hint = f"; known in lowercase: {', '.join(known)}" if known else ""
    return f"not in the vocabulary, and read as {UNKNOWN}: {', '.join(prompt.unknown_words)}{hint}"
