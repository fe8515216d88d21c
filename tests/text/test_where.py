"""--where: what it leaves, in every format and whatever the chunks, and that no string of it is run."""

import json
import operator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdist.config import read_section
from lmdist.errors import DataError, UsageError
from lmdist.settings import PrepareSettings, ReadSettings
from lmdist.text import chunks, prepare
from lmdist.text.documents import Documents
from lmdist.text.sources import ReadOptions
from lmdist.text.where import Condition
from support.failures import last_line, only_line

HEADER = ["content", "publication", "year", "page no", "date"]
ROWS = [
    ["one", "Atlantic", "2016.0", "7", "2016-05-01"],
    ["two", "Atlantic", "2015", "12", "2015-12-31"],
    ["three", "Vox", "2017", "", "2017-01-01"],
    ["four", "It's `Vox`", "n/a", "7.5", ""],
    ["five", "", "9", "70", "2016-01-01"],
]


def write(path: Path, rows: list[list[str]]) -> Path:
    """Rows as CSV, JSON Lines or Parquet, by the name."""
    if path.suffix == ".csv":
        path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(rows[0], row, strict=True))) + "\n" for row in rows[1:]))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        columns = dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True))
        parquet.write_table(pa.table(columns), path)
    return path


def left(path: Path, where: str, **options) -> list[str]:
    """The texts of the rows that a condition leaves; all others are counted."""
    documents = Documents([path], ReadOptions(where=where, **options))
    documents.check()
    texts = [document.text for document in documents]
    assert len(texts) + documents.skipped["filtered"] == len(ROWS)
    assert documents.skipped.keys() <= {"filtered"}
    assert documents.notes == []
    return texts


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("where", "texts"),
    [
        ("publication == 'Atlantic' and year >= 2016", "one"),
        ("year >= 2016", "one three"),
        ("year == 2016", "one"),
        ("year < 10", "five"),  # as texts 2016 is less than 9
        ("year != 2016", "two three four five"),
        ("2015 <= year < 2017", "one two"),
        ("year == '2015'", "two"),
        ("year in [2015, 2017.0]", "two three"),
        ("year in ('2015', '2016.0')", "one two"),
        ("publication not in ['Atlantic', \"Vox\"]", "four five"),
        ("publication == \"It's `Vox`\" or publication == ''", "four five"),
        ("not (publication == 'Vox') and not year < 2016", "one four"),
        ("(publication == 'Vox') | (publication == 'Atlantic') & (year == 2015)", "two three"),
        ("~(publication == 'Atlantic')", "three four five"),
        ("`page no` * 2 - 1 >= 14", "two four five"),
        ("year % 2 == 0 and -year < +0", "one"),
        ("date >= '2016-01-01'", "one three five"),
        ("PUBLICATION == 'Vox'", "three"),
        ("`page no` < year", "one two"),
        ("publication == date", ""),
        ("content == 'one'\nor content == 'two'  # a comment & no more", "one"),
    ],
)
def test_what_is_left(tmp_path, suffix, where, texts):
    if "\n" in where:
        where, texts = f"({where}\n)", "one two"
    assert left(write(tmp_path / f"a.{suffix}", [HEADER, *ROWS]), where) == texts.split()


@given(
    st.lists(st.one_of(st.integers(-30, 30), st.floats(-30, 30), st.sampled_from(["", "x", "1e1"])), min_size=1, max_size=8),
    st.integers(-30, 30),
    st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    st.integers(1, 60),
)
@settings(max_examples=40)
def test_numbers_are_numbers_whatever_rows_share_a_chunk(tmp_path_factory, cells, bound, sign, characters):
    folder = tmp_path_factory.mktemp("where")
    rows = [["content", "n"], *([f"text {number}", str(cell)] for number, cell in enumerate(cells))]
    documents = Documents([write(folder / "a.csv", rows)], ReadOptions(where=f"n {sign} {bound}"))
    numbers = [float("nan") if cell in ("", "x") else float(cell) for cell in cells]
    holds = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}[
        sign
    ]
    expected = [f"text {n}" for n, number in enumerate(numbers) if holds(number, bound)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_CHARACTERS", characters)
        assert [document.text for document in documents] == expected


def test_typed_cells_are_compared_as_those_of_csv_are(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = {
        "text": list("abcd"),
        "year": [2016, None, 2015, 2016],
        "true": [True, False, None, True],
        "list": [[1], [], [2], []],
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.parquet", "a.jsonl"):
        for where, texts in {"year == 2016": "ad", "year == '2016'": "ad", "year == ''": "b", "true == 'True'": "ad"}.items():
            documents = Documents([tmp_path / name], ReadOptions(where=where))
            assert "".join(document.text for document in documents) == texts, where
        documents = Documents([tmp_path / name], ReadOptions(where="list > 0 or true > 0 or year == 2015"))
        assert [document.text for document in documents] == ["c"]


def test_columns_without_names_have_numbers(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    assert left(path, "`2` == 'Vox' and `3` > 2000", header=False, text_column="1") == ["three"]
    with pytest.raises(DataError, match="--where is expected to be a number from 1 to 5"):
        left(path, "year > 2000", header=False, text_column="1")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_column_that_does_not_exist_names_those_that_do(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", [HEADER, *ROWS])
    with pytest.raises(DataError) as error:
        left(path, "yeer > 2000")
    assert f"a.{suffix} has no column yeer; it has: content, publication, year, page no, date. Name" in str(error.value)
    assert "--where (in a recipe prepare.where), or leave it out" in str(error.value)


HOSTILE = [
    "__import__('os').system('touch hacked') == 0",
    "@pandas.eval('1') == 1",
    "@__builtins__",
    "year == @year",
    "year.__class__ == 1",
    "publication.str.contains('A')",
    "publication.map(print) == 1",
    "year[0] == 2016",
    "(lambda: 1)() == year",
    "[x for x in year] == year",
    "year in [x for x in (1, 2)]",
    "year in [__import__('os')]",
    "f'{__import__(\"os\")}' == publication",
    "b'Atlantic' == publication",
    "`__import__('os')` == 1 or __import__('os') == 1",
    "`a`.__class__ == 1",
    "(year := 3) == 3",
    "year = 3",
    "year == 3; import os",
    "year == 3\nimport os",
    "year if year == 3 else year",
    "*year == 3",
    "year is None",
    "year == True",
    "year == None",
    "year == 1j",
    "year == ...",
    "year > 9**9**9",
    "year << 3 == 3",
    "year @ 3 == 3",
    "publication == 'a' * 9999999999",
    "year > 1 / 0",
    "1 == 1",
    "True",
    "year",
    "'Atlantic'",
    "'A' in publication",
    "year in []",
    "year in [1, 'a']",
    "year == 2016 == 'a'",
    "year == 2016 and year == 'Atlantic'",
    "year + 'a' > 3",
    "year > 1e999 * 9" + "9" * 5000,
    "year == 1" + "0" * 400,
    "year == -9007199254740993",
    "year in [1, 9007199254740992]",
    "year ==",
    "year == 'Atlantic",
    "year == `2016",
    "",
    "year == '\0'",
    "\0",
    "(" * 3000 + "year == 1" + ")" * 3000,
    "not " * 2400 + "year == 1",
    "-" * 9000 + "year == 1",
    "year == " + "-" * 9000 + "1",
    "year == 1 or " * 3000 + "year == 1",
    "in_backticks_0 == 1 and in_backticks_0 == 'a' and `year` == 1",
    "column_0 == 1 and constant_0 == 'a' and column_0 == 'b'",
]


@pytest.mark.parametrize("where", HOSTILE)
def test_what_is_no_condition_is_refused_before_anything_is_read(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        Condition(where)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert not list(tmp_path.iterdir())


def test_pandas_sees_names_of_ours_and_nothing_of_the_users():
    condition = Condition(
        "`os.system('x')` == '__import__' and (index >= -3 or `@a` in ['`', \"'\"]) and not column_1 != '\\\\'"
    )
    expected = "((column_0 == constant_0)) and (((column_1 >= constant_1)) or (column_2 in constant_2))"
    assert condition.expression == f"{expected} and (not ((column_3 != constant_3)))"
    assert list(condition.kinds) == ["os.system('x')", "index", "@a", "column_1"]
    assert list(condition.constants.values()) == ["__import__", -3.0, ["`", "'"], "\\"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_integers_that_floats_round_are_compared_as_texts(tmp_path, suffix):
    ids = [2**53 - 1, 2**53, 2**53 + 1, 10, 11]
    path = write(tmp_path / f"a.{suffix}", [["content", "id"], *([f"row {number}", str(number)] for number in ids)])
    assert left(path, "id == '9007199254740993'") == ["row 9007199254740993"]
    assert left(path, "id == 9007199254740991") == ["row 9007199254740991"]
    assert len(left(path, "id < 9.1e15")) == 5
    with pytest.raises(UsageError, match=r"which round 9007199254740993: .* give '9007199254740993', a text in quotes"):
        left(path, "id == 9007199254740993")


def test_a_long_condition_is_computed(tmp_path):
    path = write(tmp_path / "a.csv", [HEADER, *ROWS])
    names = ", ".join(repr(f"Paper {number}") for number in range(500))
    assert left(path, f"publication in [{names}, 'Vox']") == ["three"]
    for count in (50, 100):
        assert left(path, " or ".join(["year == 1"] * count + ["year == 9"])) == ["five"]


def test_plain_text_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UsageError, match=r"a\.txt is plain text, which has no columns: .* --where"):
        list(Documents([tmp_path / "a.txt"], ReadOptions(where="year > 1")))


def test_the_command_says_how_many_rows_are_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [[f"The council met {number} times.", "Vox" if number % 4 else "Times", str(number)] for number in range(80)]
    write(tmp_path / "a.csv", [["content", "publication", "year"], *rows, rows[1]])
    where = "publication == 'Vox' and year < 60"
    (tmp_path / "recipe.toml").write_text(f'[prepare]\nwhere = "{where}"\n')
    command = ["a.csv", "--tokenizer", "wordpunct", "-o"]
    folders = []
    for name, arguments in {"flag": ["--where", where], "recipe": ["--recipe", "recipe.toml"]}.items():
        prepare.main([*command, name, *arguments])
        assert "--where left 46 of 81 rows\nskipped: 1 duplicate, 35 filtered\n" in capsys.readouterr().out
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        assert meta["skipped"] == {"duplicate": 1, "filtered": 35}
        assert meta["prepare"]["where"] == where
        folders.append((tmp_path / name / "train.bin").read_bytes())
    assert folders[0] == folders[1]
    code, line = last_line(prepare.main, capsys, *command, "c", "--where", "year > 100")
    assert (code, line) == (65, "lmdist-prepare: error: there is no text in what was read: rows skipped: 81 filtered")
    code, line = only_line(prepare.main, capsys, *command, "c", "--where", "year = 1")
    assert (code, line[:44]) == (64, "lmdist-prepare: error: --where 'year = 1': i")


def test_a_recipe_names_one_column_of_text_or_several(tmp_path):
    (tmp_path / "one.toml").write_text("[prepare]\ntext_column = 'body'\n")
    (tmp_path / "number.toml").write_text("[prepare]\ntext_column = '3'\n")
    (tmp_path / "several.toml").write_text("[prepare]\ntext_column = ['title', 'content']\n")
    for name, expected in {"one": "body", "number": "3", "several": ["title", "content"]}.items():
        values = read_section(str(tmp_path / f"{name}.toml"), "prepare", PrepareSettings)
        assert PrepareSettings(**values).text_column == expected
    assert ReadSettings(text_column=["body"]) == ReadSettings(text_column="body")
    assert ReadSettings(text_column=[]) == ReadSettings()
