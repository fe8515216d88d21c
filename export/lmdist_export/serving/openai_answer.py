"""OpenAI's completions API: the form of its answers, and of the list of models.

    choice(asked, text, index, scores)                  # an element of `choices`, for a text that has ended
    writer_of(asked, text).write(tokens)                # the text of a stream, as it grows
    model_facts(bundle)                                 # what a page shows of the model

This module knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lmdist.text.vocabulary import UNKNOWN_ID
from lmdist_export.bundle import Bundle
from lmdist_export.options import PARAMS, Row, row_facts
from lmdist_export.sampling.generation import Text
from lmdist_export.sampling.log_probabilities import TokenScores
from lmdist_export.sampling.writing import Writer, taken_again
from lmdist_export.serving.openai_request import CompletionRequest
from lmdist_export.serving.service import MAX_LOGPROBS, MAX_REQUEST_BEAMS, MAX_TOKENS

FINISH_REASONS = {"exhausted": "stop"}
"""What OpenAI calls the ends of a text that it has other names for."""
LIMITS = {"max_new_tokens": MAX_TOKENS, "num_beams": MAX_REQUEST_BEAMS, "logprobs": MAX_LOGPROBS, "n": MAX_TOKENS}
"""What this server accepts at most, where it is less than the table's bounds."""
API_DEFAULTS = {"echo": False}
"""OpenAI's defaults, where they are not the table's."""
JSON_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}
MAX_SKIPPED = 20
"""Characters between two words of a text that the tokenizer has left out."""


# --- texts ---------------------------------------------------------------------------------------------------------


def writer_of(asked: CompletionRequest, text: Text) -> Writer:
    """Return what writes a text of a request behind its prompt."""
    prompt = asked.prompts[text.prompt_number]
    return Writer(prompt.written, taken_again(text, prompt.prompt))


def choice(asked: CompletionRequest, text: Text, index: int, scores: TokenScores | None) -> dict[str, Any]:
    """Return a text that has ended; its `scores` are those of the prompt's tokens too where it is echoed."""
    writer = writer_of(asked, text)
    pieces = writer.write(text.tokens)
    written = "".join([echoed(asked, text), *pieces, writer.end(text)])
    logprobs = logprobs_object(asked, text, pieces, scores) if scores else None
    return {"text": written, "index": index, "logprobs": logprobs, "finish_reason": finish_reason(text.finish_reason)}


def echoed(asked: CompletionRequest, text: Text) -> str:
    """Return what an answer has before a text: its prompt, or nothing."""
    return asked.prompts[text.prompt_number].text if asked.echo else ""


def finish_reason(reason: str) -> str | None:
    """Return why a text has ended, by OpenAI's names; None where it goes on."""
    return FINISH_REASONS.get(reason, reason) or None


def logprobs_object(asked: CompletionRequest, text: Text, pieces: Sequence[str], scores: TokenScores) -> dict[str, Any]:
    """Return the log-probabilities of a text's tokens in OpenAI's form, and as `unknown` which ones are read as `<unk>`.

    Not even the first is null: a text begins after the end of another. `text_offset` counts characters of the choice's text.
    """
    words = asked.bundle.vocabulary.words
    prompt, given, has_mark, before = asked.prompts[text.prompt_number]
    of_tokens, tops = scores
    tokens = [*(prompt.ids if asked.echo else []), *text.tokens]
    names = [*(prompt.tokens if asked.echo else []), *(words[token] for token in text.tokens)]
    has_pieces = asked.bundle.tokenizer.settings.has_pieces
    # Pieces write the text that was given, but for a model that normalizes or lowercases it first.
    in_text = [piece.lstrip(" ") for piece in before.pieces] if has_pieces else prompt.tokens
    is_given = has_pieces and given.startswith("".join(before.pieces))
    written = piece_offsets(before.pieces, 0) if is_given else word_offsets(given, in_text)
    end = len(given) if asked.echo else 0
    offsets = [*(written if asked.echo else []), *piece_offsets(pieces, end)]
    if len(of_tokens) > len(tokens):  # the end mark that ended the text, which is not in it
        mark = asked.resolved.config.eos_token_id
        tokens, names, offsets = [*tokens, mark], [*names, words[mark]], [*offsets, end + sum(map(len, pieces))]
    top_logprobs: list[dict[str, float] | None] = [
        {words[other]: value for other, value in top} | {words[token]: of_token}
        for token, of_token, top in zip(tokens, of_tokens, tops, strict=True)
    ]
    token_logprobs: list[float | None] = [*of_tokens]
    if asked.echo and has_mark:  # nothing is before it, so it has no log-probability
        mark = asked.resolved.config.bos_token_id
        tokens, names, offsets = [mark, *tokens], [words[mark], *names], [0, *offsets]
        token_logprobs, top_logprobs = [None, *token_logprobs], [None, *top_logprobs]
    return {
        "tokens": names,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": offsets,
        "unknown": [token == UNKNOWN_ID for token in tokens],
    }


def word_offsets(text: str, words: Sequence[str]) -> list[int]:
    """Return where each word of a text begins in it; one that is written in another way there, as a quote, where it is next."""
    offsets, end = [], 0
    lowered = text.lower() if len(text.lower()) == len(text) else text
    for word in words:
        while end < len(text) and text[end].isspace():
            end += 1
        until = end + len(word) + MAX_SKIPPED
        found = max(text.find(word, end, until), lowered.find(word, end, until))
        offsets.append(end if found < 0 else found)
        end = min(len(text), end + 1 if found < 0 else found + len(word))
    return offsets


def piece_offsets(pieces: Sequence[str], start: int) -> list[int]:
    """Return where each piece of a text begins in it, the space before it aside; the first one is written at `start`."""
    ends = accumulate(map(len, pieces), initial=start)
    return [end + len(piece) - len(piece.lstrip(" ")) for piece, end in zip(pieces, ends, strict=False)]


def usage(asked: CompletionRequest, texts: Sequence[Text]) -> dict[str, int]:
    """Return how many tokens were read, and generated."""
    prompt_tokens, completion_tokens = asked.prompt_tokens, sum(len(text.tokens) for text in texts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


# --- the model -----------------------------------------------------------------------------------------------------


def model_facts(bundle: Bundle) -> dict[str, Any]:
    """Return what a page shows of a model: its sizes, and the options of generation with their defaults and bounds."""
    sizes, settings = bundle.sizes, bundle.tokenizer.settings
    return {
        "vocabulary_size": sizes.vocabulary_size,
        "embedding_size": sizes.embedding_size,
        "layer_sizes": list(sizes.layer_sizes),
        "precision": sizes.precision,
        "parameters": bundle.manifest.get("parameters"),
        "tokenizer": settings.tokenizer,
        "tokens_have_spaces": settings.has_pieces or settings.tokenizer == "characters",
        "options": [option_facts(row, bundle) for row in PARAMS.values() if row.name != "cache_weight" or bundle.cache],
    }


def option_facts(row: Row, bundle: Bundle) -> dict[str, Any]:
    """Return an option as this API takes it; a bound that is infinite is null."""
    facts: dict[str, Any] = {"minimum": None, "maximum": None} | row_facts(row)
    default: Any = API_DEFAULTS.get(row.name, getattr(bundle.generation, row.name, row.default))
    if row.name == "temperature" and bundle.generation.greedy:
        default = 0.0
    if limit := LIMITS.get(row.name):
        facts["maximum"] = min(limit, facts["maximum"] or limit)
    return facts | {"type": JSON_TYPES.get(facts["type"], facts["type"]), "default": list(default) if row.is_list else default}
