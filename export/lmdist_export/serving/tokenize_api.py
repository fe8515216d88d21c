"""The tokenizer over HTTP, in the form of vLLM's server: lm-evaluation-harness needs no tokenizer of its own then.

    tokenized({"prompt": "We must"}, service)           # {"count": 2, "max_model_len": 20000, "tokens": [17, 105]}
    detokenized({"tokens": [17, 105]}, service)         # {"prompt": "We must"}
    INFO                                                # the marks

A text is tokenized as a whole, as lmdist-score does; an <eos> alone is that mark. This module knows no HTTP.

https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#tokenizer-api
"""

from __future__ import annotations

from typing import Any

from lmdist.text.vocabulary import END, END_ID, UNKNOWN
from lmdist_export.options import string_of
from lmdist_export.serving.json_body import quoted
from lmdist_export.serving.openai_request import ApiError, prompt_of_ids
from lmdist_export.serving.service import MAX_TOKENS, Service

EXAMPLE = '{"prompt": "We must"}'
EXAMPLE_OF_IDS = '{"tokens": [17, 105]}'
INFO = {"tokenizer_class": "lmdist", "eos_token": END, "unk_token": UNKNOWN}
"""No text begins with a mark that it does not end with, so there is no `bos_token`."""


def tokenized(given: dict[str, Any], service: Service) -> dict[str, Any]:
    """Return the ids of a text; raises UsageError where there is none, or one that is too long."""
    if "prompt" not in given:
        raise ApiError(f"no prompt is given; expected is {EXAMPLE}", param="prompt")
    text = string_of("prompt", given["prompt"], quoted=quoted)
    tokens = [END_ID] if text == END else service.prompts([text], continues=False)[0].ids
    found = {"count": len(tokens), "max_model_len": MAX_TOKENS, "tokens": tokens}
    words = service.bundle.vocabulary.words
    return found | ({"token_strs": [words[token] for token in tokens]} if given.get("return_token_strs") is True else {})


def detokenized(given: dict[str, Any], service: Service) -> dict[str, Any]:
    """Return the text of ids; raises UsageError for what are none of this vocabulary."""
    prompt = prompt_of_ids(given.get("tokens"), service, "tokens")
    return {"prompt": service.bundle.tokenizer.detokenize(prompt.tokens)}


ROUTES = {"/tokenize": (EXAMPLE, tokenized), "/detokenize": (EXAMPLE_OF_IDS, detokenized)}
"""What answers on each path, and an example of what it takes."""
