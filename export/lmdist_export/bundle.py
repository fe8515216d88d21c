"""The bundle: a folder that is enough by itself to generate and to score text, on a machine without torch.

    bundle/
        model.onnx              the step graph: tokens and state in, logits and state out
        generate.onnx           the generation graph: prompts in, tokens out
        weights.bin             the weights of both
        vocab.txt  text.json    the vocabulary and the tokenizer
        tokenizer.json          the same for Hugging Face's tokenizers, where its format can express it; not read here
        generation_config.json  the options of generation (options.py); yours to edit
        manifest.json           sizes, precision and its cost, a tuned neural cache, origin, and a sha256 of each file above but
                                the last

This module reads the folder; export.py writes it. It imports neither onnx nor onnxruntime, so a broken bundle is found
within milliseconds. docs/bundle.md describes the format.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lmdist.cache_settings import NeuralCache
from lmdist.errors import DataError, MissingInputError
from lmdist.storage.checksums import FileFacts, check_own_checksum, verify_checksums, verify_sizes
from lmdist.storage.held import HeldFolder, read_held
from lmdist.storage.reading import MAX_JSON_BYTES
from lmdist.storage.schema import check_schema, check_version, dataclass_from_json
from lmdist.text.data_folder import TEXT, VOCABULARY
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import MAX_BYTES, Vocabulary
from lmdist_export import PRECISIONS
from lmdist_export.graph.sizes import ALIGNMENT, Sizes, file_length
from lmdist_export.options import GenerationConfig

FORMAT = "lmdist bundle"
VERSION = 2
PROVIDERS = ("cpu", "cuda")

STEP_GRAPH = "model.onnx"
GENERATION_GRAPH = "generate.onnx"
WEIGHTS = "weights.bin"
GENERATION_CONFIG = "generation_config.json"
MANIFEST = "manifest.json"
CHECKED = (STEP_GRAPH, GENERATION_GRAPH, WEIGHTS, VOCABULARY, TEXT)  # a bundle needs these files, and users do not edit them
FIRST_KEYS = set(
    "format version parameters sizes cache run run_id step started_from tolerance differences held_out versions files".split()
)
"""The keys of the first manifests, which had no checksum of their own."""
MAX_NEW_TOKENS = 1_000_000  # of a file; a command may ask for more
EXPECTED = "a bundle written by lmdist-export is expected"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have the checksums of the manifest.

    What is used of it was read before it was checked: whatever becomes of the folder, it is one bundle.
    """

    files: HeldFolder
    manifest: dict[str, Any]
    sizes: Sizes
    vocabulary: Vocabulary
    generation: GenerationConfig
    cache: NeuralCache | None = None
    """The neural cache that was tuned for the model, if one was."""
    called: str = ""
    """What the user has called it, where that is not the folder: its address in MLflow."""

    @classmethod
    def load(cls, folder: str | Path, called: str = "") -> Bundle:
        """Read and check a bundle, and close its files; raises MissingInputError or DataError."""
        bundle = cls.hold(folder)
        bundle.files.close()
        return replace(bundle, called=called)

    @classmethod
    def hold(cls, folder: str | Path) -> Bundle:
        """Read and check a bundle whose files stay open, for who copies them too; raises as `load`."""
        return read_held(Path(folder), cls.from_held_folder, EXPECTED)

    @classmethod
    def from_held_folder(cls, files: HeldFolder) -> Bundle:
        """Read and check the bundle of a folder that is held open; raises as `load`."""
        manifest = read_manifest(files)
        # What a look at the sizes refuses costs no time: the sha256 of many gigabytes takes a minute.
        verify_sizes(files, manifest["files"], CHECKED)
        sizes = read_sizes(manifest, files)
        files.copy(WEIGHTS)
        words = files.read(VOCABULARY, MAX_BYTES)
        files.read(TEXT, MAX_JSON_BYTES)
        verify_checksums(files, manifest["files"])
        vocabulary = Vocabulary.parse(words, files.path / VOCABULARY, sizes.vocabulary_size, "the model")
        generation = read_generation_config(files, len(vocabulary))
        return cls(files, manifest, sizes, vocabulary, generation, read_cache(manifest, files.path))

    @property
    def folder(self) -> Path:
        """Return where the bundle was."""
        return self.files.path

    @property
    def name(self) -> str:
        """Return what messages call the bundle."""
        return self.called or str(self.folder)

    @property
    def weights(self) -> mmap.mmap:
        """Return the bytes of the file of weights, in memory of this process."""
        return self.files.copy(WEIGHTS)

    @cached_property
    def tokenizer(self) -> WordTokenizer:
        """Return the tokenizer, which turns a prompt into words, and words into text.

        Raises DataError where its pieces are not the vocabulary.
        """
        tokenizer = WordTokenizer.parse(self.files.read(TEXT, MAX_JSON_BYTES), Path(self.name) / TEXT)
        if tokenizer.model and tokenizer.model.words != self.vocabulary.words:
            raise DataError(f"{self.name}: the pieces of {TEXT} are not the words of {VOCABULARY}; {EXPECTED}")
        return tokenizer


def read_generation_config(files: HeldFolder, vocabulary_size: int) -> GenerationConfig:
    """Read generation_config.json; raises DataError, naming the field, where a value has the wrong type or range."""
    path = files.path / GENERATION_CONFIG
    config = dataclass_from_json(GenerationConfig, files.read_json(GENERATION_CONFIG), path)
    named = [token for tokens in config.bad_words_ids for token in tokens]
    named += [token for tokens, _ in config.sequence_bias for token in tokens]
    for token in (config.bos_token_id, config.eos_token_id, *config.suppress_tokens, *named):
        if not 0 <= token < vocabulary_size:
            raise DataError(f"{path}: {token} is not the id of a token; the vocabulary has {vocabulary_size} tokens")
    if config.max_new_tokens > MAX_NEW_TOKENS:
        raise DataError(f"{path}: max_new_tokens is {config.max_new_tokens}; it must be at most {MAX_NEW_TOKENS:,}")
    if len(set(config.suppress_tokens)) == vocabulary_size:
        raise DataError(f"{path}: suppress_tokens leaves no token to sample")
    return config


def read_manifest(files: HeldFolder) -> dict[str, Any]:
    """Return the manifest of a folder that claims to be a bundle, without a look at its files."""
    folder, path = files.path, files.path / MANIFEST
    try:
        manifest = files.read_json(MANIFEST)
    except MissingInputError:
        raise MissingInputError(
            f"{folder} is not a bundle: it has no manifest.json; lmdist-export RUN -o BUNDLE writes one"
        ) from None
    if manifest.get("format") == "lmdist checkpoint":
        raise DataError(f"{folder} is a checkpoint; export it first: lmdist-export {folder} -o BUNDLE")
    check_version(manifest, (FORMAT, VERSION), path)
    check_own_checksum(manifest, path, FIRST_KEYS)
    check_schema(manifest, {"files": dict[str, FileFacts]}, path)
    return manifest


def read_cache(manifest: dict[str, Any], folder: Path) -> NeuralCache | None:
    """Return the neural cache of a manifest, if it has one; raises DataError for parameters of no cache."""
    path, found = folder / MANIFEST, manifest.get("cache")
    if found is None:
        return None
    check_schema(manifest, {"cache": NeuralCache}, path)
    return dataclass_from_json(NeuralCache, found, path, "cache")


def read_sizes(manifest: dict[str, Any], files: HeldFolder) -> Sizes:
    """Return the sizes that a manifest names; raises DataError unless weights.bin has the length of such weights."""
    path = files.path / MANIFEST
    check_schema(manifest, {"sizes": Sizes}, path)
    sizes = Sizes(**{field.name: manifest["sizes"][field.name] for field in fields(Sizes)})
    length = files.size(WEIGHTS)
    cuts = [0, *sizes.cutoffs, sizes.vocabulary_size]
    wrong = (
        sizes.precision not in PRECISIONS
        or not sizes.layer_sizes
        or min(*sizes.layer_sizes, sizes.vocabulary_size, sizes.embedding_size) < 1
        # More layers or tokens than bytes: such a number is not multiplied by anything.
        or max(*sizes.layer_sizes, *cuts, sizes.embedding_size) > length
        or ALIGNMENT * (len(sizes.layer_sizes) + len(sizes.cutoffs)) > length
        or cuts != sorted(set(cuts))
        or (sizes.cutoffs and (sizes.tied or min(rows for rows, _ in sizes.clusters) < 1))
        or (sizes.tied and sizes.embedding_size != sizes.layer_sizes[-1])
    )
    if wrong or file_length(sizes) != length:
        raise DataError(f"{path} names sizes that no model with {length:,} bytes of {WEIGHTS} has")
    return sizes
