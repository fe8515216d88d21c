"""Small data folders for tests and benchmarks, written without lmdist-prepare."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmdist.settings import TextSettings
from lmdist.storage.checksums import checksums
from lmdist.storage.reading import write_json
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END, UNKNOWN, Vocabulary


def chain(length: int, vocabulary_size: int, seed: int = 0) -> np.ndarray:
    """Return tokens of which every second one is a function of the one before: partly predictable, partly random."""
    generator = np.random.default_rng(seed)
    tokens = np.minimum(generator.zipf(1.5, length), vocabulary_size - 1)
    tokens[1::2] = (tokens[: length - 1 : 2] * 7 + 1) % vocabulary_size
    return tokens.astype("<u2")


def write_data_folder(folder: Path, splits: dict[str, np.ndarray], vocabulary_size: int) -> Path:
    """Write a data folder as lmdist-prepare does, with the vocabulary w2, w3, ...; return it."""
    folder.mkdir(parents=True)
    Vocabulary([UNKNOWN, END, *(f"w{number}" for number in range(2, vocabulary_size))]).save(folder / "vocab.txt")
    WordTokenizer.train(TextSettings(tokenizer="whitespace"), []).save(folder / "text.json")
    for name, tokens in splits.items():
        tokens.astype("<u2").tofile(folder / f"{name}.bin")
    write_json(
        folder / "meta.json",
        {
            "format": "lmdist data",
            "version": 1,
            "dtype": "uint16",
            "vocabulary_size": vocabulary_size,
            "splits": {
                name: {"tokens": len(tokens), "documents": 1, "unknown_tokens": 0, "unknown_rate": 0.0}
                for name, tokens in splits.items()
            },
            "skipped": {},
            "sources": [],
            "files": checksums(folder),
        },
    )
    return folder
