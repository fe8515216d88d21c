"""Word vectors: three formats, packed or not, matched by word and then by lowercase; what is damaged is one line."""

from __future__ import annotations

import gzip
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.text.vectors import BY_LOWERCASE, EXACT, read_vectors, write_vectors
from lmdist.text.vocabulary import Vocabulary

WORDS = Vocabulary(["<unk>", "<eos>", "the", "The", "Paris", "straße", "unseen", "."])
ROWS = ["the 0.5 -1 2e-3", "paris 1 2 3", "PARIS 7 7 7", "Straße 4 5 6", ". 0 0 1", ". . . 9 9 9", "other 1 1 1"]


def written(path: Path, lines: list[str], header: str = "") -> Path:
    path.write_text("".join(f"{line}\n" for line in [*([header] if header else []), *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize("header", ["", "7 3", "7 3 "], ids=["GloVe", "word2vec", "fastText"])
def test_a_word_is_found_as_it_is_written_and_then_by_its_lowercase(tmp_path, header):
    found = read_vectors(written(tmp_path / "a.vec", [f"{row} " for row in ROWS] if header[3:] else ROWS, header), WORDS, 3)
    assert found.matches.tolist() == [0, 0, EXACT, BY_LOWERCASE, BY_LOWERCASE, BY_LOWERCASE, 0, EXACT]
    the, paris, strasse = [0.5, -1, 2e-3], [1, 2, 3], [4, 5, 6]
    np.testing.assert_array_equal(found.rows[2:6], np.array([the, the, paris, strasse], np.float32))
    np.testing.assert_array_equal(found.rows[7], [0, 0, 1])
    assert not found.rows[[0, 1, 6]].any()


def test_the_word_itself_wins_wherever_it_stands(tmp_path):
    for rows in (["THE 1 1", "the 2 2", "The 3 3"], ["The 3 3", "the 2 2", "THE 1 1"]):
        found = read_vectors(written(tmp_path / "a.vec", rows), WORDS, 2)
        assert found.rows[2:4, 0].tolist() == [2, 3]


def test_packed_files_are_read(tmp_path):
    plain = written(tmp_path / "a.txt", ROWS)
    (tmp_path / "a.vec.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(plain, "a.txt")
    for name in ("a.vec.gz", "a.zip"):
        np.testing.assert_array_equal(read_vectors(tmp_path / name, WORDS, 3).rows, read_vectors(plain, WORDS, 3).rows)


def damaged(folder: Path) -> dict[str, tuple[Path, type[Exception], str]]:
    """Files that are no vectors of three numbers: the error of each, and what its line says."""
    packed = gzip.compress("\n".join(ROWS * 200).encode())
    (folder / "cut.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "binary").write_bytes(b"3000 3\nthe " + np.arange(9, dtype="<f4").tobytes() * 50)
    (folder / "empty").write_bytes(b"")
    with zipfile.ZipFile(folder / "several.zip", "w") as archive:
        for name in ("a.50d.txt", "a.100d.txt"):
            archive.writestr(name, "the 1 2 3\n")
    return {
        "a missing file": (folder / "none.vec", MissingInputError, "does not exist"),
        "another size": (written(folder / "size", ["the 1 2"]), UsageError, r"of 2 numbers.*have 3.*--model\.embedding_size 2"),
        "another size by header": (written(folder / "head", ROWS, "7 300"), UsageError, "--model.embedding_size 300"),
        "rows missing": (
            written(folder / "few", ROWS, "9 3"),
            DataError,
            "truncated.* says 9 words, and it has 7",
        ),
        "a row cut off": (
            written(folder / "cut", [*ROWS, "last 1 2"]),
            DataError,
            "row 8 is not a word and 3 numbers",
        ),
        "a packed file cut off": (folder / "cut.gz", DataError, "cut.gz cannot be read"),
        "no numbers": (written(folder / "words", ["a text of words"]), DataError, "row 1 is not a word and 3 numbers"),
        "not finite": (written(folder / "nan", ["the nan 1 2"]), DataError, "row 1 is not a word"),
        "beyond fp32": (written(folder / "large", ["the 1e39 1 2"]), DataError, "row 1 is not a word"),
        "a first line of too many digits": (written(folder / "digits", ROWS, f"{'9' * 5_000} 3"), UsageError, "of 1 numbers"),
        "a binary file": (folder / "binary", DataError, "row 1 is not a word and 3 numbers"),
        "nothing": (folder / "empty", DataError, "has no word vectors"),
        "several files": (folder / "several.zip", DataError, "holds 2 files"),
    }


def test_what_is_no_file_of_vectors_is_one_line(tmp_path):
    for case, (path, error, message) in damaged(tmp_path).items():
        with warnings.catch_warnings(action="error"), pytest.raises(error, match=message) as found:
            read_vectors(path, WORDS, 3)
        assert "\n" not in str(found.value), case


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(rows=arrays(np.float32, (len(WORDS), 4), elements=numbers))
def test_what_is_written_is_read_bit_for_bit(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "written.vec"
    write_vectors(path, WORDS, rows)
    found = read_vectors(path, WORDS, 4)
    assert found.rows.tobytes() == rows.tobytes()
    assert (found.matches == EXACT).all()
