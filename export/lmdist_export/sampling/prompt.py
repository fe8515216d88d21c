"""A prompt: the tokens of a text that is to be continued, their ids, and the state of a model that has read them.

    prompt = prompt_of(bundle, "The president said")        # tokens and ids
    prompt = read(sampler, prompt)                          # read once,
    first, second = prompt.fork(2)                          # continued as often as one likes,
    prompt.save("said.npz")                                 # in another process too

This module does not know how a text is continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lmdist.bounds import at_least
from lmdist.errors import CONTROLS, DataError, UsageError
from lmdist.storage.schema import check_schema
from lmdist.text.vocabulary import UNKNOWN, UNKNOWN_ID
from lmdist_export.bundle import WEIGHTS, Bundle
from lmdist_export.graph.cell import STATE
from lmdist_export.options import check_count
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.seams import ANYTHING, Begin, Seam, seam_of
from lmdist_export.sampling.state import PARTS, State


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text that is to be continued."""

    tokens: list[str]
    """As tokenized, those that the vocabulary does not have included."""
    ids: list[int] = field(repr=False)
    """Of the tokens."""
    model: str = field(repr=False)
    """The sha256 of the weights of the model whose ids, and whose state, these are."""
    state: State | None = field(default=None, repr=False)
    """The state of one text whose last token is still to be read; None where nothing was read yet."""
    number: int = 0
    """The number of the text among those that were forked: a part of the seed of its random numbers."""
    space: bool = False
    """Whether the text ended with a space that no token has yet: the first piece of the next word brings it along."""
    seam: Seam | None = field(default=None, repr=False)
    """How a text goes on that has pieces of words; None where it follows the tokens as they are."""

    @cached_property
    def unknown_words(self) -> list[str]:
        """Return the words that are not in the vocabulary and are read as `<unk>`, each once."""
        pairs = zip(self.tokens, self.ids, strict=True)
        return list(dict.fromkeys(token for token, token_id in pairs if token_id == UNKNOWN_ID and token != UNKNOWN))

    def numbers(self, n: int) -> range:
        """Return the numbers of `n` texts that continue this one; those of other forks are others."""
        return range(self.number * n, (self.number + 1) * n)

    def fork(self, n: int) -> list[Prompt]:
        """Return `n` prompts that share what was read: with one seed their texts are those of `generate(prompt, n=n)`."""
        check_count("n", n, at_least(1))
        return [replace(self, number=number) for number in self.numbers(n)]

    @property
    def begin(self) -> Begin:
        """Return what its texts begin with."""
        return self.seam.begin if self.seam else ANYTHING

    @property
    def num_kept(self) -> int:
        """Return how many of its tokens its seam does not take back."""
        return len(self.tokens) - (self.seam.removed if self.seam else 0)

    def open(self) -> Prompt:
        """Return the prompt without the tokens that its seam takes back."""
        if self.seam is None or not self.seam.removed:
            return self
        kept, state = self.num_kept, self.state
        if state is not None:
            left = state.tokens[:, : -self.seam.removed]
            state = replace(state, tokens=left, lengths=np.array([left.size], np.int64))
        return replace(self, tokens=self.tokens[:kept], ids=self.ids[:kept], state=state, seam=None)

    def start(self, sampler: Sampler, first: int, *, cached: bool) -> State:
        """Return the state to continue from, where nothing was read that of a text before its `first` token.

        A `cached` one has the memory that a neural cache needs: a prompt that was read without it is read again.
        """
        if self.state is None or (cached and len(self.state.model) < len(PARTS)):
            return sampler.start([[first, *self.ids]], cached=cached)
        return self.state if cached else replace(self.state, model=self.state.model[: len(STATE)])

    def save(self, path: str | Path) -> None:
        """Write words and state to a file (NumPy's .npz, nothing pickled), atomically; `Model.load_prompt` reads it.

        Raise UsageError for a prompt that was not read.
        """
        if self.state is None:
            raise UsageError("nothing of this prompt was read, so it has no state to save: model.read(prompt) reads it")
        space = {"space": True} if self.space else {}
        self.state.save(path, {"words": self.tokens, "number": self.number, "model": self.model, **space})


def prompt_of(bundle: Bundle, text: str, after: Prompt | None = None) -> Prompt:
    """Return a text as a prompt, of which nothing was read; it may be one that comes `after` another one."""
    if after is not None and after.seam:
        model = bundle.tokenizer.model
        text = after.seam.given + text
        text = text.removeprefix(" ") if model and model.adds_space else text
    words = bundle.tokenizer.tokenize(text, continues=True) if text else []  # NLTK is slow to import
    space = text.endswith(" ") and bundle.tokenizer.settings.has_pieces
    return with_seam(bundle, replace(prompt_of_words(bundle, words), space=space))


def with_seam(bundle: Bundle, prompt: Prompt) -> Prompt:
    """Return a prompt that is continued where a piece of a word may go on."""
    return replace(prompt, seam=seam_of(bundle.tokenizer, prompt.tokens, prompt.ids, space=prompt.space))


def prompt_of_words(bundle: Bundle, words: Sequence[str]) -> Prompt:
    """Return words as a prompt, of which nothing was read."""
    return Prompt(list(words), bundle.vocabulary.encode(words), model_id(bundle))


def read(sampler: Sampler, prompt: Prompt, after: Prompt | None = None) -> Prompt:
    """Return a prompt that was read, up to its last token; one that was read before is continued where it stands `after` it.

    The token that a seam takes back is not read either. It has the memory of a neural cache where the options of the bundle use
    one.
    """
    config = sampler.bundle.generation
    cached = config.cache_weight > 0
    if after is not None:
        before = after.start(sampler, config.bos_token_id, cached=cached)
        tokens, ids = [*after.tokens, *prompt.tokens], [*after.ids, *prompt.ids]
        state = appended(before, prompt.ids)
        joined = replace(after, tokens=tokens, ids=ids, state=state, space=prompt.space, seam=None)
        # Of all tokens: at the beginning of a text a piece may be written without its space.
        prompt = with_seam(sampler.bundle, joined) if prompt.seam else joined
    opened = prompt.open()
    state = sampler.prefill(opened.start(sampler, config.bos_token_id, cached=cached), config)
    return replace(prompt, state=appended(state, prompt.ids[len(opened.ids) :]))


def appended(state: State, tokens: Sequence[int]) -> State:
    """Return the state of one text with more tokens to read."""
    ids = np.array([[*state.tokens[0].tolist(), *tokens]], np.int64)  # (1, P)
    return replace(state, tokens=ids, lengths=np.array([ids.size], np.int64))


def load(sampler: Sampler, path: str | Path) -> Prompt:
    """Read what `Prompt.save` wrote; raises MissingInputError, DataError, or UsageError for the state of another model."""
    state, notes = State.load_with_notes(path)
    check_schema(notes, {"words": list[str], "number": int, "model": str}, Path(path))
    if notes["model"] != model_id(sampler.bundle):
        raise UsageError(f"{path} was saved by another model than {sampler.bundle.name}: read its text by this one")
    sampler.check_state(state)
    if len(state) != 1 or notes["number"] < 0 or CONTROLS.search("".join(notes["words"])):  # a terminal would act on them
        raise DataError(f"{path} is not the state of one text written by Prompt.save, or its words have control characters")
    prompt = prompt_of_words(sampler.bundle, notes["words"])
    prompt = replace(prompt, state=state, number=notes["number"], space=notes.get("space") is True)
    return with_seam(sampler.bundle, prompt) if prompt.space or state.tokens.size > 1 else prompt


def model_id(bundle: Bundle) -> str:
    """Return the sha256 of a bundle's weights, which decide what a state means."""
    return bundle.manifest.get("files", {}).get(WEIGHTS, {}).get("sha256", "")
