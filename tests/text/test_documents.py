"""Documents of every format, compression and encoding: no text is lost, and skipped rows are counted."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.text import readers
from lmdist.text.decoding import lines_of
from lmdist.text.documents import Documents
from lmdist.text.finding import find_files
from lmdist.text.readers import FORMATS, Document, Format, Row
from lmdist.text.sources import ReadOptions, Source

DATA = Path(os.environ.get("LMDIST_DATA", Path(__file__).parents[3] / "shared" / "data"))
COLUMNS = ["", "id", "title", "publication", "author", "date", "year", "month", "url", "content"]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def texts(path: Path, **settings) -> list[str]:
    return [document.text for document in Documents([path], ReadOptions(**settings))]


def as_csv(rows: list[list[str]], **dialect) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue()


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))), st.sampled_from(["\n", "\r\n"]))
def test_no_cell_that_csv_can_hold_is_lost(tmp_path_factory, cells, lineterminator):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    rows = [["", str(number), *[""] * 7, cell] for number, cell in enumerate(cells)]
    write(path, as_csv([COLUMNS, *rows], lineterminator=lineterminator, quoting=csv.QUOTE_ALL))
    documents = Documents([path])
    expected = [cell for cell in dict.fromkeys(cells) if cell and not cell.isspace()]
    assert [document.text for document in documents] == expected
    assert sum(documents.skipped.values()) == len(cells) - len(expected)
    assert documents.bytes_read == documents.bytes


def test_na_and_null_are_text(tmp_path):
    path = write(tmp_path / "a.csv", "id,content\n1,NA\n2,null\n3,nan\n4,\n")
    documents = Documents([path])
    assert [document.text for document in documents] == ["NA", "null", "nan"]
    assert documents.skipped == {"empty": 1}


def test_long_cells_newlines_and_quotes(tmp_path):
    long = "word " * 60_000
    path = write(tmp_path / "a.csv", f'id,content\r\n1,{long}\r\n2,"two\r\nlines, ""quoted"""\r\n')
    assert texts(path) == [long, 'two\r\nlines, "quoted"']


def test_odd_rows_are_counted_and_never_shifted(tmp_path):
    rows = ["id,content,year", "1,one,2016", "2", "3,three", "4,four,2016,more", "5,five,2016,,", "", "6,,2016", "7,one,2017"]
    documents = Documents([write(tmp_path / "a.csv", "\n".join(rows))])
    assert [document.text for document in documents] == ["one", "three", "five"]
    assert documents.skipped == {"missing": 1, "malformed": 1, "empty": 1, "duplicate": 1}


def test_a_first_row_that_is_too_long_shifts_nothing(tmp_path):
    documents = Documents([write(tmp_path / "a.csv", "id,content\n1,a,b\n2,two\n")])
    assert [document.text for document in documents] == ["two"]
    assert documents.skipped == {"malformed": 1}


def test_a_file_cut_off_inside_a_quote_loses_only_that_row(tmp_path):
    documents = Documents([write(tmp_path / "a.csv", 'id,content\n1,one\n2,"cut off\nin the')])
    assert [document.text for document in documents] == ["one"]
    assert documents.skipped == {"malformed": 1}
    assert "not closed: 1 row on 2 lines, the first at line 3" in documents.notes[0]


def test_a_cell_longer_than_any_text_is_an_open_quote(tmp_path, monkeypatch):
    monkeypatch.setattr("lmdist.text.tables.LONGEST_ROW", 1000)
    documents = Documents([write(tmp_path / "a.csv", 'id,content\n1,"open\n' + "2,more\n" * 1000)])
    assert [document.text for document in documents] == ['"open', "more"]
    assert documents.skipped == {"duplicate": 999}
    assert "in 1 row, the first at line 2" in documents.notes[0]


@pytest.mark.parametrize("name", ["content", "Text", "ARTICLE", " body "])
def test_the_usual_columns_are_found(tmp_path, name):
    assert texts(write(tmp_path / "a.csv", f"id,{name}\n1,one\n")) == ["one"]


def test_a_column_can_be_named(tmp_path):
    path = write(tmp_path / "a.csv", "content,clean_text\nraw,clean\n")
    assert texts(path, text_column="Clean_Text") == ["clean"]
    with pytest.raises(DataError, match="no column body2; it has: content, clean_text") as error:
        texts(path, text_column="body2")
    assert "a.csv" in str(error.value)


def test_without_a_usual_column_those_that_exist_are_named(tmp_path):
    with pytest.raises(DataError, match="it has: id, words"):
        texts(write(tmp_path / "a.csv", "id,words\n1,one\n"))


@pytest.mark.parametrize("data", ["", "\n"])
def test_a_table_without_a_header_is_an_error(tmp_path, data):
    with pytest.raises(DataError, match="names of its columns"):
        texts(write(tmp_path / "a.csv", data))


def test_groups(tmp_path):
    path = write(tmp_path / "a.csv", "title,content\nA,one\nB,two\n,three\nA,four\n")
    assert list(Documents([path], ReadOptions(group_by="title"))) == [
        Document("one", "A"),
        Document("two", "B"),
        Document("three", None),
        Document("four", "A"),
    ]
    with pytest.raises(DataError, match="--group-by"):
        list(Documents([path], ReadOptions(group_by="author")))


def test_tsv(tmp_path):
    assert texts(write(tmp_path / "a.tsv", "id\tcontent\n1\tone, two\n")) == ["one, two"]


def test_json_lines(tmp_path):
    rows = ['{"id": 1, "text": "one\\nmore"}', "not json", '{"id": 2}', '{"text": null}', '{"text": 5}', "", "[1]"]
    rows += ['{"text": "é \\ud83d\\ude00 \\ud800"}', '{"text": "2016", "id": "x"}']
    documents = Documents([write(tmp_path / "a.jsonl", "\n".join(rows))], ReadOptions(group_by="id"))
    assert list(documents) == [Document("one\nmore", "1"), Document("é 😀 �", None), Document("2016", "x")]
    assert documents.skipped == {"malformed": 3, "missing": 2}


def test_a_json_array_is_not_json_lines(tmp_path):
    with pytest.raises(DataError, match="one object of columns a line"):
        texts(write(tmp_path / "a.json", '[\n{"text": "one"}\n]'))


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": [1, 2, 3, 4], "text": ["one", None, "", "NA"], "year": [1, 1, 2, 2]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    documents = Documents([tmp_path / "a.parquet"], ReadOptions(group_by="year"))
    assert list(documents) == [Document("one", "1"), Document("NA", "2")]
    assert documents.skipped == {"missing": 1, "empty": 1}
    assert documents.bytes_read == documents.bytes
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        texts(write(tmp_path / "b.parquet", "no parquet"))


def read_page(source: Source) -> Iterator[Row]:
    """The text of a page between its tags: a reader as a newcomer would write it."""
    yield Document(re.sub("<[^>]*>", "", "".join(lines_of(source, newline=""))).strip(), None)


def test_a_format_is_one_function_and_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "FORMATS", (*FORMATS, Format("pages", (".page", ".pag"), read_page, has_columns=False)))
    page = b"<h1>One</h1>\n<p>two \xe9</p>"
    files = [
        write(tmp_path / "a.page", page),
        write(tmp_path / "b.PAG.gz", gzip.compress(page)),
        write(tmp_path / "c.page", ""),
    ]
    documents = Documents(files)
    assert [document.text for document in documents] == ["One\ntwo é"]
    assert documents.skipped == {"duplicate": 1, "empty": 1}
    assert documents.bytes_read == documents.bytes
    assert "1 byte is not UTF-8" in documents.notes[0]
    with pytest.raises(UsageError, match="pages, which has no columns"):
        Documents(files, ReadOptions(text_column="text")).check()


def test_plain_text_is_paragraphs_or_lines(tmp_path):
    path = write(tmp_path / "a.tokens", "\r\n one \r\ntwo\r\n\r\n \r\nthree\n\nthree\n")
    assert texts(path) == [" one \ntwo", "three", "three"]
    assert texts(path, lines=True) == ["", " one ", "two", "", " ", "three", "", "three"]
    with pytest.raises(UsageError, match="plain text"):
        texts(path, group_by="title")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"))))
def test_lines_of_plain_text_are_all_there(tmp_path_factory, lines):
    path = write(tmp_path_factory.mktemp("text") / "a.txt", "".join(f"{line}\n" for line in lines))
    assert texts(path, lines=True) == [line.removeprefix("\ufeff") if not n else line for n, line in enumerate(lines)]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files(tmp_path, suffix, compress):
    data = compress(b"id,content\n1,one\n")
    assert texts(write(tmp_path / f"a.csv.{suffix}", data)) == ["one"]
    assert texts(write(tmp_path / f"a.txt.{suffix}", compress(b"one\n"))) == ["one"]
    with pytest.raises(DataError, match="cannot be read"):
        texts(write(tmp_path / f"b.csv.{suffix}", data[: len(data) - 9]))
    assert texts(write(tmp_path / f"c.csv.{suffix}", "id,content\n1,not packed\n")) == ["not packed"]
    assert texts(write(tmp_path / "d.txt", compress(compress(b"packed twice, under another name")))) == [
        "packed twice, under another name"
    ]


def test_zstd_with_its_extra_and_without(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    path = write(tmp_path / "a.csv.zst", zstandard.compress(b"id,content\n1,one\n"))
    assert texts(path) == ["one"]
    with pytest.raises(DataError, match=r"b\.csv\.zst cannot be read"):
        texts(write(tmp_path / "b.csv.zst", path.read_bytes()[:8] + b"damaged"))
    monkeypatch.setattr("lmdist.extras.is_installed", lambda package: package != "zstandard")
    with pytest.raises(UsageError, match=r"zstandard is not installed: pip install .*\[zstd\]"):
        texts(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_encodings_of_unicode_are_known(tmp_path, encoding):
    documents = Documents([write(tmp_path / "a.csv", "content,id\n“é”,1\n".encode(encoding))])
    assert [document.text for document in documents] == ["“é”"]
    assert documents.notes == []


def test_undecodable_bytes_are_windows_1252_and_counted(tmp_path):
    documents = Documents([write(tmp_path / "a.csv", "content\nü\n".encode() + b"caf\xe9 \x93so\x94 \x81\n")])
    assert [document.text for document in documents] == ["ü", "café “so” �"]
    assert "4 bytes are not UTF-8" in documents.notes[0]


def test_bytes_that_are_no_text_are_found_where_they_are(tmp_path):
    path = write(tmp_path / "a.csv", b"content\n" + b"the river rose again\n" * 20_000 + b"\xd0\xcf" * 300_000)
    with pytest.raises(DataError, match=r"a\.csv, after line 20,002, is not UTF-8: 600,000 bytes"):
        texts(path)


def test_another_encoding_can_be_named(tmp_path):
    path = write(tmp_path / "a.csv", "content\n中文\n".encode("gb18030"))
    assert texts(path, encoding="gb18030") == ["中文"]
    with pytest.raises(DataError, match=r"a\.csv is not ascii"):
        texts(path, encoding="ascii")
    with pytest.raises(UsageError, match="nonsense"):
        Documents([path], ReadOptions(encoding="nonsense"))


def test_the_first_rows_of_all_files(tmp_path):
    files = [write(tmp_path / name, "content\na" + name + "\n\nb" + name + "\n") for name in ("1.csv", "2.csv")]
    assert [document.text for document in Documents(files, ReadOptions(rows=3))] == ["a1.csv", "b1.csv", "a2.csv"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.csv.gz"])
def test_progress_is_the_bytes_on_the_disk(tmp_path, name):
    rows = [json.dumps({"content": os.urandom(500).hex()}) if "json" in name else os.urandom(500).hex() for _ in range(2000)]
    data = "\n\n".join(["content", *rows] if "csv" in name else rows).encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    documents = Documents([path, write(tmp_path / "b.csv", "content\none\n")])
    seen = [documents.bytes_read for _ in documents]
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    middle = seen[len(rows) // 2] / path.stat().st_size
    assert 0.3 < middle < 0.7
    assert documents.bytes_read == documents.bytes


def test_documents_can_be_read_again(tmp_path):
    documents = Documents([write(tmp_path / "a.csv", "content\none\none\n")])
    assert list(documents) == list(documents) == [Document("one", None)]
    assert documents.skipped == {"duplicate": 1}


def test_globs_and_missing_files(tmp_path, monkeypatch):
    for name in ("articles1.csv", "articles2.csv", "notes.txt"):
        write(tmp_path / name, "content\none\n")
    found = find_files([str(tmp_path / "articles1.csv"), str(tmp_path / "*.csv")])
    assert [path.name for path in found] == ["articles1.csv", "articles2.csv"]
    with pytest.raises(MissingInputError, match=r"article1\.csv does not exist; .* has: articles"):
        find_files([str(tmp_path / "article1.csv")])
    with pytest.raises(MissingInputError, match=r"no file matches .*/\*\.parquet; .* has: articles1\.csv, "):
        find_files([str(tmp_path / "*.parquet")])
    for name in ("a.csv", "*.csv"):
        with pytest.raises(MissingInputError, match=r"; there is no folder .*/no$"):
            find_files([str(tmp_path / "no" / name)])
    write(tmp_path / "odd[1].csv", "content\n")
    assert find_files([str(tmp_path / "odd[1].csv")])


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["a.txt", "b.txt", "c.csv", "d.jpg", "e.jpg", "f.jpg"], "; name files in it, like '{}/*.txt'"),
        (["a.csv.gz", "b.JSON.gz", "c.csv.gz"], "; name files in it, like '{}/*.csv.gz'"),
        (["sub/a.txt", ".git/b.csv", ".c.csv"], "; name files in it, like '{}/**/*.txt'"),
        (["README.md.txt", "NOTES.csv", "sub/a.txt", "sub/b.txt"], "; name files in it, like '{}/**/*.txt'"),
        (["sub/wiki.train.tokens", "notes.md"], "; name files in it; it has: notes.md, sub/wiki.train.tokens"),
        ([".hidden"], "; it has no files"),
    ],
)
def test_of_a_folder_those_files_are_suggested_that_it_has(tmp_path, names, advice):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "")
    with pytest.raises(UsageError) as caught:
        find_files([str(tmp_path)])
    assert str(caught.value) == f"{tmp_path} is a folder{advice.format(tmp_path)}"


@pytest.mark.parametrize(
    ("name", "settings", "count", "skipped"),
    [
        ("news-sample/news_sample.csv", {}, 239, {"duplicate": 11}),
        ("news-sample/hhs_press_releases_2019.csv", {"text_column": "clean_text"}, 52, {}),
        ("bbc-news/bbc_train.csv", {}, 1510, {"duplicate": 47}),
        ("bbc-news/bbc_val.csv", {"group_by": "category"}, 328, {"duplicate": 6}),
        ("bbc-news/bbc_test.csv", {}, 331, {"duplicate": 3}),
    ],
)
def test_of_real_files_nothing_is_lost(name, settings, count, skipped):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    documents = Documents([path], ReadOptions(**settings))
    assert len(list(documents)) == count
    assert documents.skipped == skipped


def test_json_rows_are_those_of_the_json_module(tmp_path):
    rows = [{"text": f"text {number}", "n": number} for number in range(1000)]
    path = write(tmp_path / "a.ndjson.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert texts(path) == [row["text"] for row in rows]
