"""The bundle: a folder that is enough by itself to make text, on a machine without torch.

    bundle/
        model.onnx              the step graph and its weights (those beyond 2 GB in model.onnx.data)
        vocab.txt  text.json    how words become ids, and text becomes words
        tokenizer.json          the same for Hugging Face's tokenizers, where its format can say it; not read here
        generation_config.json  how text is made where a command does not say; yours to edit
        manifest.json           sizes, measured differences from torch, origin, and a sha256 for each file above but that

This module reads and describes the folder; export.py writes it. It imports neither onnx nor onnxruntime nor numpy, so a
broken bundle is known within milliseconds. docs/bundle.md is the description for others.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.files import FileFacts, build, check_folder, check_shape, check_sums, check_version, read_json
from lmdist.text import WordTokenizer
from lmdist.vocabulary import END_ID, UNKNOWN_ID, Vocabulary

FORMAT = "lmdist bundle"
VERSION = 1
PROVIDERS = ("cpu", "cuda")

MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
GENERATION_CONFIG = "generation_config.json"
SUMMED = (MODEL, "vocab.txt", "text.json")  # what a bundle cannot be without, and nobody changes
MOST_NEW_TOKENS = 1_000_000  # a file may ask for so many; a person may ask for more


@dataclass(frozen=True)
class GenerationConfig:
    """How text is made where the command does not say; the names are those of Hugging Face."""

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
    """Draw from the fewest words that together have this probability; 1 is from all."""
    max_new_tokens: int = 200
    """Words after the prompt, at most."""
    suppress_tokens: tuple[int, ...] = (UNKNOWN_ID,)
    """Words that are never drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}; it must be 0 (always the likeliest word) or above")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be 0 (all words) or above")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all words)")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest word is taken always."""
        return not self.do_sample or self.temperature == 0

    @classmethod
    def load(cls, path: Path, vocabulary_size: int) -> GenerationConfig:
        """Read generation_config.json; raises DataError, naming the field, where a value has the wrong type or range."""
        config = build(cls, read_json(path), path)
        for index in (config.bos_token_id, config.eos_token_id, *config.suppress_tokens):
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
    vocabulary: Vocabulary
    generation: GenerationConfig

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read and check a bundle; raises MissingInputError or DataError."""
        manifest = read_manifest(folder)
        beside = (MODEL_DATA,) if os.path.lexists(folder / MODEL_DATA) else ()
        check_sums(folder, manifest["files"], (*SUMMED, *beside))
        vocabulary = Vocabulary.load(folder / "vocab.txt")
        return cls(folder, manifest, vocabulary, GenerationConfig.load(folder / GENERATION_CONFIG, len(vocabulary)))

    @property
    def model(self) -> Path:
        """The step graph."""
        return self.folder / MODEL

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
    check_shape(manifest, {"files": dict[str, FileFacts]}, path)
    return manifest
