"""Small random models as data folders, runs and bundles, for the tests of export and sampling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lmdist import config
from lmdist.model.language_model import LanguageModel
from lmdist.settings import DataSettings, ModelSettings, PrepareSettings, Recipe, TextSettings, Tokenizer
from lmdist.storage.checksums import OWN_CHECKSUM, checksums, own_checksum
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import write_json
from lmdist.text.prepare import prepare
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.write import take_snapshot, write_checkpoint
from lmdist.training.data import DataFolder
from lmdist_export import export
from lmdist_export.bundle import Bundle
from lmdist_export.conversion.weights import write_graphs
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.completion import Completion

WORDS = ["the", "cat", "dog", "president", "said", "that", "it", "is", "n't", "'s", ".", ",", "``", "''", "(", ")", "we"]
PLAIN_WORDS = "the cat dog president said that it is not so here we old too and of in".split()
DOCUMENTS = ["The president said that the cat is here. It isn't a dog.", "We said it. The dog's (old) cat said so too."]
TEXTS_OF_PIECES = [f"The president said that the people aren't here.\nNaïve 日本語 🙂 number {number}." for number in range(80)]
TIED = ModelSettings(embedding_size=8, hidden_size=12, num_layers=3, dropout=0.0, tied=True)
UNTIED = ModelSettings(embedding_size=6, hidden_size=10, num_layers=2, dropout=0.0, tied=False)
ADAPTIVE = ModelSettings(embedding_size=6, hidden_size=20, num_layers=2, dropout=0.0, tied=False, head="adaptive")
SINGLE = ModelSettings(
    embedding_size=7, hidden_size=7, num_layers=1, dropout=0.5, dropout_embedding=0.5, weight_dropout=0.5, tied=True
)


def make_model(settings: ModelSettings, vocabulary_size: int) -> LanguageModel:
    """Return a model whose probabilities are far from equal."""
    torch.manual_seed(0)
    model = LanguageModel(settings, vocabulary_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def make_data(folder: Path, tokenizer: Tokenizer = "word_tokenize", words: Sequence[str] = WORDS) -> Path:
    """Write a data folder with a train and a valid split of 600 random tokens."""
    folder.mkdir(parents=True)
    vocabulary = Vocabulary(["<unk>", "<eos>", *words])
    vocabulary.save(folder / "vocab.txt")
    WordTokenizer.train(TextSettings(tokenizer), DOCUMENTS).save(folder / "text.json")
    tokens = np.random.default_rng(0).integers(0, len(vocabulary), 600)
    for split in ("train", "valid"):
        tokens.astype("<u2").tofile(folder / f"{split}.bin")
    meta = {
        "format": "lmdist data",
        "version": 1,
        "dtype": "uint16",
        "vocabulary_size": len(vocabulary),
        "splits": {split: {"tokens": len(tokens)} for split in ("train", "valid")},
        "files": checksums(folder),
    }
    write_json(folder / "meta.json", meta)
    return folder


def make_run(
    folder: Path, settings: ModelSettings = TIED, tokenizer: Tokenizer = "word_tokenize", words: Sequence[str] = WORDS
) -> Path:
    """Write a run with one checkpoint, beside its data folder."""
    return run_of_data(folder, make_data(folder / "data", tokenizer, words), settings)


def run_of_data(folder: Path, data: Path, settings: ModelSettings = TIED) -> Path:
    """Write a run with one checkpoint, of a data folder that exists."""
    held = DataFolder(data)
    model = make_model(settings, held.vocabulary_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = config.as_dict(Recipe(data=DataSettings(folder=str(data)), model=settings))
    run = folder / "runs" / "small"
    taken = take_snapshot(Progress(step=7), model, optimizer, None)
    write_checkpoint(run / "checkpoints", taken, recipe, held)
    return run


def make_bundle(
    folder: Path,
    settings: ModelSettings = TIED,
    tokenizer: Tokenizer = "word_tokenize",
    words: Sequence[str] = WORDS,
    precision: str = "fp32",
) -> Path:
    """Export a bundle by the command."""
    export.main([str(make_run(folder, settings, tokenizer, words)), "-o", str(folder / "bundle"), "--precision", precision])
    return folder / "bundle"


def make_run_of_pieces(folder: Path, tokenizer: str = "bpe") -> Path:
    """Write a run with one checkpoint, beside its data folder, whose pieces are learned from TEXTS_OF_PIECES."""
    (folder / "a.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS_OF_PIECES))
    prepare(PrepareSettings(inputs=[str(folder / "a.jsonl")], tokenizer=tokenizer, vocabulary_size=320), folder / "data")
    return run_of_data(folder, folder / "data", UNTIED)


def neutral(bundle: Path) -> Path:
    """Have a bundle sample from all of the model's distribution, where its options are not set; return it."""
    edit_json(bundle / "generation_config.json", temperature=1.0, top_p=1.0)
    return bundle


def bare_bundle(folder: Path, settings: ModelSettings = TIED, precision: str = "fp32", vocabulary_size: int = 300) -> Bundle:
    """Write a bundle of `make_model` without verifying it against torch, which is much faster than an export."""
    folder.mkdir(parents=True)
    sizes = write_graphs(make_model(settings, vocabulary_size), folder, "small", precision)
    words = Vocabulary(["<unk>", "<eos>", *(f"word{number}" for number in range(2, vocabulary_size))])
    return Bundle(HeldFolder(folder), {}, sizes, words, GenerationConfig())


def edit_json(path: Path, **values: object) -> None:
    """Replace values of a JSON object, and its own checksum if it has one."""
    value = json.loads(path.read_text(encoding="utf-8")) | values
    write_json(path, value | ({OWN_CHECKSUM: own_checksum(value)} if OWN_CHECKSUM in value else {}))


def command(*arguments: object, cwd: Path | None = None, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...`, as its installed command does, with `given` on stdin, or nothing."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        stdin=subprocess.DEVNULL if given is None else None,
        input=given,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )


def in_fresh_process(name: str, arguments: Sequence[object], packages: set[str]) -> subprocess.CompletedProcess[str]:
    """Run `main` of a file of lmdist_export in a new process; its last line on stderr is the set of loaded `packages`."""
    code = (
        f"import sys; from lmdist_export import {name}\n"
        f"try: {name}.main({[*map(str, arguments)]!r})\n"
        f"finally: print({packages!r} & set(sys.modules), file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def same_text(one: Completion, other: Completion) -> bool:
    """Whether two generated texts are the same, but for their places among others."""
    return (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
