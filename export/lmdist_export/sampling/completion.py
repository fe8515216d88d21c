"""From the options of a request to a generation config, and from a generated text to JSON.

The command (generate.py) and the server (serving/mlflow_model.py) share it, so both accept the same options, report the same
mistakes and return the same objects. options.py has the options. This module needs neither numpy nor onnxruntime until there
is a text.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from lmdist.errors import UsageError
from lmdist.text.vocabulary import UNKNOWN, UNKNOWN_ID
from lmdist_export.options import MAX_BIAS, NO_CACHE, PARAMS, GenerationConfig, Options

if TYPE_CHECKING:
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.generation import Text
    from lmdist_export.sampling.sampler import Sampler


def generation_config(options: Options, bundle: Bundle) -> GenerationConfig:
    """Return the bundle's config with the values of `options` in it; raises UsageError for options that exclude each other."""
    values: dict[str, Any] = dict(options.given)
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
    if options.allow_unk:
        values["suppress_tokens"] = tuple(token for token in bundle.generation.suppress_tokens if token != UNKNOWN_ID)
    if options.bad_words:
        values["bad_words_ids"] = (*bundle.generation.bad_words_ids, *token_sequences(options, bundle, "bad_words"))
    if options.logit_bias:
        added = (word_and_bias(options, given) for given in options.logit_bias)
        known = (([bundle.vocabulary.ids[word]], bias) for word, bias in added if word in bundle.vocabulary.ids)
        values["sequence_bias"] = (*bundle.generation.sequence_bias, *known)
    if "min_new_tokens" in values and "max_new_tokens" not in values:
        values["max_new_tokens"] = max(values["min_new_tokens"], bundle.generation.max_new_tokens)
    config = dataclasses.replace(bundle.generation, **values)
    check_search(options, config)
    if config.cache_weight and bundle.cache is None:
        raise UsageError(f"{options.name_for_caller('cache_weight')} is {config.cache_weight:g}, and {NO_CACHE}")
    return config


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


def no_search(options: Options, name: str) -> str:
    """Return the message that an option has no meaning in a beam search."""
    return f"{options.name_for_caller('num_beams')} is for beam search, and {name} for sampling: give only one of them"


def token_sequences(options: Options, bundle: Bundle, name: str) -> list[list[int]]:
    """Return the ids of each of the word sequences of the option `name` that can be generated: all its words are known."""
    ids = bundle.vocabulary.ids
    sequences = word_sequences(options, bundle, name).values()
    return [bundle.vocabulary.encode(words) for words in sequences if all(word in ids for word in words)]


def word_sequences(options: Options, bundle: Bundle, name: str) -> dict[str, list[str]]:
    """Return the words of each text of the option `name`; raises UsageError for a text without words."""
    sequences = {text: bundle.tokenizer.tokenize(text, continues=True) for text in getattr(options, name)}
    for text, words in sequences.items():
        if not words:
            raise UsageError(f"{options.name_for_caller(name)} {reprlib.repr(text)} has no words")
    return sequences


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


def warnings_of_options(options: Options, bundle: Bundle) -> list[str]:
    """Return a sentence for each option that names words which are not in the vocabulary: a list may serve many bundles."""
    given = {
        "stop": [word for words in word_sequences(options, bundle, "stop").values() for word in words],
        "bad_words": [word for words in word_sequences(options, bundle, "bad_words").values() for word in words],
        "logit_bias": [word_and_bias(options, given)[0] for given in options.logit_bias],
    }
    return [
        f"{options.name_for_caller(name)}: not in the vocabulary, so never generated: {reprlib.repr(unknown)[1:-1]}"
        for name, words in given.items()
        if (unknown := unknown_words(words, bundle))
    ]


def warning_of_prompt(prompt: Sequence[str], bundle: Bundle) -> str:
    """Return a sentence that names the words of a prompt which are not in the vocabulary, or nothing."""
    unknown = unknown_words(prompt, bundle)
    if not unknown:
        return ""
    known = [word.lower() for word in unknown if word.lower() in bundle.vocabulary.ids]
    hint = f"; known in lowercase: {', '.join(known)}" if known else ""
    return f"not in the vocabulary, and read as {UNKNOWN}: {', '.join(unknown)}{hint}"


def unknown_words(words: Sequence[str], bundle: Bundle) -> list[str]:
    """Return the words that are not in the vocabulary, each once."""
    return [word for word in dict.fromkeys(words) if word not in bundle.vocabulary.ids]


def detokenized(bundle: Bundle, text: Text, prompt: Sequence[str], *, echo: bool) -> str:
    """Return a generated text as people write it, with its prompt or without."""
    pieces = bundle.tokenizer.pieces([*prompt, *bundle.vocabulary.decode(text.tokens)])
    return "".join(pieces) if echo else "".join(islice(pieces, len(prompt), None)).removeprefix(" ")


def as_object(sampler: Sampler, text: Text, prompt: Sequence[str], options: Options) -> dict[str, Any]:
    """Return a generated text as a JSON object; the names are those of the OpenAI completions API where it has one."""
    vocabulary = sampler.bundle.vocabulary
    words = vocabulary.decode(text.tokens)
    result: dict[str, Any] = {
        "prompt_number": text.prompt_number,
        "index": text.number,
        "text": detokenized(sampler.bundle, text, prompt, echo=options.echo),
        "words": words,
        "finish_reason": text.finish_reason,
    }
    if options.logprobs is not None:
        from lmdist_export.sampling.generation import log_probabilities

        token_logprobs, top_logprobs = log_probabilities(sampler, text, options.logprobs)
        result["logprobs"] = {
            "tokens": words,
            "token_logprobs": token_logprobs,
            "top_logprobs": [{vocabulary.words[token]: value for token, value in top} for top in top_logprobs],
        }
    return result
