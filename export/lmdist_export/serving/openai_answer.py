"""OpenAI's completions API: the form of its answers, and of the list of models.

    choice(asked, text, index, scores)                  # an element of `choices`, for a text that has ended
    Writer(bundle, prompt, given).write(tokens)         # the text of a stream, as it grows
    model_facts(bundle)                                 # what a page shows of the model

This module knows no HTTP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from lmdist.text.vocabulary import UNKNOWN_ID
from lmdist_export.bundle import Bundle
from lmdist_export.options import PARAMS, Row, row_facts
from lmdist_export.sampling.completion import after_text, rest_of, taken_again
from lmdist_export.sampling.generation import Text
from lmdist_export.sampling.log_probabilities import TokenScores
from lmdist_export.sampling.prompt import Prompt
from lmdist_export.serving.openai_request import CompletionRequest, WrittenPrompt
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


class Writer:
    """Writes the words of a text as they come: the prompt and what follows it read as one text.

    The first piece has the space that separates it from the prompt, unless the prompt, as it was given, ends with one.
    """

    def __init__(
        self, bundle: Bundle, prompt: Prompt, given: str, written: WrittenPrompt | None = None, again: Sequence[int] = ()
    ) -> None:
        """Go on from a prompt as it was `given`; `written` it is shared by all its texts. `again` is that of `taken_again`."""
        written = written or WrittenPrompt(bundle, prompt)
        self.words: deque[str | bytes] = deque()
        self.vocabulary = bundle.vocabulary.words
        self.before = written.pieces
        has_pieces = bundle.tokenizer.settings.has_pieces  # whose texts have the spaces that they need
        glued = prompt.space if has_pieces else not given or given[-1].isspace()
        in_text = prompt.seam.given if prompt.seam else " " if glued else ""
        self.pieces = after_text(bundle.tokenizer.pieces(self.coming(), written.place.copy()), in_text)
        self.write(again)

    def coming(self) -> Iterator[str | bytes]:
        """Yield the words that wait."""
        while self.words:
            yield self.words.popleft()

    def write(self, tokens: Sequence[int]) -> list[str]:
        """Return the pieces of the next tokens."""
        pieces = []
        for token in tokens:
            self.words.append(self.vocabulary[token])
            pieces.append(next(self.pieces))
        return pieces

    def end(self, text: Text) -> str:
        """Return the end of a text that is no token: what is left of a character, or of a piece before a stop."""
        self.words.extend(rest_of(text))
        return "".join(self.pieces)


def writer_of(asked: CompletionRequest, text: Text) -> Writer:
    """Return what writes a text of a request behind its prompt."""
    number = text.prompt_number
    prompt = asked.prompts[number]
    return Writer(asked.bundle, prompt, asked.given[number], asked.written[number], taken_again(text, prompt))


def choice(asked: CompletionRequest, text: Text, index: int, scores: TokenScores | None) -> dict[str, Any]:
    """Return a text that has ended; its `scores` are those of the prompt's tokens too where it is echoed."""
    writer = writer_of(asked, text)
    pieces = writer.write(text.tokens)
    echoed = asked.given[text.prompt_number] if asked.echo else ""
    written = "".join([echoed, *pieces, writer.end(text)])
    logprobs = logprobs_object(asked, text, writer.before, pieces, scores) if scores else None
    return {"text": written, "index": index, "logprobs": logprobs, "finish_reason": finish_reason(text.finish_reason)}


def finish_reason(reason: str) -> str | None:
    """Return why a text has ended, by OpenAI's names; None where it goes on."""
    return FINISH_REASONS.get(reason, reason) or None


def logprobs_object(
    asked: CompletionRequest, text: Text, before: Sequence[str], pieces: Sequence[str], scores: TokenScores
) -> dict[str, Any]:
    """Return the log-probabilities of a text's tokens in OpenAI's form, and as `unknown` which ones are read as `<unk>`.

    Not even the first is null: a text begins after the end of another. `text_offset` counts characters of the choice's text.
    """
    words = asked.bundle.vocabulary.words
    prompt, given = asked.prompts[text.prompt_number], asked.given[text.prompt_number]
    of_tokens, tops = scores
    tokens = [*(prompt.ids if asked.echo else []), *text.tokens]
    names = [*(prompt.tokens if asked.echo else []), *(words[token] for token in text.tokens)]
    has_pieces = asked.bundle.tokenizer.settings.has_pieces
    # Pieces write the text that was given, but for a model that normalizes or lowercases it first.
    in_text = [piece.lstrip(" ") for piece in before] if has_pieces else prompt.tokens
    is_given = has_pieces and given.startswith("".join(before))
    written = piece_offsets(before, 0) if is_given else word_offsets(given, in_text)
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
    if asked.echo and asked.marked[text.prompt_number]:  # nothing is before it, so it has no log-probability
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
    prompt_tokens, completion_tokens = (
        sum(len(prompt.ids) for prompt in asked.prompts),
        sum(len(text.tokens) for text in texts),
    )
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
