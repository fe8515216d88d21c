"""A bundle that answers requests: its sampler, the batching thread, and what one request may ask for.

    service = Service(sampler)
    prompts, resolved = service.resolve(service.prompts(["We must"]), options)
    request = service.request(prompts, resolved)
    texts = service.batcher.generate(request, timeout_seconds=60)

Both servers share it: mlflow_model.py, which `mlflow models serve` loads, and application.py in lmdist-serve. The limits keep
one request from holding up the others. This module knows neither HTTP nor MLflow.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lmdist.errors import UsageError
from lmdist_export.options import Options
from lmdist_export.sampling.generation import BATCH_SIZE, Text
from lmdist_export.sampling.prompt import Prompt, prompt_of, prompt_of_words
from lmdist_export.sampling.resolved_options import ResolvedOptions, resolve, warning_of_prompt
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving.batching import Batcher, Request
from lmdist_export.serving.json_body import strings_of
from lmdist_export.serving.running import wake_loops

MAX_TOKENS = 20_000
"""Read and generated for one request: no other waits long for its prompt, and it ends within the server's timeout."""
MAX_CHARACTERS = 10 * MAX_TOKENS
"""Of the prompts together: a megabyte of punctuation is tokenized for six seconds before its tokens can be counted."""
MAX_REPEATED_CHARACTERS = 10 * MAX_CHARACTERS
"""Of the prompts and their warnings in all texts of an answer, which is in memory several times."""
FIRST_PROMPT = "Mr. Smith (No. 7) said: ``It's A.M. -- isn't it?'' Yes. No"
"""It has words as NLTK alone finds them."""
MAX_KNOWN = 256
"""Options that are remembered as resolved."""
MAX_REQUEST_BEAMS = 64
MAX_LOGPROBS = 20
MAX_PHRASES = 1_000
"""Stops, bad words and logit biases."""
MAX_PHRASE_CHARACTERS = MAX_TOKENS
"""Of the stops and bad words together: a text is compared with them after each of its tokens."""


class Service:
    """A bundle that answers requests."""

    def __init__(self, sampler: Sampler, batch_size: int = BATCH_SIZE) -> None:
        self.sampler = sampler
        self.bundle = sampler.bundle
        self.batcher = Batcher(sampler, batch_size, after_reports=wake_loops)
        self.known: dict[tuple[Hashable, ...], ResolvedOptions] = {}
        """Options of requests, by all of them but the seed."""
        weakref.finalize(self, close, self.batcher).atexit = False

    def warm_up(self, timeout_seconds: float) -> None:
        """Generate a token and meanwhile read a prompt, so that a server is ready when it says so."""
        first = Options.from_values({"max_new_tokens": 1, "min_new_tokens": 0})
        with ThreadPoolExecutor(1, "first reader") as reader:
            reading = reader.submit(self.prompts, [FIRST_PROMPT])
            self.batcher.generate(self.request(*self.resolve(self.prompts([""]), first)), timeout_seconds)
            reading.result()

    def prompts(self, texts: Sequence[str], *, continues: bool = True) -> list[Prompt]:
        """Return texts as prompts, of which nothing was read; raises UsageError for more than one request may have.

        Where they do not `continue`, as texts that are scored, their words are those of whole documents.
        """
        check_limit("the number of prompts", len(texts), MAX_TOKENS)
        check_limit("the number of characters in prompts", sum(map(len, texts)), MAX_CHARACTERS)
        if continues:
            return [prompt_of(self.bundle, text) for text in texts]
        return [prompt_of_words(self.bundle, self.bundle.tokenizer.tokenize(text) if text else []) for text in texts]

    def resolve(
        self,
        prompts: Sequence[Prompt],
        options: Options,
        *,
        limit_name: str = "max_new_tokens",
        echo: bool | None = None,
    ) -> tuple[list[Prompt], ResolvedOptions]:
        """Return prompts as they are asked to be continued, and options, resolved.

        Raise UsageError where a request is too large or its options exclude each other.

        `limit_name` is what the caller calls max_new_tokens, and `echo` whether its texts begin with their prompts, where the
        options do not say it.
        """
        if not prompts:
            raise UsageError("no prompt is given; an empty one is the beginning of a text")
        phrases = {name: strings_of(name, getattr(options, name)) for name in ("stop", "bad_words", "logit_bias")}
        check_limit(f"the number of {', '.join(phrases)} together", sum(map(len, phrases.values())), MAX_PHRASES)
        characters = sum(len(phrase) for name in ("stop", "bad_words") for phrase in phrases[name])
        check_limit("the number of characters in stop, bad_words together", characters, MAX_PHRASE_CHARACTERS)
        check_limit("logprobs", options.logprobs or 0, MAX_LOGPROBS)
        resolved = self.resolved(options)
        config = resolved.config
        check_limit("num_beams", config.num_beams, MAX_REQUEST_BEAMS)
        texts = max(options.n, config.num_beams)
        tokens = sum(len(prompt.ids) + texts * config.max_new_tokens for prompt in prompts)
        check_limit(f"the number of tokens in prompts, and {limit_name} for each text or beam, together", tokens, MAX_TOKENS)
        self.check_repeated(prompts, options.n, echo=options.echo if echo is None else echo)
        return [*map(resolved.asked, prompts)], resolved

    def resolved(self, options: Options) -> ResolvedOptions:
        """Return options, resolved for the bundle: most requests have those of one before, but for the seed."""
        if options.stop or options.bad_words or options.logit_bias:  # which may be large
            return resolve(options, self.bundle)
        own = options.n, options.logprobs, options.ignore_eos, options.allow_unk, options.echo, options.as_flags
        key = (*options.given.items(), options.seed is None, *own)
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            found = self.known[key] = resolve(options, self.bundle)
        seed = secrets.randbelow(2**32) if options.seed is None else options.seed
        return replace(found, options=options, seed=None if found.seed is None else seed)

    def check_repeated(self, prompts: Sequence[Prompt], n: int, *, echo: bool) -> None:
        """Raise UsageError where `n` texts of each prompt repeat it, or what it is warned of, too often for an answer."""
        warned = sum(len(warning_of_prompt(prompt, self.bundle)) for prompt in prompts)
        echoed = sum(len(word) for prompt in prompts for word in prompt.tokens) if echo else 0
        name = "the number of characters in prompts and their warnings, repeated with each text, together"
        check_limit(name, n * (warned + echoed), MAX_REPEATED_CHARACTERS)

    def request(
        self,
        prompts: Sequence[Prompt],
        resolved: ResolvedOptions,
        *,
        logprobs: int | None = None,
        on_growth: Callable[[Text, list[int]], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> Request:
        """Return a request, of what `resolve` returns, in ids; with the rest as batching.Request takes it."""
        how = resolved.options
        ids, begins = [prompt.open().ids for prompt in prompts], [prompt.begin for prompt in prompts]
        settings = resolved.config, resolved.seed or 0, how.n, resolved.stops, how.ignore_eos
        return Request(self.sampler, ids, *settings, logprobs, on_growth, on_end, begins)


def close(batcher: Batcher) -> None:
    """End a batching thread once its work has ended, without waiting for that; its service is garbage."""
    threading.Thread(target=batcher.close, name="closing", daemon=True).start()


def check_limit(name: str, value: int, limit: int) -> None:
    """Raise UsageError where a request asks for more than the server accepts."""
    if value > limit:
        raise UsageError(f"{name} is {value:,}; this server accepts at most {limit:,}")
