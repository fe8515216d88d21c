"""Small data folders for tests and benchmarks, written without lmdist-prepare."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmdist.settings import PrepareSettings
from lmdist.text.data_folder import TEXT, VOCABULARY, SplitFacts, dtype_of, token_file, write_meta
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
    settings = PrepareSettings(tokenizer="whitespace")
    Vocabulary([UNKNOWN, END, *(f"w{number}" for number in range(2, vocabulary_size))]).save(folder / VOCABULARY)
    WordTokenizer.train(settings.text, []).save(folder / TEXT)
    facts: dict[str, SplitFacts] = {}
    for name, tokens in splits.items():
        tokens.astype(np.dtype(dtype_of(vocabulary_size)).newbyteorder("<")).tofile(folder / token_file(name))
        facts[name] = {"tokens": len(tokens), "documents": 1, "unknown_tokens": 0, "unknown_rate": 0.0}
    write_meta(folder, vocabulary_size, facts, settings, skipped={}, sources=[])
    return folder
