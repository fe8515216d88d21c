"""The bundle: a folder that is enough by itself to make and to score text, on a machine without torch.

    bundle/
        model.onnx              the step graph: words and state in, logits and state out
        generate.onnx           the generation graph: prompts in, words out
        weights.bin             the weights of both
        vocab.txt  text.json    how words become ids, and text becomes words
        tokenizer.json          the same for Hugging Face's tokenizers, where its format can say it; not read here
        generation_config.json  how text is made where a command does not say; yours to edit
        manifest.json           sizes, precision and what it costs, origin, and a sha256 for each file above but the last

This module reads and describes the folder; export.py writes it. It imports neither onnx nor onnxruntime, so a broken bundle
is known within milliseconds. docs/bundle.md is the description for others.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.storage.checksums import FileFacts, verify_checksums
from lmdist.storage.reading import check_folder, file_size, read_json
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID, Vocabulary
from lmdist_export import PRECISIONS
from lmdist_export.graph.sizes import ALIGNMENT, Sizes, file_length

FORMAT = "lmdist bundle"
VERSION = 2
PROVIDERS = ("cpu", "cuda")

MODEL = "model.onnx"
GENERATION = "generate.onnx"
WEIGHTS = "weights.bin"
GENERATION_CONFIG = "generation_config.json"
SUMMED = (MODEL, GENERATION, WEIGHTS, "vocab.txt", "text.json")  # what a bundle cannot be without, and nobody changes
MOST_NEW_TOKENS = 1_000_000  # a file may ask for so many; a person may ask for more
MOST_BEAMS = 1_000
MOST_ADDED = 1_000_000  # to a logit, or times it: beyond that fp32 has no numbers for what comes of it


@dataclass(frozen=True)
class GenerationConfig:
    """How text is made where the command does not say; the names are those of Hugging Face, or of the OpenAI API."""

    bos_token_id: int = END_ID
    """The word before the first: a text begins where another ended."""
    eos_token_id: int = END_ID
    """The word that ends a text."""
    do_sample: bool = True
    """false: always the likeliest word, as with temperature 0."""
    temperature: float = 1.0
    """Below 1 likely words become likelier, above 1 rare ones do; 0 is always the likeliest."""
    top_k: int = 0
    """Draw from the k likeliest words; 0 is from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest words that together have this probability; 1 is from all."""
    min_p: float = 0.0
    """Draw from words with at least this part of the likeliest one's probability; 0 is from all."""
    typical_p: float = 1.0
    """Draw from the fewest words that together have this probability, those first whose surprise is nearest to the mean."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of words that the text or its prompt has, and multiplies the others; 1 is none."""
    presence_penalty: float = 0.0
    """Taken from the logit of a word that the text has, its prompt aside."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a word for each time that the text has it, its prompt aside."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many words comes twice, its prompt included; 0 is any."""
    min_new_tokens: int = 0
    """Words after the prompt, at least: before them the text does not end."""
    max_new_tokens: int = 200
    """Words after the prompt, at most."""
    num_beams: int = 1
    """Search for the likeliest text, with so many kept at a time; 1 is no search."""
    length_penalty: float = 1.0
    """A text found by search scores its log-probability over its length to this power: above 1 is for longer ones."""
    suppress_tokens: tuple[int, ...] = (UNKNOWN_ID,)
    """Words that are never drawn."""
    bad_words_ids: tuple[list[int], ...] = ()
    """Sequences of words that never come."""
    sequence_bias: tuple[tuple[list[int], float], ...] = ()
    """Words, each in a list of its own, and what is added to their logits."""

    def __post_init__(self) -> None:
        def expect(name: str, right: bool, expected: str) -> None:
            if not right:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {expected}")

        expect("temperature", 0 <= self.temperature < math.inf, "0 (always the likeliest word) or above")
        expect("top_k", self.top_k >= 0, "0 (all words) or above")
        expect("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all words)")
        expect("min_p", 0 <= self.min_p <= 1, "from 0 (all words) to 1")
        expect("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1 (all words)")
        expect(
            "repetition_penalty",
            1 / MOST_ADDED <= self.repetition_penalty <= MOST_ADDED,
            f"above 0, from {1 / MOST_ADDED:g} to {MOST_ADDED:,}; 1 is none",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            expect(name, abs(getattr(self, name)) <= MOST_ADDED, f"a number, at most {MOST_ADDED:,}; 0 is none")
        expect("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (anything may come again) or above")
        expect("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        expect(
            "min_new_tokens",
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"from 0 to max_new_tokens, {self.max_new_tokens}",
        )
        expect("num_beams", 1 <= self.num_beams <= MOST_BEAMS, f"from 1 (no search) to {MOST_BEAMS}")
        expect("length_penalty", math.isfinite(self.length_penalty), "a number; 0 is none")
        expect("bad_words_ids", all(self.bad_words_ids), "sequences of at least one word")
        expect(
            "sequence_bias",
            all(len(words) == 1 for words, _ in self.sequence_bias),
            "words one by one, each in a list of its own",
        )
        expect(
            "sequence_bias",
            all(value == -math.inf or abs(value) <= MOST_ADDED for _, value in self.sequence_bias),
            f"words and numbers, at most {MOST_ADDED:,}",
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest word is taken always."""
        return not self.do_sample or self.temperature == 0

    @classmethod
    def load(cls, path: Path, vocabulary_size: int) -> GenerationConfig:
        """Read generation_config.json; raises DataError, naming the field, where a value has the wrong type or range."""
        config = dataclass_from_json(cls, read_json(path), path)
        named = [index for words in config.bad_words_ids for index in words]
        named += [index for words, _ in config.sequence_bias for index in words]
        for index in (config.bos_token_id, config.eos_token_id, *config.suppress_tokens, *named):
            if not 0 <= index < vocabulary_size:
                raise DataError(f"{path}: {index} is no word's id; the vocabulary has {vocabulary_size} words")
        if config.max_new_tokens > MOST_NEW_TOKENS:
            raise DataError(f"{path}: max_new_tokens is {config.max_new_tokens}; it must be at most {MOST_NEW_TOKENS:,}")
        if len(set(config.suppress_tokens)) == vocabulary_size:
            raise DataError(f"{path}: suppress_tokens leaves no word to draw")
        return config


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what was written."""

    folder: Path
    manifest: dict[str, Any]
    sizes: Sizes
    vocabulary: Vocabulary
    generation: GenerationConfig

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read and check a bundle; raises MissingInputError or DataError."""
        manifest = read_manifest(folder)
        verify_checksums(folder, manifest["files"], SUMMED)
        sizes = read_sizes(manifest, folder)
        vocabulary = Vocabulary.load(folder / "vocab.txt")
        if len(vocabulary) != sizes.vocabulary_size:
            raise DataError(f"{folder}: vocab.txt has {len(vocabulary)} words, the model {sizes.vocabulary_size}")
        return cls(folder, manifest, sizes, vocabulary, GenerationConfig.load(folder / GENERATION_CONFIG, len(vocabulary)))

    @cached_property
    def tokenizer(self) -> WordTokenizer:
        """How a prompt becomes words, and words become text."""
        return WordTokenizer.load(self.folder / "text.json")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that says it is a bundle; its files are not looked at."""
    check_folder(folder, "a bundle made by lmdist-export is expected")
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        raise MissingInputError(f"{folder} is not a bundle: it has no manifest.json; lmdist-export RUN -o BUNDLE makes one")
    manifest = read_json(path)
    if manifest.get("format") == "lmdist checkpoint":
        raise DataError(f"{folder} is a checkpoint; make a bundle of it first: lmdist-export {folder} -o BUNDLE")
    check_version(manifest, (FORMAT, VERSION), path)
    check_schema(manifest, {"files": dict[str, FileFacts]}, path)
    return manifest


def read_sizes(manifest: dict[str, Any], folder: Path) -> Sizes:
    """The sizes that a manifest names; raises DataError unless there are weights of just these sizes."""
    path = folder / "manifest.json"
    check_schema(manifest, {"sizes": Sizes}, path)
    sizes = Sizes(**{field.name: manifest["sizes"][field.name] for field in fields(Sizes)})
    length = file_size(folder / WEIGHTS)
    cuts = [0, *sizes.cutoffs, sizes.vocabulary_size]
    wrong = (
        sizes.precision not in PRECISIONS
        or not sizes.layer_sizes
        or min(*sizes.layer_sizes, sizes.vocabulary_size, sizes.embedding_size) < 1
        # As many layers or words as that have more weights than there are bytes: nothing is made of such a number.
        or max(*sizes.layer_sizes, *cuts, sizes.embedding_size) > length
        or ALIGNMENT * (len(sizes.layer_sizes) + len(sizes.cutoffs)) > length
        or cuts != sorted(set(cuts))
        or (sizes.cutoffs and (sizes.tied or min(rows for rows, _ in sizes.clusters) < 1))
        or (sizes.tied and sizes.embedding_size != sizes.layer_sizes[-1])
    )
    if wrong or file_length(sizes) != length:
        raise DataError(f"{path} names sizes that no model with {length:,} bytes of {WEIGHTS} has")
    return sizes
