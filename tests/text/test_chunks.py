"""Tables of every kind as DataFrames: Feather, ORC, spreadsheets, several columns of text, chunks; and DataFrames in Python."""

import csv
import doctest
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmdist
from lmdist.errors import DataError, UsageError
from lmdist.settings import PrepareSettings
from lmdist.text import chunks, from_pandas
from lmdist.text.documents import Documents
from lmdist.text.prepare import prepare
from lmdist.text.readers import Document
from lmdist.text.sources import ReadOptions


def texts(path: Path, **options) -> list[str]:
    return [document.text for document in Documents([path], ReadOptions(**options))]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def fails(path: Path, **options) -> str:
    with pytest.raises((DataError, UsageError)) as error:
        texts(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- formats -------------------------------------------------------------------------------------------------------

TABLE = {"title": ["a", "b", None, "d", "e"], "text": ["one", None, "", "NA", "five"], "year": [1, None, 2, 2, 3]}


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow", "a.orc"])
def test_files_of_pyarrow_are_read_part_by_part(tmp_path, name):
    import pyarrow as pa
    from pyarrow import feather, orc, parquet

    table = pa.table(TABLE)
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(table, path, row_group_size=2)
    elif name.endswith("orc"):
        orc.write_table(table, path)
    else:
        feather.write_feather(table, path, chunksize=2)
    documents = Documents([path], ReadOptions(group_by="year"))
    documents.check()
    assert list(documents) == [Document("one", "1"), Document("NA", "2"), Document("five", "3")]  # and not "1.0"
    assert documents.skipped == {"missing": 1, "empty": 1}
    assert (documents.bytes_read, documents.lines) == (documents.bytes, 5)
    assert texts(path, text_column=["TITLE", "text"], where="year == 2") == ["d\nNA"]
    assert "it has: title, text, year" in fails(path, text_column="body")
    assert "no table of text: leave out --no-header" in fails(path, header=False)
    assert f"{name} cannot be read: " in fails(write(path, path.read_bytes()[:-9]))


def test_an_arrow_file_is_known_without_a_name(tmp_path):
    import pyarrow as pa
    from pyarrow import feather

    feather.write_feather(pa.table(TABLE), tmp_path / "stdin")
    documents = Documents([tmp_path / "stdin"])
    assert [document.text for document in documents] == ["one", "NA", "five"]
    assert documents.notes == [f"{tmp_path / 'stdin'} was read as Feather"]


@pytest.mark.parametrize(("name", "engine"), [("a.xlsx", "openpyxl"), ("a.ods", "odf")])
def test_spreadsheets(tmp_path, name, engine):
    pytest.importorskip(engine)
    path = tmp_path / name
    file = path
    sheets = {
        "Notes": pd.DataFrame({"about": ["these are notes"]}),
        "News": pd.DataFrame({"id": [7, 8, 9, 10, 10], "content": ["one", None, "NA\nand more", 2016, "one"], "no": [1.5] * 5}),
        "More": pd.DataFrame({"content": ["six"], "id": ["x"]}),
        "Empty": pd.DataFrame(),
    }
    with pd.ExcelWriter(path, engine=engine) as writer:
        for sheet, frame in sheets.items():
            frame.to_excel(writer, sheet_name=sheet, index=False)
    for file in (path, write(tmp_path / "renamed.csv", path.read_bytes())):
        documents = Documents([file], ReadOptions(group_by="id"))
        found = list(documents)
        assert found == [Document("one", "7"), Document("NA\nand more", "9"), Document("2016", "10"), Document("six", "x")]
        assert documents.skipped == {"empty": 1, "duplicate": 1}
        assert documents.notes == [f"{file}: not read were the sheets Notes, which lack a column"]
        assert documents.bytes_read == documents.bytes
    assert "renamed.csv has no column body; it has: about" in fails(file, text_column="body")
    assert "a spreadsheet, which is no table of text: leave out --separator" in fails(file, separator=";")
    assert texts(file, header=False, text_column="1")[:2] == ["about", "these are notes"]
    damaged = tmp_path / "damaged"
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(damaged, "w") as bad:
        for member in good.namelist():
            bad.writestr(member, good.read(member) if member == "mimetype" else b"<damaged")
    assert "damaged is a spreadsheet that cannot be read: " in fails(damaged)


# --- chunks and columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_columns_of_text_are_joined(tmp_path, name):
    rows = [("A", "one", 1), ("", "two", 2), ("C", " ", 3), ("", "", 4), ("E", "five\nlines", 5)]
    path = tmp_path / name
    if name == "a.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("title", "content", "n"), *rows])
            file.write("F\n")
    else:
        path.write_text("".join(json.dumps(dict(zip(("title", "content", "n"), row, strict=True))) + "\n" for row in rows))
    documents = Documents([path], ReadOptions(text_column=["title", "content"]))
    assert [document.text for document in documents] == ["A\none", "two", "C", "E\nfive\nlines"]
    assert documents.skipped == ({"empty": 1, "missing": 1} if name == "a.csv" else {"empty": 1})
    if name == "a.csv":  # where all cells are text
        assert texts(path, text_column=["content", "n", "title"])[0] == "one\n1\nA"
    assert "has no column heading; it has: title, content, n" in fails(path, text_column=["title", "heading"])


def test_a_column_of_text_that_comes_late(tmp_path):
    rows = [{"title": "A"}, {"title": "B", "content": "two"}, {"content": "three"}, {"title": 4, "content": "four"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents = Documents([tmp_path / "a.jsonl"], ReadOptions(text_column=["title", "content"]))
    assert [document.text for document in documents] == ["A", "B\ntwo", "three"]
    assert documents.skipped == {"malformed": 1}


cells = st.text('ab"\n\r, 1é\u2028', max_size=8)


@settings(max_examples=40)
@given(st.lists(st.lists(cells, min_size=1, max_size=4), max_size=12), st.booleans(), st.integers(0, 9), st.integers(2, 40))
def test_chunks_change_nothing(tmp_path_factory, rows, in_quotes, most, characters):
    text = io.StringIO(newline="")
    if in_quotes:
        csv.writer(text).writerows(rows)
    else:
        text.write("\n".join(map(",".join, rows)))
    path = tmp_path_factory.mktemp("chunks") / "a.csv"
    path.write_text("id,title,content\r\n" + text.getvalue(), newline="")
    found = []
    for size in (1, characters, 1 << 16):
        documents = Documents([path, path], ReadOptions(rows=most, group_by="id", text_column=["title", "content"]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "CHUNK_CHARACTERS", size)
            read = list(documents)
        found.append((read, documents.skipped, documents.lines, documents.notes))
    assert found[0] == found[1] == found[2]


def test_pandas_is_imported_for_tables_only(tmp_path):
    (tmp_path / "a.txt").write_text("It is said.\n\nWe said it.\n\nThey said so.\n\nYou too.\n")
    program = "import sys; from lmdist.text.prepare import main; main(sys.argv[1:]); print(*sys.modules)"
    arguments = ["a.txt", "-o", "out", "--tokenizer", "wordpunct", "--min-count", "1"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"pandas", "pyarrow", "fsspec"} & set(done.stdout.split())


# --- DataFrames ----------------------------------------------------------------------------------------------------

QUOTES = ['"', "“", "\n", ", ", "; ", "\r", "\x1f", "\u2028"]


def frame_of(count: int) -> pd.DataFrame:
    """Articles with whatever a cell can hold, and a group that is a number."""
    contents = [f"The council {QUOTES[number % 8]}met{QUOTES[-number % 8]} {number} times." for number in range(count)]
    contents[5] = "\n".join(f"{number},a row,{number}" for number in range(12))  # like the rows of a table
    contents[7], contents[9] = contents[6], ""
    return pd.DataFrame({"id": range(count), "year": [2000.0 + number % 9 for number in range(count)], "Text": contents})


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("train.bin", "valid.bin", "test.bin", "vocab.txt", "text.json")}


def test_a_data_frame_gives_the_bytes_of_its_csv(tmp_path, capsys):
    frame = frame_of(90)
    frame.to_csv(tmp_path / "a.csv", sep="\x02", index=False, quoting=csv.QUOTE_ALL)
    values = {"group_by": "year", "where": "id != 3", "tokenizer": "wordpunct", "min_count": 1}
    prepare(PrepareSettings(inputs=[str(tmp_path / "a.csv")], separator="\x02", **values), tmp_path / "csv")
    capsys.readouterr()
    whole = lmdist.prepare(frame, tmp_path / "frame", **values)
    parts = lmdist.prepare((frame.iloc[at : at + 20] for at in range(0, 90, 20)), str(tmp_path / "parts"), **values)
    assert capsys.readouterr().out == ""
    assert files_of(tmp_path / "csv") == files_of(tmp_path / "frame") == files_of(tmp_path / "parts")
    meta = json.loads((tmp_path / "csv" / "meta.json").read_text())
    for found, name in ((whole, "frame"), (parts, "parts")):
        assert found == json.loads((tmp_path / name / "meta.json").read_text())
        assert found["skipped"] == meta["skipped"] == {"duplicate": 1, "empty": 1, "filtered": 1}
        assert found["splits"] == meta["splits"]
        assert [source["name"] for source in found["sources"]] == ["the DataFrame"]
        assert (found["prepare"]["inputs"], found["prepare"]["separator"]) == ([], "")


def test_the_bytes_of_an_ordinary_csv_too(tmp_path):
    frame = pd.DataFrame({"content": [f"It's “{number}”,\nso they say." for number in range(40)]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    prepare(PrepareSettings(inputs=[str(tmp_path / "a.csv")], tokenizer="wordpunct"), tmp_path / "csv")
    lmdist.prepare([frame], tmp_path / "frame", tokenizer="wordpunct")
    assert files_of(tmp_path / "csv") == files_of(tmp_path / "frame")


@pytest.mark.parametrize(
    ("frames", "values", "message"),
    [
        (frame_of(20), {"text_column": "body"}, "the DataFrame has no column body; it has: id, year, Text. Name one"),
        (frame_of(20), {"where": "yeer == 1"}, "the DataFrame has no column yeer"),
        (frame_of(20), {"where": "print(1)"}, "--where 'print(1)'"),
        (frame_of(20), {"text_colum": "Text"}, "prepare has no text_colum; did you mean text_column?"),
        (frame_of(20), {"inputs": ["a.csv"]}, "inputs says how files are read"),
        (frame_of(20), {"tokenizer": "bert"}, "tokenizer is bert; word_tokenize, wordpunct"),
        (frame_of(20), {"text_column": 3}, "text_column is 3; a list is expected"),
        (frame_of(20), {"text_column": ("Text", 3)}, "text_column[1] is 3; a string is expected"),
        (frame_of(20), {"min_count": "3"}, "min_count is '3'; an integer is expected"),
        (frame_of(20), {"lowercase": "no"}, "lowercase is 'no'; true or false is expected"),
        (frame_of(20), {"valid_fraction": float("nan")}, "valid_fraction is nan; a number is expected"),
        (5, {}, "is of int"),
        ([frame_of(20), frame_of(20)[["Text", "id"]]], {}, "the DataFrames have different columns"),
        ([1], {}, "is of int"),
        (frame_of(20)["Text"], {}, "is of Series"),
        ("a.csv", {}, "is of str"),
        ([], {}, "there is no DataFrame in the iterator"),
        (pd.DataFrame(), {}, "the DataFrame has no columns"),
    ],
)
def test_mistakes_with_data_frames_leave_nothing(tmp_path, frames, values, message):
    with pytest.raises((UsageError, DataError)) as error:
        lmdist.prepare(frames, tmp_path / "out", **{"tokenizer": "wordpunct", **values})
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_that_of_the_given_words_is_refused(tmp_path):
    lmdist.prepare(frame_of(20), tmp_path / "a", tokenizer="wordpunct")
    meta = lmdist.prepare(frame_of(20), tmp_path / "b", vocabulary=str(tmp_path / "a"))
    assert meta["text"]["tokenizer"] == "wordpunct"
    with pytest.raises(UsageError, match=r"tokenizer is word_tokenize, and the text of .*a was read with wordpunct"):
        lmdist.prepare(frame_of(20), tmp_path / "c", vocabulary=str(tmp_path / "a"), tokenizer="word_tokenize")


def test_a_script_without_a_guard_needs_one_for_workers_only(tmp_path):
    program = """
import sys, pandas, lmdist
from lmdist.text import inputs
inputs.ONE_PROCESS_BYTES = {"wordpunct": 0}
frame = pandas.DataFrame({"content": [f"The council met {number} times." for number in range(40)]})
lmdist.prepare(frame, sys.argv[1], tokenizer="wordpunct", overwrite=True)
print("written")
lmdist.prepare(frame, sys.argv[1], tokenizer="wordpunct", overwrite=True, workers=2)
"""
    (tmp_path / "script.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "script.py", tmp_path / "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "written\n"), done.stderr
    assert "UsageError: worker processes import the script that calls prepare: put the call under `if __name__" in done.stderr
    (tmp_path / "script.py").write_text("if __name__ == '__main__':\n" + program.replace("\n", "\n    "))
    subprocess.run([sys.executable, tmp_path / "script.py", tmp_path / "out"], check=True)


def test_workers_change_nothing_in_the_program_that_has_them(tmp_path):
    """Its own processes have NLTK with scipy, the modules that it preloads, and the environment that it was given."""
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy" / "__init__.py").touch()
    (tmp_path / "scipy" / "stats.py").write_text("def fisher_exact(table):\n    return 'exact'\n")
    (tmp_path / "preloaded.py").write_text("import os\nprocess = os.getpid()\n")
    (tmp_path / "script.py").write_text("""
import os, sys, multiprocessing, pandas, lmdist
from lmdist.text import inputs

def seen():
    import preloaded
    from nltk.metrics.association import fisher_exact
    return fisher_exact([]), preloaded.process != os.getpid(), os.environ.get("PYTHONSAFEPATH")

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    inputs.ONE_PROCESS_BYTES = {"word_tokenize": 0}
    frame = pandas.DataFrame({"content": [f"The council met {number} times." for number in range(40)]})
    for workers in (1, 2):
        lmdist.prepare(frame, "out", overwrite=True, workers=workers)
    with context.Pool(1) as pool:
        print(*seen(), *pool.apply(seen))
""")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["exact", "False", "None", "exact", "True", "None"], done.stderr


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    lmdist.prepare(frame_of(20), tmp_path / "out", tokenizer="wordpunct")
    with pytest.raises(UsageError, match="out exists: give overwrite=True to replace it, or another folder"):
        lmdist.prepare(iter([]), tmp_path / "out", tokenizer="wordpunct")
    assert lmdist.prepare(frame_of(30), tmp_path / "out", tokenizer="wordpunct", overwrite=True)["splits"]["train"]


def test_the_example_is_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(from_pandas)
    assert (failed, tried) == (0, 5)
    assert os.listdir("data") == ["news"]


def test_importing_lmdist_is_light():
    program = (
        "import sys, lmdist; assert not {'pandas', 'numpy', 'lmdist.text'} & set(sys.modules); "
        "assert lmdist.prepare.__module__ == 'lmdist.text.from_pandas'; assert not hasattr(lmdist, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
