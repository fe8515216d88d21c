"""Files as people have them: without a header, with an open quote, packed under another name, in another encoding."""

import bz2
import csv
import gzip
import io
import itertools
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdist.counted import counted
from lmdist.errors import DataError, UsageError
from lmdist.settings import PrepareSettings, ReadSettings
from lmdist.text.documents import Documents
from lmdist.text.finding import find_files
from lmdist.text.prepare import prepare
from lmdist.text.sources import ReadOptions
from lmdist.text.tables import Table
from lmdist.training import evaluate
from lmdist.training.data import DataFolder

SUBJECTS = ["The river", "A tired clerk", "Mr. Holm", "Our mayor", "The council"]
VERBS = ["hid", "found", "painted", "carried"]
OBJECTS = ["the green door", "a box of nails", "the last train", "an empty barn"]
SENTENCES = [" ".join(words) + "." for words in itertools.product(SUBJECTS, VERBS, OBJECTS)]  # 80, all different


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path, **options) -> tuple[list[str], Documents]:
    """The texts of a file, of which nothing that matters is lost, and what else is known of it."""
    documents = Documents([path], ReadOptions(**options))
    documents.check()
    texts = [document.text for document in documents]
    documents.check_losses()
    return texts, documents


def fails(path: Path, **options) -> str:
    """The message of what cannot be read."""
    with pytest.raises((DataError, UsageError)) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def csv_of(texts: list[str], separator: str = ",", header: str = "id,content\n") -> str:
    return header.replace(",", separator) + "".join(f"{number}{separator}{text}\n" for number, text in enumerate(texts))


def zip_of(members: dict[str, str | bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def command(*arguments: object, **options) -> subprocess.CompletedProcess[bytes]:
    """lmdist-prepare as a user runs it."""
    full = [sys.executable, "-m", "lmdist.text.prepare", "--tokenizer", "wordpunct", *map(str, arguments)]
    return subprocess.run(full, capture_output=True, timeout=600, **options)


# --- quotes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stray", [[0], [20], [79], [20, 60], range(0, 80, 7)])
def test_a_quote_that_is_never_closed_costs_no_row(tmp_path, stray):
    texts = [f'"Never closed: {text}' if number in stray else text for number, text in enumerate(SENTENCES)]
    found, documents = read(write(tmp_path / "a.csv", csv_of(texts)))
    assert found == texts
    assert documents.skipped == {}
    assert f"not closed as it should be in {counted(len(stray), 'row')}, the first at line {stray[0] + 2}" in documents.notes[0]


def test_quotes_after_a_stray_one_are_quotes(tmp_path):
    rows = ["1,one", '2,"stray', '3,"quoted, and\ntwo lines"', '4,"a ""word"""', '5,"Hello" she said', '6,"spaces" ', "7,end"]
    found, documents = read(write(tmp_path / "a.csv", "\n".join(["id,content", *rows])))
    assert found == ["one", '"stray', "quoted, and\ntwo lines", 'a "word"', '"Hello" she said', "spaces", "end"]
    assert "in 2 rows, the first at line 3" in documents.notes[0]


def test_a_quote_that_closes_another_swallows_no_rows(tmp_path):
    texts = list(SENTENCES)
    texts[3], texts[9] = f'"{texts[3]}', f'{texts[9]}"'  # as well-formed as a cell of seven lines
    assert read(write(tmp_path / "a.csv", csv_of(texts)))[0] == texts
    assert read(write(tmp_path / "a.tsv", csv_of(texts, "\t")))[0] == texts
    texts[3:10] = [texts[3], texts[9]]  # in TSV two are enough
    assert read(write(tmp_path / "b.tsv", csv_of(texts, "\t")))[0] == texts


def test_cells_with_lines_like_rows_are_cells_where_they_are_quoted_well(tmp_path):
    cells = ["Medals\n1, Norway\n2, Sweden", "two\nlines, here", 'a "quoted", word', "a\tb\nc\td", "x,y\n" * 9]
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    for separator in ",;|\t":
        path = write(tmp_path / "a.csv", csv_of(quoted, separator))
        assert read(path)[0] == cells


@given(
    st.lists(st.text('ab,;"\n\r 1', max_size=12), min_size=1, max_size=12), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
)
def test_rows_that_are_written_well_are_those_of_the_csv_module(cells, quoting):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=quoting).writerows(["x", cell, "y"] for cell in cells)
    lines = io.StringIO(text.getvalue(), newline="").readlines()
    table = Table(iter(lines), ",", 3)
    assert [list(row) for row in table] == list(csv.reader(lines))
    assert not table.has_open_quote


# --- lost lines ----------------------------------------------------------------------------------------------------


def test_more_than_a_hundredth_of_the_lines_lost_is_an_error_unless_allowed(tmp_path):
    texts = SENTENCES * 3
    texts = [f"{text} {number}" for number, text in enumerate(texts)]
    texts[100] += ",x"
    path = write(tmp_path / "a.csv", csv_of(texts))
    found, documents = read(path)  # 1 of 241
    assert len(found) == 239
    assert documents.notes == [f"{path}: more cells than the first line has: 1 row on 1 line, the first at line 102"]
    texts[50] = '"two\nlines",x'
    texts[60] = "line\nbreak"
    path = write(tmp_path / "a.csv", csv_of(texts))
    message = fails(path)
    assert "4 of 243 lines (1.6%) cannot be read" in message
    assert "more cells than the first line has: 2 rows on 3 lines, the first at line 52" in message
    assert "the row ends before the column of the text: 1 row on 1 line, the first at line 64" in message
    assert "--allow-losses" in message
    found, documents = read(path, allow_losses=True)
    assert len(found) == 238
    assert documents.skipped == {"malformed": 2, "missing": 1}
    assert (documents.lines, documents.lost_lines) == (243, 4)


def test_losses_of_json_lines_have_their_reasons(tmp_path):
    rows = [json.dumps({"text": text}) for text in SENTENCES * 4]
    rows[5], rows[7] = "{", '{"text": 5}'
    _, documents = read(write(tmp_path / "a.jsonl", "\n".join(rows)))
    assert [note.partition(": ")[2] for note in documents.notes] == [
        "not an object in JSON: 1 row on 1 line, the first at line 6",
        "the cell is not text: 1 row on 1 line, the first at line 8",
    ]


def test_a_column_that_the_first_objects_lack(tmp_path):
    rows = [{"title": "only a title"}, {"title": "t", "text": "one"}, {"text": "two", "id": "x"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    documents = Documents([path], ReadOptions(group_by="id"))
    documents.check()
    assert [(document.text, document.group) for document in documents] == [("one", None), ("two", "x")]
    assert documents.skipped == {"missing": 1}
    assert "has no column body; it has: title, text, id" in fails(path, text_column="body")
    assert "has no column when" in fails(path, group_by="when")
    assert "--group-by (in a recipe prepare.group_by), or leave it out" in fails(path, group_by="when")


def test_a_column_of_groups_that_no_object_has_is_known_before_a_large_file_is_read(tmp_path):
    rows = [json.dumps({"text": f"text {number}"}) for number in range(2000)]
    path = write(tmp_path / "a.jsonl", "\n".join([*rows, json.dumps({"text": "the last", "when": "late"})]))
    documents = Documents([path], ReadOptions(group_by="when"))
    with pytest.raises(DataError, match=r"a\.jsonl has no column when; it has: text"):
        documents.check()
    rows[900] = json.dumps({"text": "in time", "when": "early"})
    write(path, "\n".join(rows))
    documents.check()
    assert [document.group for document in documents if document.group] == ["early"]


def test_a_file_with_the_mark_of_utf_32_that_is_damaged_is_called_so(tmp_path):
    assert "a.txt is not UTF-32: " in fails(write(tmp_path / "a.txt", b"\xff\xfe\0\0" + b"\xff" * 4))
    assert "a.txt is not UTF-16: " in fails(write(tmp_path / "a.txt", b"\xff\xfe\x00\xd8a\0"))


# --- separators and headers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_separators_are_recognized(tmp_path, separator, name):
    texts = [f"{text} Or{', not' * (number % 3)}." if separator != "," else text for number, text in enumerate(SENTENCES)]
    path = write(tmp_path / name, csv_of(texts, separator))
    assert read(path)[0] == texts
    body = write(tmp_path / f"body.{name}", path.read_text().partition("\n")[2])
    assert read(body, header=False, text_column="2")[0] == texts


def test_a_separator_can_be_named(tmp_path):
    path = write(tmp_path / "a.csv", csv_of(SENTENCES, "^"))
    assert "it has: id^content" in fails(path)
    assert read(path, separator="^")[0] == SENTENCES
    assert ReadSettings(separator="tab").separator == ReadSettings(separator="\\t").separator == "\t"
    for wrong in ("ab", '"', "\n"):
        with pytest.raises(UsageError, match="one character"):
            ReadSettings(separator=wrong)
    assert "no table" in fails(write(tmp_path / "a.txt", "a\n"), separator=";")


def test_a_table_without_a_header_says_how_to_go_on(tmp_path):
    path = write(
        tmp_path / "a.csv", "".join(f'"{number}","title {number}","{text}"\r\n' for number, text in enumerate(SENTENCES))
    )
    assert "if these are no names but a first row, give --no-header --text-column 3" in fails(path)
    message = fails(path, header=False)
    assert "3 columns and no header: --text-column is expected to be a number from 1 to 3; the longest" in message
    assert "number from 1 to 3" in fails(path, header=False, text_column="4")
    found, _ = read(path, header=False, text_column="3")
    assert found == SENTENCES
    groups = Documents([path], ReadOptions(header=False, text_column="3", group_by="2"))
    assert next(iter(groups)).group == "title 0"
    assert read(write(tmp_path / "b.csv", "one\ntwo\n"), header=False)[0] == ["one", "two"]


# --- packed, binary, encoded ---------------------------------------------------------------------------------------


def test_zip_archives(tmp_path):
    table = csv_of(SENTENCES)
    one = write(tmp_path / "news.csv.zip", zip_of({"news.csv": table}))
    assert read(one)[0] == SENTENCES
    more = csv_of(["another"])
    members = {"b.csv": more, "a/news.csv.gz": gzip.compress(table.encode()), "README.txt": "notes", "__MACOSX/a": "x"}
    found, documents = read(write(tmp_path / "news", zip_of(members)))
    assert found == [*SENTENCES, "another"]
    assert documents.notes == [f"{tmp_path / 'news'}: not read were README.txt"]
    texts = write(tmp_path / "texts.zip", zip_of({"b.txt": "two\n\nthree\n", "a.txt": "one\n"}))
    assert read(texts)[0] == ["one", "two", "three"]
    assert "texts.zip: a.txt is not utf-16" in fails(texts, encoding="utf-16")
    assert "an archive in an archive" in fails(write(tmp_path / "c.zip", zip_of({"d.zip": zip_of({"e.txt": "e"})})))
    assert "without a file" in fails(write(tmp_path / "d.zip", zip_of({})))
    assert "cannot be read" in fails(write(tmp_path / "e.zip", one.read_bytes()[:-30]))
    locked = bytearray(one.read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    assert "news.csv is encrypted" in fails(write(tmp_path / "g.zip", bytes(locked)))
    assert "a spreadsheet" in fails(write(tmp_path / "f.xlsx", zip_of({"[Content_Types].xml": "", "xl/workbook.xml": ""})))


def test_packed_files_under_another_name(tmp_path):
    text = "\n\n".join(SENTENCES).encode()
    assert read(write(tmp_path / "really_gz.txt", gzip.compress(text)))[0] == SENTENCES
    assert read(write(tmp_path / "a.csv", bz2.compress(csv_of(SENTENCES).encode())))[0] == SENTENCES


def test_parquet_in_an_archive_and_without_a_name(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "table")
    data = (tmp_path / "table").read_bytes()
    found, documents = read(write(tmp_path / "a.csv", data))
    assert (found, documents.notes) == (["one", "two"], [f"{tmp_path / 'a.csv'} was read as Parquet"])
    assert read(write(tmp_path / "a.parquet", data))[1].notes == []
    assert read(tmp_path / "table")[0] == read(write(tmp_path / "a.zip", zip_of({"a.parquet": data})))[0] == ["one", "two"]


def test_files_without_an_extension_are_read_as_what_they_hold(tmp_path):
    long = "word " * 20_000
    rows = [json.dumps({"id": number, "text": text}) for number, text in enumerate([long, *SENTENCES])]
    assert read(write(tmp_path / "a", "\n".join(rows)))[0] == [long, *SENTENCES]
    found, documents = read(write(tmp_path / "b.2019", csv_of(SENTENCES, ";")))
    assert (found, documents.notes) == (SENTENCES, [f"{tmp_path / 'b.2019'} was read as CSV"])
    found, documents = read(write(tmp_path / "c.md", "Text\n\nContent, of a kind\n\n{no: json}\n"))
    assert (found, documents.notes) == (["Text", "Content, of a kind", "{no: json}"], [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.4\n" + random.Random(1).randbytes(5000), "is not text but a PDF: save its text"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not text but an image: name files of text"),
        (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar  " + bytes(900), mtime=0), "a tar archive: unpack it"),
        (random.Random(2).randbytes(5000), "is not text: "),
        (bytes(range(128, 256)) * 50, "is not UTF-8: "),
        ("今天天气很好，我们去公园散步。\n".encode("gb18030") * 20, "name its encoding by --encoding"),
        ("Мы гуляем в парке.\n".encode("cp1251") * 20, "name its encoding by --encoding"),
        ("The river hid.\n".encode("utf-16-le") * 20, "give --encoding utf-16-le"),
        ("今天天气很好，我们去公园散步。\n".encode("utf-16-be") * 20, "give --encoding utf-16-be"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path, data, message):
    assert message in fails(write(tmp_path / "report.txt", data))


def test_what_seems_to_be_meant_otherwise_is_said(tmp_path):
    table = csv_of(SENTENCES)
    assert "names columns; if it is a table, give it the name of one" in read(write(tmp_path / "a.txt", table))[1].notes[0]
    assert "give a table the name of one, such as news.csv" in fails(tmp_path / "a.txt", text_column="content")
    array = write(tmp_path / "a.json", json.dumps([{"content": text} for text in SENTENCES]))
    assert "it is one array: jq -c '.[]' news.json > news.jsonl" in fails(array)
    assert "it is one array" not in fails(write(tmp_path / "b.jsonl", '["a", "b"]\n["c", "d"]\n'))
    carets = write(tmp_path / "carets.csv", "id^title^content\n1^The river^It rose.\n")
    for options in ({}, {"header": False, "text_column": "3"}):
        assert "if its cells are separated by ^, give --separator '^'" in fails(carets, **options)
    assert "--separator" not in fails(write(tmp_path / "prose.csv", "It was a well-known, twenty-one-page book.\n"))
    csv = write(tmp_path / "a.csv", table)
    assert "one by one: --text-column id --text-column content" in fails(csv, text_column="id, content")
    assert "if Vox is not a column but a text, it stands in quotes: 'Vox'" in fails(csv, where="content == Vox")


@pytest.mark.parametrize("encoding", ["utf-32", "utf-16"])
def test_encodings_with_a_mark_are_known(tmp_path, encoding):
    assert read(write(tmp_path / "a.txt", "The café.\n".encode(encoding)))[0] == ["The café."]


def test_the_note_on_the_encoding_stays_with_rows(tmp_path):
    texts = [f"{text} The café owner’s “boss”." for text in SENTENCES]
    path = write(tmp_path / "a.csv", csv_of(texts).encode("cp1252"))
    found, documents = read(path, rows=10)
    assert found == texts[:10]
    assert "bytes are not UTF-8 and were read as Windows-1252, as in 'door. The café owner’s “boss”.'" in documents.notes[0]


# --- what is read of which files -----------------------------------------------------------------------------------


def test_a_sentence_a_line_is_offered(tmp_path, capsys):
    path = write(tmp_path / "sentences.txt", "\n".join(SENTENCES))
    found, documents = read(path)
    assert len(found) == 1
    assert "has 80 lines and no blank line, so it is one document; --lines reads each line" in documents.notes[0]
    with pytest.raises(DataError, match="or --lines where each line of plain text is a document"):
        prepare(PrepareSettings(inputs=[str(path)], tokenizer="wordpunct"), tmp_path / "out")
    assert "--lines reads each line" in capsys.readouterr().err
    found, documents = read(path, lines=True)
    assert (found, documents.notes) == (SENTENCES, [])


def test_rows_that_end_before_the_last_file_say_so(tmp_path):
    files = [write(tmp_path / name, csv_of(SENTENCES)) for name in ("1.csv", "2.csv", "3.csv")]
    documents = Documents(files, ReadOptions(rows=5))
    assert len(list(documents)) == 5
    assert documents.notes == [f"--rows 5 ended in {files[0]}; not read were {files[1]}, {files[2]}"]


def test_stdin_and_pipes_are_read_as_files_are(tmp_path):
    data = csv_of(SENTENCES).encode()
    write(tmp_path / "news.csv", data)
    assert command("news.csv", "-o", "a", cwd=tmp_path).returncode == 0
    done = command("-", "-o", "b", cwd=tmp_path, input=gzip.compress(data))
    assert done.returncode == 0, done.stderr
    assert b"note: - was read as CSV" in done.stderr
    for name in ("train.bin", "valid.bin", "test.bin", "vocab.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    assert meta["sources"] == [{"name": "-", "bytes": len(gzip.compress(data))}]


def test_a_split_can_have_several_files(tmp_path):
    for name, texts in {"a": SENTENCES[:30], "b": SENTENCES[30:60], "c": SENTENCES[60:]}.items():
        write(tmp_path / f"{name}.txt", "\n".join(texts))
    done = command("--train", "a.txt", "b.txt", "--valid", "c.txt", "--lines", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert {split: facts["documents"] for split, facts in meta["splits"].items()} == {"train": 60, "valid": 20}
    assert [source["name"] for source in meta["sources"]] == ["a.txt", "b.txt", "c.txt"]
    assert meta["prepare"]["train"] == ["a.txt", "b.txt"]
    assert find_files(PrepareSettings(train=str(tmp_path / "[ab].txt")).files("train")) == [
        tmp_path / "a.txt",
        tmp_path / "b.txt",
    ]


# --- lmdist-evaluate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("twocols.csv", csv_of(SENTENCES, header="headline,short\n"), {"text_column": "short"}),
        ("dups.csv", csv_of(SENTENCES * 3), {}),
        ("broken.csv", csv_of([text + ",x" * (n % 2) for n, text in enumerate(SENTENCES)]), {"allow_losses": True}),
        ("semicolon.csv", csv_of([f"{text} café" for text in SENTENCES], ";").encode("cp1252"), {"rows": 20}),
        ("lines.txt", "\n".join([*SENTENCES[:9], "", *SENTENCES[:9]]), {"lines": True}),
        ("body.csv", "".join(f"{text}|{n}\n" for n, text in enumerate(SENTENCES)), {"header": False, "text_column": "1"}),
    ],
)
def test_evaluate_reads_as_prepare_does(tmp_path, capsys, name, data, options):
    write(tmp_path / name, data)
    write(tmp_path / name.replace(".", ".train."), data)
    splits = {"train": str(tmp_path / name.replace(".", ".train.")), "test": str(tmp_path / name)}
    prepare(PrepareSettings(**splits, tokenizer="wordpunct", **options), tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    notes = [line for line in capsys.readouterr().err.splitlines() if f"/{name}" in line and line.startswith("note")]
    words: Any = DataFolder(tmp_path / "data")  # which has a tokenizer and a vocabulary, as a checkpoint has
    found = evaluate.read_file(words, str(tmp_path / name), ReadSettings(**options))
    np.testing.assert_array_equal(found.tokens, np.fromfile(tmp_path / "data" / "test.bin", "<u2"))
    assert found.documents == meta["splits"]["test"]["documents"]
    assert {reason: 2 * count for reason, count in found.skipped.items()} == meta["skipped"]  # of both files
    assert capsys.readouterr().err.splitlines() == [f"lmdist-evaluate: {note}" for note in notes]


def test_evaluate_has_the_flags_of_reading(tmp_path, capsys):
    found = evaluate.parser().parse_args(["run", "--file", "a.csv", "--no-header", "--text-column", "3", "--separator", "tab"])
    assert evaluate.read_settings(found) == ReadSettings(text_column="3", header=False, separator="\t")
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["run", "--text-column", "short"])
    assert ended.value.code == 64
    assert "--text-column says how --file is read" in capsys.readouterr().err
