"""OpenAI's completions API: what the JSON of a request asks for, or an error in OpenAI's form.

    asked = read_request(given, service, "news")        # raises UsageError; ApiError has OpenAI's `param` and `code` too

Beside OpenAI's names those of the table of options are taken (options.py), whose defaults are the bundle's. Where a name is in
both, OpenAI's meaning holds: `echo` is false, `logit_bias` may be an object of token ids. The answers are openai_answer.py's.
This module knows no HTTP.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmdist.bounds import check
from lmdist.command_line import did_you_mean
from lmdist.errors import UsageError
from lmdist_export.bundle import Bundle
from lmdist_export.options import PARAMS, Options, string_of, typed
from lmdist_export.sampling.prompt import Prompt, prompt_of_words
from lmdist_export.sampling.resolved_options import ResolvedOptions, warning_of_prompt
from lmdist_export.sampling.writing import WrittenPrompt
from lmdist_export.serving.json_body import BadRequest, quoted
from lmdist_export.serving.service import MAX_TOKENS, Service, check_limit

EXAMPLE = '{"prompt": "We must", "max_tokens": 20}'
OPENAI_NAMES = ("model", "prompt", "max_tokens", "best_of", "stream", "stream_options", "suffix", "user")
"""OpenAI's names that are none of the table of options."""
CHAT = "messages tools tool_choice functions function_call response_format input".split()
NO_CHAT = "a word-level language model continues a text, and has neither chat nor tools: POST /v1/completions takes a `prompt`"


class ApiError(BadRequest):
    """An error with what OpenAI's form has beside a message."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, status)
        self.param, self.code = param, code


def no_model(asked: Any, model: str) -> ApiError:
    """Return the error of a request for another model."""
    return ApiError(f"the model {quoted(asked)} is not here; this server has {quoted(model)}", 404, "model", "model_not_found")


# --- a request -----------------------------------------------------------------------------------------------------


class AskedPrompt(NamedTuple):
    """A prompt of a request."""

    prompt: Prompt
    text: str
    """As it was given; ids as they are written."""
    has_mark: bool
    """Whether its ids had the mark in front that a text begins after: it is read once."""
    written: WrittenPrompt


@dataclass(frozen=True)
class CompletionRequest:
    """What a request asks for."""

    model: str
    bundle: Bundle
    prompts: list[AskedPrompt]
    resolved: ResolvedOptions
    """Its `n` is the number of texts that are generated for a prompt, of which the best are returned."""
    n: int
    only_scores: bool
    """Whether nothing is generated: the answer is the prompt and its log-probabilities."""
    echo: bool
    stream: bool
    include_usage: bool
    warnings: list[str]
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def logprobs(self) -> int | None:
        """Return how many likely tokens come with the log-probability of each, where these are asked for."""
        return self.resolved.options.logprobs

    @property
    def ranks(self) -> bool:
        """Return whether more texts are generated than are returned."""
        return not self.only_scores and self.resolved.options.n > self.n

    @property
    def tokenized(self) -> list[Prompt]:
        """Return the prompts, as tokens."""
        return [asked.prompt for asked in self.prompts]

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens the prompts have."""
        return sum(len(asked.prompt.ids) for asked in self.prompts)

    def envelope(self) -> dict[str, Any]:
        """Return what each answer, and each event of a stream, has beside its choices."""
        seed = {} if self.resolved.seed is None or self.only_scores else {"seed": self.resolved.seed}
        warnings = {"warnings": self.warnings} if self.warnings else {}
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model} | seed | warnings


def read_request(given: dict[str, Any], service: Service, model: str) -> CompletionRequest:
    """Return what a request asks for; raises UsageError where it cannot be answered."""
    given = {name: value for name, value in given.items() if value is not None}
    check_names(given, model)
    prompts, texts, marks = read_prompts(given.get("prompt", ""), service, scores=given.get("max_tokens") == 0)
    renamed = "max_tokens" in given
    try:
        values = table_values(given, service.bundle)
        n, best_of = read_counts(given, values)
        echo = values.pop("echo", False)
        scores = given.get("max_tokens") == 0
        if scores and not echo:
            raise ApiError("max_tokens is 0, which is for the log-probabilities of a prompt: give echo and logprobs as well")
        values["n"] = best_of
        if scores:
            values["max_new_tokens"] = 1  # the table has no 0; none is generated
        stops, silent = spoken(values.pop("stop", []), service.bundle)
        options = Options.from_values({**values, "stop": stops})
        limit_name = "max_tokens" if renamed else "max_new_tokens"
        prompts, resolved = service.resolve(prompts, options, limit_name=limit_name, echo=echo)
        if echo and options.logprobs is not None:
            scored = n * sum(len(prompt.ids) + resolved.config.max_new_tokens for prompt in prompts)
            check_limit(f"the number of tokens in prompts and {limit_name}, scored for each text, together", scored, MAX_TOKENS)
    except UsageError as error:
        if not renamed or type(error) is not UsageError:
            raise
        raise UsageError(str(error).replace("max_new_tokens", "max_tokens")) from None
    stream, include_usage = read_stream(given)
    if stream and best_of > n:
        raise ApiError(f"best_of is {best_of}; the best texts are known at their end: without stream", param="best_of")
    unknown = [*filter(None, (warning_of_prompt(prompt, service.bundle) for prompt in prompts))]
    asked = [
        AskedPrompt(prompt, text, has_mark, WrittenPrompt(service.bundle, prompt, has_space=not text or text[-1].isspace()))
        for prompt, text, has_mark in zip(prompts, texts, marks, strict=True)
    ]
    warnings = [*unknown, *silent, *resolved.warnings]
    return CompletionRequest(model, service.bundle, asked, resolved, n, scores, echo, stream, include_usage, warnings)


def check_names(given: dict[str, Any], model: str) -> None:
    """Raise ApiError for names that are not known, and for another model."""
    for name in given:
        if name in CHAT:
            raise ApiError(f"{name} is given; {NO_CHAT}", param=name)
        if name not in OPENAI_NAMES and name not in PARAMS:
            hint = did_you_mean(name, [*OPENAI_NAMES, *PARAMS])
            sentence = f"the body has {quoted(name)}, which is not known{hint}"
            raise ApiError(sentence, param=quoted(name).strip('"'), code="unknown_parameter")
    if given.get("suffix"):
        raise ApiError("suffix is given; this model continues a text, and inserts nothing", param="suffix")
    if given.get("model", model) != model:
        raise no_model(given["model"], model)


def read_prompts(given: Any, service: Service, *, scores: bool) -> tuple[list[Prompt], list[str], list[bool]]:
    """Return prompts, each as a text, and whether it had the mark in front that a text begins after.

    They are a string, a list of strings, a list of ids, or a list of these.
    """
    several = given if isinstance(given, list) and not (given and all(map(is_id, given))) else [given]
    if all(isinstance(prompt, str) for prompt in several):
        texts = [string_of("prompt", text, quoted=quoted) for text in several]
        return service.prompts(texts, continues=not scores), texts, [False] * len(texts)
    if not all(isinstance(ids, list) and all(map(is_id, ids)) for ids in several):
        raise ApiError(
            f"prompt is {quoted(given)}; a string, a list of strings, a list of token ids, or a list of these is expected",
            param="prompt",
        )
    marked = [ids[:1] == [service.bundle.generation.bos_token_id] for ids in several]
    prompts = [prompt_of_ids(ids[has_mark:], service, "prompt") for ids, has_mark in zip(several, marked, strict=True)]
    return prompts, [service.bundle.tokenizer.detokenize(prompt.tokens) for prompt in prompts], marked


def prompt_of_ids(ids: Any, service: Service, name: str) -> Prompt:
    """Return the words of ids as a prompt; raises UsageError, with the `name` of the field that has them, for others."""
    if not isinstance(ids, list) or not all(map(is_id, ids)):
        raise ApiError(f"{name} is {quoted(ids)}; a list of token ids is expected", param=name)
    size = service.bundle.sizes.vocabulary_size
    if wrong := [token for token in ids if not 0 <= token < size]:
        sentence = f"{name} has the token id {quoted(wrong[0])}; the vocabulary has the ids 0 to {size - 1:,}"
        raise ApiError(sentence, param=name)
    check_limit(f"the number of tokens in {name}s" if name == "prompt" else "the number of tokens", len(ids), MAX_TOKENS)
    return prompt_of_words(service.bundle, service.bundle.vocabulary.decode(ids))


def is_id(value: Any) -> bool:
    """Return whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def table_values(given: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
    """Return the values of the table of options, each in its type; `max_tokens` is max_new_tokens."""
    values = {name: value for name, value in given.items() if name in PARAMS}
    if "max_tokens" in given:
        if "max_new_tokens" in values:
            raise ApiError("max_tokens and max_new_tokens are two names of one option: give one of them", param="max_tokens")
        values["max_new_tokens"] = given["max_tokens"]
    if isinstance(bias := values.get("logit_bias"), dict):
        values["logit_bias"] = bias_of_ids(bias, bundle)
    return {name: typed(PARAMS[name], value, quoted) for name, value in values.items()}


def bias_of_ids(given: dict[str, Any], bundle: Bundle) -> list[str]:
    """Return OpenAI's form of logit_bias, {"7": -100}, in the table's, ["WORD=-100"]."""
    words = bundle.vocabulary.words
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < len(words)):
            raise ApiError(
                f"logit_bias has {quoted(token)}; the id of a token, below {len(words):,}, is expected, or in place of the "
                'object a list as ["the=-2.5"]',
                param="logit_bias",
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ApiError(f"logit_bias of {token} is {quoted(bias)}; a number is expected", param="logit_bias")
    return [f"{words[int(token)]}={bias}" for token, bias in given.items()]


def read_counts(given: dict[str, Any], values: dict[str, Any]) -> tuple[int, int]:
    """Return how many texts of a prompt are returned, and how many are generated."""
    row = PARAMS["n"]
    n = values.pop("n", 1)
    best_of = typed(dataclasses.replace(row, name="best_of"), given.get("best_of", n), quoted)
    assert row.bounds
    check("n", n, row.bounds)
    check("best_of", best_of, row.bounds)
    if best_of < n:
        raise ApiError(f"best_of is {best_of}, and n is {n}: the best n of so many texts are returned", param="best_of")
    return n, best_of


def spoken(stops: Sequence[str], bundle: Bundle) -> tuple[list[str], list[str]]:
    """Return the stops that have words, and a warning of the others: clients send line breaks to any model."""
    found = [stop for stop in stops if stop.strip() or not stop or bundle.tokenizer.tokenize(stop, continues=True)]
    others = [quoted(stop) for stop in stops if stop not in found]
    return found, [f"stop: not in the vocabulary, so never generated: {', '.join(others)}"] if others else []


def read_stream(given: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether the answer is streamed, and whether its last event has the usage."""
    stream, options = given.get("stream", False), given.get("stream_options", {})
    if not isinstance(stream, bool):
        raise ApiError(f"stream is {quoted(stream)}; true or false is expected", param="stream")
    if "stream_options" in given and not stream:
        raise ApiError("stream_options is given without stream", param="stream_options")
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise ApiError(f'stream_options is {quoted(options)}; as {{"include_usage": true}} is expected', param="stream_options")
    return stream, options.get("include_usage", False)
