"""The Python API: `lmdist.load("bundles/news")` returns a model, which takes and returns strings.

    import lmdist

    model = lmdist.load("bundles/news")
    model.generate("The president said", max_new_tokens=40, seed=7).text
    model.score("we said it.").log_probability
    model.next_words("the people of the united", k=5)

Options, defaults, seeds and texts are those of lmdist-generate, lmdist-score and the server. docs/python.md has more. All
`tokens` are strings here, and numbers are `ids`. Below it, for those who need ids and states of many texts, are `model.bundle`
and `model.sampler`, which knows ids alone. Neither numpy nor onnxruntime is
imported before a model is loaded, and torch never.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from lmdist.bounds import at_least, check
from lmdist.errors import UsageError
from lmdist_export.options import BATCH_SIZES, Options, check_count, items_of, string_of, strings_of
from lmdist_export.registered import load_bundle
from lmdist_export.sampling.completion import Completion, Stream, completions
from lmdist_export.sampling.resolved_options import resolve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.prompt import Prompt
    from lmdist_export.sampling.sampler import Sampler
    from lmdist_export.sampling.scoring import Score, Scorer

    Strings = list[str] | tuple[str, ...]
    Prompts = list[str] | list[Prompt] | list[str | Prompt] | tuple[str | Prompt, ...]

BUNDLE = "a folder written by lmdist-export; or in MLflow models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/PATH"
"""What `load` takes, in the words of the commands' help."""
PERPLEXITIES = {"token": "perplexity", "word": "perplexity_per_word", "byte": "perplexity_per_byte"}
"""The figure of `Totals` for each unit."""


class GenerationOptions(TypedDict, total=False):
    """The options of generation but `n`, by their names in options.py, whose defaults are the bundle's."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    cache_weight: float | None
    no_repeat_ngram_size: int | None
    num_beams: int | None
    length_penalty: float | None
    seed: int | None
    logprobs: int | None
    stop: str | Sequence[str] | None
    bad_words: str | Sequence[str] | None
    logit_bias: str | Sequence[str] | None
    ignore_eos: bool | None
    allow_unk: bool | None
    echo: bool | None


def load(bundle: str | os.PathLike[str], *, provider: Literal["cpu", "cuda"] = "cpu", threads: int = 0) -> Model:
    """Load a bundle: the folder that lmdist-export wrote, or its address in MLflow.

        model = lmdist.load("bundles/news")
        model = lmdist.load("models:/news@champion")     # or models:/news/3, runs:/RUN_ID/news

    All files are checked against their sha256. MLflow is the one of MLFLOW_TRACKING_URI, else `mlflow.db` in the directory.
    What was loaded is in memory: the folder may be replaced or removed, and what was downloaded is.

    `provider` is "cpu" or "cuda". `threads` is the number of CPU threads; 0 takes the available CPUs, at most 4.

    Raises MissingInputError where there is no such bundle, DataError where it is damaged, UsageError for a provider that does
    not run here or a package that is not installed, and Stopped where MLflow cannot be reached. (All are in lmdist.errors; the
    first is a FileNotFoundError too, the next two are ValueErrors.)
    """
    from lmdist_export.sampling.sampler import Sampler

    name = os.fspath(bundle)
    return Model(name, Sampler(load_bundle(name), provider, threads))


class Model:
    """A bundle that generates and scores text, from as many threads as you like."""

    def __init__(self, name: str, sampler: Sampler) -> None:
        self.name = name
        self.sampler = sampler
        """Reads tokens, scores them and samples new ones: ids and states of many texts at a time."""

    @property
    def bundle(self) -> Bundle:
        """Return what the bundle's files say: vocabulary, tokenizer, sizes, the options that it generates with."""
        return self.sampler.bundle

    def __repr__(self) -> str:
        sizes = self.bundle.sizes
        layers = "-".join(map(str, sizes.layer_sizes))
        return (
            f"<lmdist model {self.name}: LSTM {layers}, embedding {sizes.embedding_size}, "
            f"vocabulary {sizes.vocabulary_size:,}, {sizes.precision}, on {self.sampler.runtime.provider}>"
        )

    # --- generating

    @overload
    def generate(
        self, prompt: str | Prompt = "", *, batch_size: int = 16, **options: Unpack[GenerationOptions]
    ) -> Completion: ...

    @overload
    def generate(self, prompt: Prompts, *, batch_size: int = 16, **options: Unpack[GenerationOptions]) -> list[Completion]: ...

    @overload
    def generate(
        self, prompt: str | Prompt = "", *, n: int, batch_size: int = 16, **options: Unpack[GenerationOptions]
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompt: Prompts, *, n: int, batch_size: int = 16, **options: Unpack[GenerationOptions]
    ) -> list[list[Completion]]: ...

    def generate(
        self, prompt: str | Prompt | Prompts = "", *, n: int | None = None, batch_size: int = 16, **options: Any
    ) -> Any:
        """Return the text that continues a prompt: a `Completion`, with the text as `.text`.

            model.generate("The president said", temperature=0.8, seed=7).text
            model.generate(["We must", "They said"])            # a list for a list
            model.generate("We must", n=3)                      # with n a list of n in place of a text
            model.generate("We must", num_beams=4, n=2)         # beam search: the most likely texts

        A prompt is a string, or what `read` has returned; without one it is the beginning of a text. The options are those of
        docs/sampling.md, by the same names; what is not given is as in the bundle's generation_config.json. The same seed gives
        the same text, whatever else is in the batch. `batch_size` texts are generated at a time.

        Raises UsageError for an option that does not exist or excludes another, or a value out of its bounds.
        """
        several = isinstance(prompt, list | tuple)
        found = self.completions(prompt if several else [prompt], n=n, batch_size=batch_size, **options)
        by_prompt = [list(texts) for _, texts in groupby(found, key=lambda text: text.prompt_number)]
        result = by_prompt if n is not None else [text for (text,) in by_prompt]
        return result if several else result[0]

    def completions(
        self,
        prompts: Iterable[str | Prompt],
        *,
        n: int | None = None,
        batch_size: int = 16,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Completion]:
        """Return an iterator over the texts of `generate`, for prompts that are too many for a list.

        Prompts are read when it is their turn. Each text comes as soon as those before it are there; those of one prompt come
        one after the other. Raises UsageError as `generate`, and for one string, whose letters would be taken for prompts.
        """
        resolved = resolve(Options.from_keywords({"n": n, **options}), self.bundle)
        check_count("batch_size", batch_size, BATCH_SIZES)
        return completions(self.sampler, map(self.prompt, items_of("the prompts", prompts)), resolved, batch_size)

    def stream(self, prompt: str | Prompt = "", **options: Unpack[GenerationOptions]) -> Stream:
        """Return an iterator over the pieces of a text, each word as soon as it is generated.

            stream = model.stream("The president said", seed=7)
            for piece in stream:
                print(piece, end="", flush=True)
            stream.completion.finish_reason

        Together the pieces are the text of `generate` with the same options. Raises UsageError as `generate` does, and for a
        beam search, which has no text before its end.
        """
        resolved = resolve(Options.from_keywords(options), self.bundle, stream=True)
        return Stream(self.sampler, self.prompt(prompt), resolved)

    # --- prompts

    def prompt(self, text: str | Prompt) -> Prompt:
        """Return a text as a prompt of which nothing was read: its `tokens`, their `ids`, and which are the `unknown_words`."""
        from lmdist_export.sampling.prompt import Prompt, model_id, prompt_of

        if isinstance(text, Prompt):
            if text.model != model_id(self.bundle):
                raise UsageError(f"the prompt was read by another model than {self.name}: read its text by this one")
            return text
        return prompt_of(self.bundle, string_of("the prompt", text))

    def read(self, text: str | Prompt | Completion, after: Prompt | None = None) -> Prompt:
        """Read a text once, and return the state after it as a prompt for `generate`, `stream` and `next_words`.

            state = model.read("The president said")
            model.generate(state.fork(4), seed=7)               # the texts of generate("The president said", n=4, seed=7)
            state = model.read(" that we must", after=state)    # reads on
            state.save("said.npz")                              # model.load_prompt("said.npz") continues in another process
            state = model.read(model.generate(state, seed=1))   # the state after a generated text

        Its size does not grow with the text, unless the options of the bundle use the neural cache. `fork` returns as many
        prompts as one likes that share it; with one seed each gives a text of its own.
        """
        from lmdist_export.sampling.prompt import prompt_of, prompt_of_words, read

        if isinstance(text, Completion):
            before = self.prompt(after or text.prompt)
            return read(self.sampler, prompt_of_words(self.bundle, text.tokens), before if text.follows_all else before.open())
        before = self.prompt(after) if after else None
        if isinstance(text, str):
            return read(self.sampler, prompt_of(self.bundle, text, before), before and before.open())
        return read(self.sampler, self.prompt(text), before)

    def load_prompt(self, path: str | os.PathLike[str]) -> Prompt:
        """Return what `Prompt.save` wrote; raises MissingInputError, DataError, or UsageError for that of another model."""
        from lmdist_export.sampling.prompt import load

        return load(self.sampler, Path(path))

    # --- scoring

    def scorer(
        self, *, end: bool = True, carry_state: bool = False, cache: bool = False, batch_size: int | None = None
    ) -> Scorer:
        """Return what scores lines as they come, in constant memory: `for score in model.scorer().score(lines)`.

        With `end` the `<eos>` that ends a text is scored too. `carry_state` reads all texts as one, as lmdist-evaluate does.
        `cache` mixes in the neural cache that was tuned for the model. `batch_size` texts are scored at a time, by default 256.
        """
        from lmdist_export.sampling.scoring import BATCH_SIZE, Scorer

        return Scorer(
            self.sampler,
            end=end,
            carry_state=carry_state,
            batch_size=BATCH_SIZE if batch_size is None else batch_size,
            cache=self.sampler.cache if cache else None,
        )

    @overload
    def score(self, text: str, *, end: bool = True, carry_state: bool = False, cache: bool = False) -> Score: ...

    @overload
    def score(self, text: Strings, *, end: bool = True, carry_state: bool = False, cache: bool = False) -> list[Score]: ...

    def score(self, text: str | Strings, *, end: bool = True, carry_state: bool = False, cache: bool = False) -> Any:
        """Return how likely a text is, as a `Score`; a list for a list.

            score = model.score("we said it.")
            score.log_probability                               # nats, of all tokens and of the <eos> that ends the text
            score.perplexity, score.tokens, score.unknown       # (T,) booleans: which tokens the vocabulary does not have
            score.perplexity_per_word, score.bits_per_byte      # of the original text: these compare between tokenizers
            for token, log_probability, unknown in score.per_token: ...

        The text begins after an end mark, as the training text did. See `scorer` for `end`, `carry_state` and `cache`.
        """
        scores = list(self.scorer(end=end, carry_state=carry_state, cache=cache).score(texts_of(text)))
        return scores[0] if isinstance(text, str) else scores

    def perplexity(
        self,
        text: str | Strings,
        *,
        per: Literal["token", "word", "byte"] = "token",
        end: bool = True,
        carry_state: bool = False,
        cache: bool = False,
    ) -> float:
        """Return the perplexity of a text, or of all texts of a list together; raises DataError without any token.

        Models of different tokenizers compare `per` "word" of the original text, whose words are between whitespace, and per
        "byte" of it in UTF-8 (log2 of that is bits per byte); the end of a text counts as one.
        NaN where a text has no words, and infinite where the figure is beyond a float.
        """
        from lmdist_export.sampling.scoring import Totals

        check("per", per, tuple(PERPLEXITIES))
        totals = Totals()
        for score in self.scorer(end=end, carry_state=carry_state, cache=cache).score(texts_of(text)):
            totals.add(score)
        found = totals.figures()[PERPLEXITIES[per]]
        if found is None:  # as JSON has what is no number
            return math.inf if per == "word" and totals.original_words else math.nan
        return found

    def next_words(self, prompt: str | Prompt, k: int = 5, *, cache: bool = False) -> list[tuple[str, float]]:
        """Return the `k` most likely words after a prompt, never `<unk>`, each with its probability, the most likely first.

        `<eos>` is the end of the text. The probabilities are the model's own, whatever generation_config.json says.
        """
        check_count("k", k, at_least(1))
        return self.scorer(cache=cache).next_words(self.prompt(prompt), k)

    def vector(self, word: str) -> NDArray[np.float32]:
        """Return the embedding of a word, (E,) in fp32; raises UsageError for a word that the vocabulary does not have.

        That of an int8 or int4 bundle is what the model reads, rounded to 8 bits.
        """
        given, ids = string_of("the word", word), self.bundle.vocabulary.ids
        spellings = [[given]] if given in ids else self.bundle.tokenizer.spellings(given)[::-1]
        found = next((words[0] for words in spellings if len(words) == 1 and words[0] in ids), None)
        if found is None:
            hint = f"; {given.lower()!r} is" if given.lower() in ids else ""
            raise UsageError(f"{reprlib.repr(given)} is no word of the vocabulary{hint}")
        return self.sampler.embeddings([ids[found]])[0]


def texts_of(text: str | Strings) -> list[str]:
    """Return one text, or several, as a list; raises UsageError for anything else."""
    return strings_of("text", text) if isinstance(text, list | tuple) else [string_of("the text", text)]
