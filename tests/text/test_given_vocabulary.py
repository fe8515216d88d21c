"""lmdist-prepare with the words of a model: the same ids and tokenizer, new words behind them, and what contradicts that."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lmdist import config
from lmdist.errors import UsageError
from lmdist.settings import PrepareSettings, Recipe
from lmdist.text import prepare
from lmdist.text.vocabulary import Vocabulary
from lmdist.train import prepare_if_absent
from lmdist.training.data import DataFolder
from support.failures import last_line
from support.small_bundles import TIED, make_bundle

TEXT = "the cat sat on the mat .\n" * 6 + "the dog sat on the sofa .\n" * 3 + "a lion .\n"
WORDS = ["dog", "the", "cat", "president", "."]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The same words as a run, a checkpoint, a bundle, a data folder and a file."""
    folder = tmp_path_factory.mktemp("bases")
    bundle = make_bundle(folder, TIED, "whitespace", WORDS)
    run = folder / "runs" / "small"
    checkpoint = run / "checkpoints" / "step-000000007"
    return {
        "run": run,
        "checkpoint": checkpoint,
        "bundle": bundle,
        "data folder": folder / "data",
        "vocab.txt": folder / "data" / "vocab.txt",
    }


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "new.txt"
    path.write_text(TEXT)
    return path


def prepared(text: Path, *flags: object) -> DataFolder:
    """Prepare a text for training only."""
    output = text.parent / "out"
    shutil.rmtree(output, ignore_errors=True)
    prepare.main([str(flag) for flag in ("--train", text, "-o", output, *flags)])
    return DataFolder(output)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "bundle", "data folder", "vocab.txt"])
def test_words_keep_their_ids_and_text_its_tokenizer(bases, text, kind, capsys):
    tokenizer = ["--tokenizer", "whitespace"] if kind == "vocab.txt" else []
    folder = prepared(text, "--vocabulary", bases[kind], *tokenizer)
    assert folder.vocabulary.words == ["<unk>", "<eos>", *WORDS]
    if not tokenizer:
        assert folder.contents["text.json"] == (bases["data folder"] / "text.json").read_bytes()
    assert folder.meta["text"]["tokenizer"] == folder.meta["prepare"]["tokenizer"] == "whitespace"
    expected = [folder.vocabulary.ids.get(word, 0) for line in TEXT.splitlines() for word in [*line.split(), "<eos>"]]
    np.testing.assert_array_equal(folder.tokens("train")[:], expected)
    counts = {"from": str(bases[kind]), "words": 7, "shared": 4, "new": 0, "dropped": 6}
    assert folder.meta["vocabulary"] == counts
    assert "which has 4 words of this text; 0 of it are new, 6 became <unk>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "new"),
    [
        (["--min-count=1"], ["on", "sat", "mat", "sofa", "a", "lion"]),
        ([], ["on", "sat", "mat", "sofa"]),
        (["--vocabulary-size=2"], ["on", "sat"]),
    ],
    ids=["all", "by default", "two"],
)
def test_new_words_come_behind_the_known_ones_by_frequency(bases, text, flags, new):
    folder = prepared(text, "--vocabulary", bases["run"], "--extend", *flags)
    assert folder.vocabulary.words == ["<unk>", "<eos>", *WORDS, *new]
    assert folder.meta["vocabulary"] | {"from": ""} == {
        "from": "",
        "words": 7,
        "shared": 4,
        "new": len(new),
        "dropped": 6 - len(new),
    }


def test_a_training_is_refused_a_default_that_was_given_and_is_not_that_of_its_base(bases, text):
    folder = text.parent
    recipe = Recipe(prepare=PrepareSettings(train=str(text), vocabulary=str(bases["run"])))
    recipe.data.folder = str(folder / "data")
    (folder / "hand.toml").write_text("[prepare]\ntokenizer = 'word_tokenize'\n")
    for words in (["--config", str(folder / "hand.toml")], ["--prepare.tokenizer", "word_tokenize"]):
        with pytest.raises(UsageError, match=r"tokenizer is word_tokenize, and the text of .* was read with whitespace"):
            prepare_if_absent(recipe, words, is_main=True)
    saved = folder / "recipe.toml"
    saved.write_text(config.as_toml(recipe))  # as with a run: it has all defaults, and does the same again
    prepare_if_absent(config.load(["--config", str(saved)]), ["--config", str(saved)], is_main=True)
    prepare.main(["--recipe", str(saved), "-o", str(folder / "again")])
    assert DataFolder(folder / "again").meta["text"] == DataFolder(folder / "data").meta["text"]


def test_a_training_prepares_its_text_with_the_words_of_its_base(bases, text):
    settings = PrepareSettings(train=str(text), vocabulary=str(bases["bundle"]), extend=True)
    prepare.prepare(settings, text.parent / "data")
    assert Vocabulary.load(text.parent / "data" / "vocab.txt").words[2:7] == WORDS
    with pytest.raises(UsageError, match=r"lowercase is True, and the text of .* was read with False"):
        prepare.prepare(PrepareSettings(train=str(text), vocabulary=str(bases["run"]), lowercase=True), text.parent / "other")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (
            ["--vocabulary=RUN", "--lowercase"],
            64,
            "lowercase is True.* was read with False: leave lowercase out",
        ),
        (["--vocabulary=RUN", "--tokenizer=word_tokenize"], 64, "tokenizer is word_tokenize, .* was read with whitespace"),
        (["--vocabulary=RUN", "--min-count=3"], 64, "min_count is of new words.*give extend as well"),
        (["--vocabulary=RUN", "--vocabulary-size=9"], 64, "vocabulary_size says which words are kept"),
        (["--vocabulary=RUN", "--unknown=file"], 64, "unknown file says which words are kept"),
        (["--extend"], 64, "give vocabulary as well"),
        (["--vocabulary=none"], 66, "none is no run with a checkpoint"),
        (["--vocabulary=."], 65, "is no run with a checkpoint"),
        (["--vocabulary=foreign.txt", "--tokenizer=whitespace"], 65, "has none of the words of this text: --extend adds them"),
    ],
)
def test_what_contradicts_is_one_line_and_nothing_is_written(bases, text, flags, code, message, monkeypatch, capsys):
    monkeypatch.chdir(text.parent)
    Path("foreign.txt").write_text("<unk>\n<eos>\nvoiture\n")
    flags = [flag.replace("RUN", str(bases["run"])) for flag in flags]
    found, line = last_line(prepare.main, capsys, "--train", text, "-o", "out", *flags)
    assert found == code
    assert re.search(message, line), line
    assert not Path("out").exists()


@pytest.mark.parametrize("damage", ["vocab.txt", "no manifest"])
def test_a_damaged_base_is_refused(bases, text, tmp_path, damage, capsys):
    copy = shutil.copytree(bases["data folder"], tmp_path / "copy")
    if damage == "vocab.txt":
        (copy / "vocab.txt").write_text("<unk>\n<eos>\nthe\n")
    else:
        (copy / "meta.json").unlink()
    code, line = last_line(prepare.main, capsys, "--train", text, "-o", tmp_path / "out", "--vocabulary", copy)
    assert code == 65
    assert ("is damaged" if damage == "vocab.txt" else "name the file itself") in line
    assert json.dumps(str(copy))[1:-1] in line
