"""Pieces of words: every text comes back as it was, whoever prepares learns the same ones, and files are read or refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmdist.errors import CONTROLS, UsageError
from lmdist.settings import PrepareSettings
from lmdist.text import prepare as command
from lmdist.text.detokenizer import Place
from lmdist.text.from_pandas import prepare as prepare_frames
from lmdist.text.learning import in_proportion, trained_model
from lmdist.text.machines import merge_shards, prepare_shard
from lmdist.text.piece_files import read_pieces
from lmdist.text.pieces import Pieces
from lmdist.text.prepare import prepare
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist.training.data import DataFolder
from support.failures import last_line

tokenizers = pytest.importorskip("tokenizers")

LINES = [
    "The president of the United States said that the people of the nation must work together.",
    "In 2016 the people's representatives said so, and the States united; naïve cafés aren't here.",
    "नमस्ते दुनिया, 日本語の文章です。 Привет, мир! مرحبا بالعالم 🙂👩‍👩‍👧",
    "  two  spaces,\ttabs\nand a line break\r\nor two\n\n",
]
TEXTS = [*(f"{line} {number} of the people" for number in range(60) for line in LINES)]
STRANGE = [
    "",
    " ",
    "\n",
    "a\u0301 \u00ad\u200b\ufeff",
    "<unk><eos><nl> <0x0A> ▁ Ġ",
    "\x00\x1b[0m\x85\u2028",
    "👩‍👩‍👧 " * 3,
    "it’s 'twas",
]


def write_texts(path: Path) -> Path:
    """JSON Lines, which keep line breaks."""
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request, tmp_path_factory) -> Path:
    """A data folder of pieces."""
    place = tmp_path_factory.mktemp(request.param)
    asked = PrepareSettings(inputs=[str(write_texts(place / "a.jsonl"))], tokenizer=request.param, vocabulary_size=420)
    prepare(asked, place / "data")
    return place / "data"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> WordTokenizer:
    return DataFolder(folder).tokenizer


# --- texts ---------------------------------------------------------------------------------------------------------


@given(text=st.text() | st.lists(st.sampled_from([*LINES, *STRANGE])).map("".join))
@example("".join(STRANGE))
@example("".join(map(chr, [*range(0x3000), *range(0x1F300, 0x1F700), 0x10FFFF])))
@settings(deadline=None, max_examples=60)
def test_a_text_comes_back_as_it_was(tokenizer: WordTokenizer, text: str) -> None:
    words = tokenizer.tokenize(text)
    assert "<unk>" not in words
    assert tokenizer.detokenize(words) == text
    shown = list(tokenizer.pieces(words))
    assert "".join(shown) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in shown)  # no part of a character is shown
    place, half = Place(), len(words) // 2
    assert [*islice(tokenizer.pieces(words, place), half), *tokenizer.pieces(words[half:], place.copy())] == shown


def test_bytes_that_are_no_text_are_shown_as_such(tokenizer: WordTokenizer) -> None:
    assert tokenizer.detokenize(["<0xF0>", "<eos>", "a", "<unk>"]) == "\ufffd\n\na<unk>"


def test_lone_surrogates_are_no_error(tokenizer: WordTokenizer) -> None:
    assert tokenizer.detokenize(tokenizer.tokenize("a\ud800b")) == "a\ufffdb"


def test_a_space_at_the_end_of_a_prompt_waits_for_the_next_word(tokenizer: WordTokenizer) -> None:
    assert tokenizer.tokenize("the people ", continues=True) == tokenizer.tokenize("the people")
    assert tokenizer.tokenize("the people  ", continues=True) == tokenizer.tokenize("the people ")
    assert tokenizer.tokenize("the people\n", continues=True)[-1] == "<0x0A>"


def test_the_pieces_that_begin_with_bytes_are_looked_for_once(tokenizer: WordTokenizer) -> None:
    model = tokenizer.model
    assert model
    contents = model.entries.contents
    for content in (b" ", contents[-1], contents[300][:1]):
        found = model.beginning_with(content)
        assert found == tuple(token for token in range(2, len(contents)) if contents[token].startswith(content))
        assert model.beginning_with(content) is found


# --- the data folder -----------------------------------------------------------------------------------------------


def test_the_vocabulary_is_by_frequency_and_has_all_bytes(folder: Path, tokenizer: WordTokenizer) -> None:
    data = DataFolder(folder)
    words = data.vocabulary.words
    assert words[:2] == ["<unk>", "<eos>"]
    assert len(words) == data.meta["vocabulary_size"]
    assert len(words) == 420 if tokenizer.settings.tokenizer == "bpe" else 300 < len(words) <= 420
    assert not any(CONTROLS.search(word) or word.split() != [word] for word in words)
    assert tokenizer.model
    assert words == tokenizer.model.words
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.model.entries.contents)
    counts = np.bincount(data.tokens("train")[:], minlength=len(words))
    assert counts[2:].tolist() == sorted(counts[2:], reverse=True)
    assert "▁the" in (words[:20] if tokenizer.settings.tokenizer == "bpe" else words)
    assert all(facts["unknown_tokens"] == 0 for facts in data.meta["splits"].values())
    assert data.meta["text"]["tokenizer"] == data.meta["prepare"]["tokenizer"] == tokenizer.settings.tokenizer


def test_its_ids_are_those_of_the_tokenizer_and_of_hugging_face(folder: Path, tokenizer: WordTokenizer) -> None:
    data = DataFolder(folder)
    assert tokenizer.model
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.model.saved["model"]))
    found: Counter[tuple[int, ...]] = Counter()
    for split in data.meta["splits"]:
        ids = data.tokens(split)[:].tolist()
        while ids:
            end = ids.index(1)
            found[tuple(ids[:end])] += 1
            ids = ids[end + 1 :]
    assert found == Counter(tuple(data.vocabulary.encode(tokenizer.tokenize(text))) for text in TEXTS)
    for text in [*LINES, *STRANGE]:
        assert theirs.encode(text).ids == data.vocabulary.encode(tokenizer.tokenize(text)), text
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == text


def content(folder: Path) -> dict[str, bytes]:
    """The files of a data folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_workers_and_another_process_write_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(folder)
    kind = json.loads(expected["meta.json"])["prepare"]["tokenizer"]
    source = folder.parent / "a.jsonl"
    asked = PrepareSettings(inputs=[str(source)], tokenizer=kind, vocabulary_size=420)
    for index in range(3):
        prepare_shard(asked, folder.parent / "merged", index, 3)
    merge_shards(asked, folder.parent / "merged", overwrite=False)
    line = "lmdist.text.prepare", source, "-o", folder.parent / "other", "--tokenizer", kind, "--vocabulary-size", "420"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-m", *map(str, line)], check=True, capture_output=True, env=environment)
    if kind == "bpe":
        monkeypatch.setattr("lmdist.text.inputs.ONE_PROCESS_BYTES", {kind: 0})
        prepare(dataclasses.replace(asked, workers=2), folder.parent / "workers")
    for name in ("merged", "other", *(["workers"] if kind == "bpe" else [])):
        assert content(folder.parent / name) == expected, name


def test_the_same_shards_give_other_pieces(tmp_path: Path) -> None:
    source = str(write_texts(tmp_path / "a.jsonl"))
    prepare_shard(PrepareSettings(inputs=[source], tokenizer="bpe"), tmp_path / "data", 0, 1)
    for size in (300, 350):
        merge_shards(
            PrepareSettings(inputs=[source], tokenizer="bpe", vocabulary_size=size), tmp_path / "data", overwrite=size > 300
        )
        assert DataFolder(tmp_path / "data").vocabulary_size == size


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_of_a_long_text_words_are_counted_in_proportion(kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdist.text.learning.MAX_CHARACTERS", 4_000)
    monkeypatch.setattr("lmdist.text.learning.CHUNK_CHARACTERS", 20)
    source = write_texts(tmp_path / "a.jsonl")
    prepare(PrepareSettings(inputs=[str(source)], tokenizer=kind, vocabulary_size=330), tmp_path / "data")
    tokenizer = pickle.loads(pickle.dumps(DataFolder(tmp_path / "data").tokenizer))
    assert tokenizer.detokenize(tokenizer.tokenize(LINES[2])) == LINES[2]
    assert len(tokenizer.tokenize(" the people")) < 10


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_of_a_long_text_of_clauses_that_come_once_a_part_is_left(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdist.text.learning.MAX_CHARACTERS", 1_000)
    counted = [(f"the{number}people", 1) for number in range(1_000, 1_800)]
    assert 800 < sum((len(word) + 1) * number for word, number in in_proportion(counted)) < 1_200
    assert len(max(dict(trained_model(kind, counted, 280)["vocab"]), key=len)) > 2, "pieces of more than a byte or two"


def test_pieces_are_of_lowercased_and_cleaned_text(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl")
    prepare(PrepareSettings(inputs=[str(source)], tokenizer="bpe", vocabulary_size=300, lowercase=True), tmp_path / "data")
    tokenizer = DataFolder(tmp_path / "data").tokenizer
    assert tokenizer.detokenize(tokenizer.tokenize("The CAFÉ")) == "the café"


# --- files ---------------------------------------------------------------------------------------------------------


def byte_level(**changes: Any) -> Any:
    """A tokenizer.json as GPT-2's: no marks in the first places, one at the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("add_prefix_space", False))
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<|endoftext|>"])
    return made


def byte_fallback() -> Any:
    """A tokenizer.json as Llama's and Gemma's: ▁ for a space, bytes for what has no piece, pieces with line breaks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=200, limit_alphabet=60, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    model = json.loads(made.to_str())
    vocab = model["model"]["vocab"]
    for name in ("<pad>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n"):
        vocab[name] = len(vocab)
    order = {"<pad>": 0, "</s>": 1} | {
        name: 2 + place for place, name in enumerate(n for n in vocab if n[0] != "<" or n[1] == "0")
    }
    model["model"] |= {"vocab": order, "byte_fallback": True}
    made = Tokenizer.from_str(json.dumps(model))
    made.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("</s>", special=True)])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


FILES: dict[str, Callable[[], Any]] = {
    "as GPT-2's": byte_level,
    "with a space before": lambda: byte_level(add_prefix_space=True),
    "as Llama's": byte_fallback,
}
MARKS_OF_FILES = "a<|endoftext|>b <s>old</s> <pad> </s>"


@pytest.mark.parametrize("kind", FILES)
def test_a_tokenizer_json_is_taken_as_it_is(kind: str, tmp_path: Path) -> None:
    theirs = FILES[kind]()
    theirs.save(str(tmp_path / "tokenizer.json"))
    source = write_texts(tmp_path / "a.jsonl")
    prepare(PrepareSettings(inputs=[str(source)], tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "data")
    data = DataFolder(tmp_path / "data")
    shift = 0 if kind == "as Llama's" else 2
    assert data.vocabulary_size == theirs.get_vocab_size() + shift
    assert not any(word.split() != [word] for word in data.vocabulary.words)
    theirs.encode_special_tokens = True
    for text in [*LINES, *STRANGE, MARKS_OF_FILES]:
        words = data.tokenizer.tokenize(text)
        assert not {"<unk>", "<eos>", "<|endoftext|>"} & {*words}, "a mark in a text is text"
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert data.vocabulary.encode(words) == [token + shift for token in expected], text
        if not (kind == "with a space before" and text[:1] == " "):
            assert data.tokenizer.detokenize(words) == (text.replace("▁", " ") if shift == 0 else text)
    assert all(facts["unknown_tokens"] == 0 for facts in data.meta["splits"].values())
    # What was read is a file as any: its ids stay.
    assert data.tokenizer.model
    (tmp_path / "again.json").write_text(json.dumps(data.tokenizer.model.saved["model"]))
    prepare(PrepareSettings(inputs=[str(source)], tokenizer=str(tmp_path / "again.json")), tmp_path / "again")
    assert (tmp_path / "again/train.bin").read_bytes() == (tmp_path / "data/train.bin").read_bytes()


def sentencepiece_model(**options: Any) -> bytes:
    """A model of SentencePiece, trained as its users do."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentences = iter([line.strip() for line in LINES[:2]] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=written, minloglevel=9, num_threads=1, hard_vocab_limit=False, **options
    )
    return written.getvalue()


def processor(model: bytes) -> Any:
    """The model, as SentencePiece reads it."""
    import sentencepiece

    made: Any = sentencepiece.SentencePieceProcessor()
    made.LoadFromSerializedProto(model)
    return made


RECOGNIZER = {"model_type": "bpe", "vocab_size": 80, "user_defined_symbols": ["<blk>", "<sos/eos>"]}
RECOGNIZER |= {"unk_id": 2, "bos_id": -1, "eos_id": -1, "character_coverage": 1.0}


@pytest.mark.parametrize("options", [{"model_type": "bpe", "vocab_size": 340}, {"model_type": "unigram", "vocab_size": 340}])
def test_a_sentencepiece_model_is_taken_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    model = sentencepiece_model(
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, **options
    )
    (tmp_path / "m.model").write_bytes(model)
    theirs = processor(model)
    source = write_texts(tmp_path / "a.jsonl")
    prepare(PrepareSettings(inputs=[str(source)], tokenizer=str(tmp_path / "m.model")), tmp_path / "data")
    data = DataFolder(tmp_path / "data")
    for text in [*LINES, *STRANGE[3:]]:
        words = data.tokenizer.tokenize(text)
        assert data.vocabulary.encode(words) == theirs.encode(text)  # <unk> and <s> are its first two, and lmdist's
        assert data.tokenizer.detokenize(words) == text.replace("▁", " ").removesuffix("\x00") or "\x00" in text
    assert data.meta["splits"]["train"]["unknown_tokens"] == 0


def test_the_ids_of_a_recognizers_model_are_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bpe.model").write_bytes(model := sentencepiece_model(**RECOGNIZER))
    theirs = processor(model)
    (tmp_path / "a.txt").write_text("\n\n".join(LINES[:3] * 30))
    prepare(PrepareSettings(train=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "bpe.model")), tmp_path / "data")
    assert "has no byte fallback: what it does not know becomes <unk>" in capsys.readouterr().err
    data = DataFolder(tmp_path / "data")
    assert data.vocabulary_size == theirs.get_piece_size()
    assert data.vocabulary.encode(data.tokenizer.tokenize(LINES[0])) == theirs.encode(LINES[0])
    assert data.meta["splits"]["train"]["unknown_rate"] > 0.05  # other scripts
    assert data.tokenizer.detokenize(data.tokenizer.tokenize("The people")) == "The people"


# --- what is wrong -------------------------------------------------------------------------------------------------


def word_piece() -> str:
    return json.dumps({"version": "1.0", "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "the": 1}}})


def without_bytes() -> str:
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": {"<unk>": 0, "a": 1}, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "model": model})


def with_ends_of_words() -> str:
    value = json.loads(byte_level().to_str())
    value["model"]["end_of_word_suffix"] = "</w>"
    return json.dumps(value)


WRONG: dict[str, tuple[str, Callable[[], str | bytes], str]] = {
    "no JSON": ("a.json", lambda: byte_level().to_str()[:-400], "is not JSON"),
    "another JSON": ("a.json", lambda: '{"model": {"type": "BPE"}}', "is no tokenizer.json"),
    "a model that is none": ("a.json", lambda: '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}}', "cannot be read"),
    "huge ids": (
        "a.json",
        lambda: '{"model": {"type": "BPE", "vocab": {"a": 2000000000}, "merges": []}}',
        "largest id is 2,000,",
    ),
    "WordPiece": ("a.json", word_piece, "with a model of BPE or Unigram"),
    "ends of words": ("a.json", with_ends_of_words, "end_of_word_suffix '</w>' is written into its pieces"),
    "no bytes": ("a.json", without_bytes, "has no pieces for all bytes"),
    "no model": ("a.model", lambda: b"not a model", "is no SentencePiece model, or was cut off"),
    "cut off": ("a.model", lambda: sentencepiece_model(**RECOGNIZER)[:-500], "or was cut off"),
    "empty": ("a.model", lambda: b"", "or was cut off"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_line_and_nothing_is_written(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, make, message = WRONG[kind]
    made = make()
    (tmp_path / name).write_bytes(made.encode() if isinstance(made, str) else made)
    (tmp_path / "a.txt").write_text("We said it.\n\nThey said so.\n\nYou too.\n\nAnd we.\n")
    code, line = last_line(command.main, capsys, tmp_path / "a.txt", "-o", tmp_path / "data", "--tokenizer", tmp_path / name)
    assert (code, message in line, str(tmp_path / name) in line) == (65, True, True), line
    assert not (tmp_path / "data").exists()


def test_a_model_that_is_cut_off_between_two_fields_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lmdist.text.piece_files import varint

    model = sentencepiece_model(**RECOGNIZER)
    place, ends = 0, []
    while place < len(model):
        _, place = varint(model, place)
        length, place = varint(model, place)
        place += length
        ends.append(place)
    (tmp_path / "a.txt").write_text("We said it.\n\n" * 4)
    for end in ends[40], ends[-2]:
        (tmp_path / "a.model").write_bytes(model[:end])
        arguments = [tmp_path / "a.txt", "-o", tmp_path / "data", "--tokenizer", tmp_path / "a.model"]
        assert last_line(command.main, capsys, *arguments)[0] == 65


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (
            ["--tokenizer=wordpunkt"],
            64,
            "tokenizer is wordpunkt; word_tokenize, .*unigram, or a file that ends in .json or .model",
        ),
        (["--tokenizer=none.json"], 66, "none.json does not exist"),
        (["--tokenizer=sentencepiece"], 64, "name its file"),
        (["--tokenizer=bpe", "--vocabulary-size=100"], 64, "vocabulary_size is 100; at least 258 are needed"),
        (["--tokenizer=bpe", "--min-count=3"], 64, "min_count creates unknown words, and pieces have none"),
        (
            ["--tokenizer=bpe", "--vocabulary=words.txt"],
            64,
            "bpe, whose pieces are learned, and words.txt has words",
        ),
        (
            ["--tokenizer=unigram", "--vocabulary=words.txt", "--extend"],
            64,
            "words.txt has words alone: leave vocabulary",
        ),
        (["--tokenizer=bpe", "--unknown=file"], 64, "pieces have no unknown ones"),
        (["--tokenizer=bpe", "--line-breaks"], 64, "line_breaks is of tokenizers of words"),
        (["--tokenizer=m.model", "--vocabulary-size=300"], 64, "the pieces of m.model are the vocabulary"),
    ],
)
def test_settings_that_contradict_pieces(flags, code, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("<unk>\n<eos>\nWe\n")
    Path("a.txt").write_text("We said it.\n\nThey said so.\n\nYou too.\n\nAnd we.\n")
    found, line = last_line(command.main, capsys, "a.txt", "-o", "data", *flags)
    assert (found, bool(re.search(message, line))) == (code, True), line
    assert not Path("data").exists()


def test_the_pieces_of_a_model_for_other_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("Other people said so.\n")
    source, output = tmp_path / "a.txt", tmp_path / "data"
    prepare(PrepareSettings(train=str(source), vocabulary=str(folder)), output)
    data, base = DataFolder(output), DataFolder(folder)
    assert data.contents == base.contents
    assert data.tokenizer.detokenize(data.vocabulary.decode(data.tokens("train")[:-1].tolist())) == "Other people said so."
    code, line = last_line(command.main, capsys, "--train", source, "-o", tmp_path / "b", "--vocabulary", folder, "--extend")
    assert (code, "has pieces, which write every text" in line) == (64, True)
    other = "unigram" if base.meta["text"]["tokenizer"] == "bpe" else "bpe"
    flags = ["--vocabulary", folder, "--tokenizer", other]
    code, line = last_line(command.main, capsys, "--train", source, "-o", tmp_path / "b", *flags)
    assert (code, f"tokenizer is {other}, and the text of" in line) == (64, True)


def test_a_file_that_changes_words_found_as_lmdist_finds_them_is_read_by_its_library(tokenizer: WordTokenizer) -> None:
    assert tokenizer.model
    assert isinstance(tokenizer.model.saved["model"], dict)
    model = tokenizer.model.saved["model"] | {"normalizer": {"type": "Lowercase"}}
    pieces = Pieces({"library": "tokenizers", "model": model})
    assert "".join(pieces.texts(pieces.encode("The People"))) == "the people"


def test_a_min_count_beside_pieces_is_refused_wherever_it_is_given(tmp_path: Path) -> None:
    frame = pytest.importorskip("pandas").DataFrame({"text": TEXTS})
    with pytest.raises(UsageError, match="min_count creates unknown words, and pieces have none"):
        prepare_frames(frame, tmp_path / "data", tokenizer="bpe", min_count=7)
    with pytest.raises(UsageError, match="min_count creates unknown words, and pieces have none"):
        command.resolve({"inputs": ["a.txt"], "tokenizer": "bpe", "min_count": 3}, {})
    assert command.resolve({"inputs": ["a.txt"], "min_count": 3}, {"tokenizer": "bpe"})[0].tokenizer == "bpe"


def test_runs_of_spaces_that_a_file_adds_are_spaces(tmp_path: Path) -> None:
    value = json.loads(byte_fallback().to_str())
    number = len(value["model"]["vocab"])
    value["model"]["vocab"]["▁▁"] = number
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    value["added_tokens"].append({"id": number, "content": "▁▁", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    pieces = read_pieces(tmp_path / "tokenizer.json")
    words = pieces.encode("people▁▁people")
    assert words.count("▁▁") == 1, words
    assert "".join(pieces.texts(words)) == "people  people"
    assert "".join(pieces.texts(pieces.encode("people  people"))) == "people  people"


def test_a_vocabulary_of_its_own_spelling_for_each_piece() -> None:
    names = ["<unk>", "<eos>", *"a ▁", "<0x0A>", "\n", "<eos> "]
    model = {"type": "BPE", "vocab": {name: number for number, name in enumerate(names)}, "merges": []}
    added = [{"id": 6, "content": "\n", "special": False}, {"id": 7, "content": "<eos> ", "special": False}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    value = {"version": "1.0", "pre_tokenizer": None, "model": model, "added_tokens": [token | flags for token in added]}
    pieces = Pieces({"library": "tokenizers", "model": value})
    assert pieces.words == ["<unk>", "<eos>", "a", "▁", "▁'", "<0x0A>", "<0x0A>'", "<eos>▁"]
    Vocabulary(pieces.words)
    assert "".join(pieces.texts(pieces.words[2:])) == "a  \n\n<eos> "
