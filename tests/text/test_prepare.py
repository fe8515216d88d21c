"""lmdist-prepare: its data folder, its splits, its messages, and that it leaves nothing when it fails."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdist.config import descriptions, read_section, recipe_names
from lmdist.errors import UsageError
from lmdist.settings import SPLITS, PrepareSettings
from lmdist.storage.checksums import verify_checksums
from lmdist.storage.held import HeldFolder
from lmdist.text.prepare import main, parser, prepare, resolve
from lmdist.text.shard_files import DOCUMENT
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import END, UNKNOWN, Vocabulary

DATA = Path(os.environ.get("LMDIST_DATA", Path(__file__).parents[3] / "shared" / "data"))
COLUMNS = ["", "id", "title", "publication", "author", "date", "year", "month", "url", "content"]


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """lmdist-prepare as a user runs it."""
    command = [sys.executable, "-m", "lmdist.text.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def check_failure(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> None:
    """Check the exit code and the last line of stderr, which contains these texts."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lmdist-prepare: error: ")
    for text in texts:
        assert text in last


def news(path: Path, contents: list[str], titles: list[str] | None = None) -> Path:
    """A CSV with the columns of "All the news"."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, content in enumerate(contents):
            title = titles[number] if titles else f"Title {number}"
            writer.writerow([number, 17283 + number, title, "Times", "", "2016-12-31", "2016.0", "12.0", "", content])
    return path


def documents_of(folder: Path) -> dict[str, list[list[str]]]:
    """The words of each document of each split, read from the files."""
    meta = json.loads((folder / "meta.json").read_text())
    vocabulary = Vocabulary.load(folder / "vocab.txt")
    splits = {}
    for split, facts in meta["splits"].items():
        ids = np.fromfile(folder / f"{split}.bin", np.dtype(meta["dtype"]).newbyteorder("<"))
        words = vocabulary.decode(ids.tolist())
        assert len(words) == facts["tokens"]
        assert facts["unknown_tokens"] == words.count(UNKNOWN)
        assert words[-1] == END
        splits[split] = [[]]
        for word in words[:-1]:
            if word == END:
                splits[split].append([])
            else:
                splits[split][-1].append(word)
        assert len(splits[split]) == facts["documents"]
    return splits


def quietly(folder: Path, **values) -> dict[str, list[list[str]]]:
    """Prepare with wordpunct and give the documents of the splits."""
    prepare(PrepareSettings(**{"tokenizer": "wordpunct", "min_count": 1, **values}), folder)
    return documents_of(folder)


ARTICLES = [f'Article number {number}, of the “Times”.\n\nIt says: "{number * 7} is not {number}"!' for number in range(40)]


def test_the_folder_of_a_news_csv(tmp_path):
    path = news(tmp_path / "articles1.csv", [*ARTICLES, "", ARTICLES[0], " "])
    done = run(path.name, "-o", "data/news", "--min-count", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "news"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["train.bin", "valid.bin", "test.bin", "vocab.txt", "text.json", "blocks.json", "meta.json"]
    )
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["format"], meta["version"], meta["dtype"]) == ("lmdist data", 1, "uint16")
    assert meta["skipped"] == {"duplicate": 1, "empty": 2}
    assert meta["sources"] == [{"name": "articles1.csv", "bytes": path.stat().st_size}]
    assert {split: facts["documents"] for split, facts in meta["splits"].items()} == {"train": 36, "valid": 2, "test": 2}
    verify_checksums(HeldFolder(folder), meta["files"])
    vocabulary = Vocabulary.load(folder / "vocab.txt")
    assert meta["vocabulary_size"] == len(vocabulary)

    # The words are the tokenizer's, in the order of the file, and the vocabulary is that of the train split.
    tokenizer = WordTokenizer.load(folder / "text.json")
    splits = documents_of(folder)
    counts = Counter(word for document in splits["train"] for word in document)
    shown = [vocabulary.decode(vocabulary.encode(tokenizer.tokenize(article))) for article in ARTICLES]
    assert [document for document in shown if document in splits["train"]] == splits["train"]
    frequencies = [counts[word] for word in vocabulary.words[2:]]
    assert frequencies == sorted(frequencies, reverse=True)

    for line in ("train ", "valid ", "test ", "vocabulary: ", "skipped: 1 duplicate, 2 empty", "written to data/news"):
        assert any(text.startswith(line) for text in done.stdout.splitlines())
    assert done.stdout.splitlines()[-1] == "next: lmdist-train --data.folder data/news --run_folder runs/news"
    assert str(tmp_path) not in (folder / "meta.json").read_text()


cells = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), min_size=1, max_size=12)


@given(cells)
@settings(deadline=None, max_examples=40)
def test_every_word_of_every_cell_arrives(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("prepare")
    contents = ["the first, NA", "null", '"quoted",\nand more', *contents]
    path = news(folder / "a.csv", contents)
    splits = quietly(folder / "out", inputs=[str(path)])
    tokenizer = WordTokenizer.load(folder / "out" / "text.json")
    expected = [tokenizer.tokenize(content) for content in dict.fromkeys(contents)]
    vocabulary = Vocabulary.load(folder / "out" / "vocab.txt")
    found = [words for documents in splits.values() for words in documents]
    assert sorted(found) == sorted(vocabulary.decode(vocabulary.encode(words)) for words in expected if words)
    assert all(word in vocabulary.ids for words in splits["train"] for word in words)


@given(st.lists(st.integers(0, 12), min_size=20, max_size=60), st.randoms(), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_groups_stay_together_whatever_the_order(tmp_path_factory, groups, random, seed):
    folder = tmp_path_factory.mktemp("groups")
    groups = [*range(13), *groups]
    rows = [(f"word{number} of group{group}", f"Title {group}") for number, group in enumerate(groups)]
    shares = {"group_by": "title", "valid_fraction": 0.2, "test_fraction": 0.1, "seed": seed}
    found = []
    for name in ("a", "b"):
        path = news(folder / f"{name}.csv", [content for content, _ in rows], [title for _, title in rows])
        splits = quietly(folder / name, inputs=[str(path)], **shares)
        found.append({split: sorted(documents) for split, documents in splits.items() if split == "train"})
        meta = json.loads((folder / name / "meta.json").read_text())
        assert sum(facts["documents"] for facts in meta["splits"].values()) == len(groups)
        # In valid and test some words are unknown; how many documents they have says which groups they are.
        found.append({split: facts["documents"] for split, facts in meta["splits"].items()})
        train_groups = {words[-1] for words in splits["train"]}
        assert len(train_groups) == 13 - 3 - 1
        assert len(splits["train"]) == sum(f"group{group}" in train_groups for group in groups)
        random.shuffle(rows)
    assert found[:2] == found[2:]


def test_another_seed_gives_another_split(tmp_path):
    path = news(tmp_path / "a.csv", ARTICLES)
    first, again, other = (
        quietly(tmp_path / name, inputs=[str(path)], seed=seed) for name, seed in (("1", 1), ("2", 1), ("3", 2))
    )
    assert first == again
    assert first["train"] != other["train"]


def test_fractions_of_zero_leave_splits_out(tmp_path):
    path = news(tmp_path / "a.csv", ARTICLES)
    splits = quietly(tmp_path / "out", inputs=[str(path)], valid_fraction=0.0, test_fraction=0.0)
    assert list(splits) == ["train"]
    assert not (tmp_path / "out" / "valid.bin").exists()


def test_first_rows_with_the_tutorials_cleaning(tmp_path):
    path = news(tmp_path / "a.csv", ARTICLES)
    splits = quietly(tmp_path / "out", inputs=[str(path)], rows=4, clean="tutorial", valid_fraction=0.0, test_fraction=0.0)
    assert splits["train"][3] == "article number 3 of the “ times ” it says 21 is not 3".split()
    assert len(splits["train"]) == 4


def test_the_vocabulary_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("b b b a a a c c d <unk> <unk> <unk> <unk>\n")
    (tmp_path / "v.txt").write_text("a b c d e\n")
    given_files = {"train": str(tmp_path / "a.txt"), "valid": str(tmp_path / "v.txt"), "tokenizer": "whitespace"}
    for name, values, words in (
        ("all", {}, ["a", "b", "c", "d"]),
        ("count", {"min_count": 2}, ["a", "b", "c"]),
        ("size", {"vocabulary_size": 4}, ["a", "b"]),
        ("file", {"unknown": "file"}, ["a", "b", "c", "d"]),
    ):
        splits = quietly(tmp_path / name, **given_files, **values)
        assert Vocabulary.load(tmp_path / name / "vocab.txt").words == [UNKNOWN, END, *words]
        assert splits["valid"] == [[word if word in words else UNKNOWN for word in "abcde"]]
        assert splits["train"][0][-1] == UNKNOWN


def test_more_words_than_two_bytes_can_number(tmp_path):
    for name, count in (("small", (1 << 16) - 2), ("large", (1 << 16) - 1)):
        text = tmp_path / f"{name}.txt"
        text.write_text(" ".join(f"w{number}" for number in range(count)) + "\n")
        splits = quietly(tmp_path / name, train=str(text), tokenizer="whitespace")
        assert splits["train"][0] == text.read_text().split()
    assert json.loads((tmp_path / "small" / "meta.json").read_text())["dtype"] == "uint16"
    assert json.loads((tmp_path / "large" / "meta.json").read_text())["dtype"] == "uint32"


def test_lines_of_whitespace_text_are_all_kept(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\n \none two\nthree\n")
    splits = quietly(tmp_path / "out", train=str(tmp_path / "a.txt"), tokenizer="whitespace")
    assert splits["train"] == [["one", "two"], [], [], ["one", "two"], ["three"]]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["splits"]["train"]["documents"] == 5
    assert meta["splits"]["train"]["tokens"] == 10
    assert meta["skipped"] == {}


def test_words_and_bytes_of_the_original_text_are_counted(tmp_path):
    """Of what is kept, however it is tokenized and cleaned: neither of duplicates nor of what has no tokens."""
    articles = [f"{article} Größe\u00a0{'猫' * number}" for number, article in enumerate(ARTICLES)]
    path = news(tmp_path / "a.csv", [*articles, *articles[:9], " ", "?!?"])
    found = {}
    for name, values in {
        "words": {},
        "cleaned": {"clean": "tutorial", "lowercase": True},
        "characters": {"tokenizer": "characters", "min_count": 5},
    }.items():
        splits = quietly(tmp_path / name, inputs=[str(path)], seed=3, **values)
        found[name] = json.loads((tmp_path / name / "meta.json").read_text())["splits"]
        sizes = [(facts["original_words"], facts["bytes"]) for facts in found[name].values()]
        kept = articles if "clean" in values else [*articles, "?!?"]
        assert sum(map(len, splits.values())) == len(kept)
        assert [sum(column) for column in zip(*sizes, strict=True)] == [
            sum(len(text.split()) + 1 for text in kept),
            sum(len(text.encode()) + 1 for text in kept),
        ]
    assert found["words"]["valid"]["tokens"] < found["characters"]["valid"]["tokens"]
    assert np.array((0, 0, 0, 2**32, 2**33, 0, True), DOCUMENT)["bytes"] == 2**33, "a document of more than 4 GiB"
    for name in ("original_words", "bytes"):
        assert found["words"]["valid"][name] == found["characters"]["valid"][name]


def test_lines_of_tokenized_text_have_as_many_words_as_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\n \none two , \nthree\n")
    quietly(tmp_path / "out", train=str(tmp_path / "a.txt"), tokenizer="whitespace")
    facts = json.loads((tmp_path / "out" / "meta.json").read_text())["splits"]["train"]
    assert (facts["original_words"], facts["tokens"], facts["bytes"]) == (11, 11, (tmp_path / "a.txt").stat().st_size)


def test_wikitext_2_has_the_known_counts(tmp_path):
    wikitext = DATA / "wikitext-2"
    if not wikitext.is_dir():
        pytest.skip(f"{wikitext} is not here")
    train, valid, test = (str(wikitext / f"wiki.{split}.tokens") for split in SPLITS)
    values = PrepareSettings(train=train, valid=valid, test=test, tokenizer="whitespace", unknown="file")
    prepare(values, tmp_path / "wikitext2")
    meta = json.loads((tmp_path / "wikitext2" / "meta.json").read_text())
    assert [meta["splits"][split]["tokens"] for split in SPLITS] == [2_088_628, 217_646, 245_569]
    assert meta["vocabulary_size"] == 33_278
    assert (tmp_path / "wikitext2" / "train.bin").stat().st_size == 2 * 2_088_628


def test_a_document_without_words_is_counted(tmp_path):
    path = news(tmp_path / "a.csv", [*ARTICLES[:5], "?!?"])
    quietly(tmp_path / "out", inputs=[str(path)], clean="tutorial")
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["skipped"] == {"empty": 1}


# --- mistakes and their messages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    news(folder / "articles1.csv", ARTICLES)
    news(folder / "one.csv", ARTICLES[:1])
    news(folder / "empty.csv", ["", " "])
    (folder / "words.csv").write_text("id,words\n1,one\n")
    (folder / "nothing.csv").write_text("")
    (folder / "plain.txt").write_text("some words and no mark of unknown ones\n")
    (folder / "wrong.toml").write_text("[prepare]\ncolour = 1\n")
    (folder / "type.toml").write_text("[prepare]\nrows = 'all'\n")
    (folder / "broken.toml").write_text("[prepare\n")
    (folder / "good.toml").write_text("[prepare]\ninputs = ['nowhere.csv']\ntokenizer = 'wordpunct'\nmin_count = 1\n")
    return folder


@pytest.mark.parametrize(
    ("code", "command", "texts"),
    [
        (64, "", ["--output"]),
        (64, "-o out", ["nothing to read"]),
        (64, "articles1.csv -o out --colour 3", ["--colour"]),
        (64, "articles1.csv -o out --rows many", ["--rows", "many"]),
        (64, "articles1.csv -o out --rows -1", ["rows is -1"]),
        (64, "articles1.csv -o out --tokenizer bert", ["bpe", "wordpunct"]),
        (64, "articles1.csv -o out --valid-fraction 1.5", ["1.5"]),
        (64, "articles1.csv -o out --valid-fraction 0.5 --test-fraction 0.5", ["nothing to train on"]),
        (64, "articles1.csv -o out --encoding klingon", ["klingon"]),
        (64, "articles1.csv -o out --unknown file --min-count 2", ["min_count"]),
        (64, "articles1.csv -o out --unknown file --vocabulary-size 100", ["vocabulary_size"]),
        (64, "articles1.csv -o out --train one.csv", ["inputs"]),
        (64, "-o out --valid one.csv", ["train"]),
        (64, "-o out --train one.csv --group-by title", ["group_by"]),
        (64, "plain.txt -o out --group-by title", ["plain text"]),
        (64, "articles1.csv -o .", ["is a folder without its name"]),
        (64, "words.csv -o plain.txt/out", ["-o: ", "plain.txt is not a folder"]),  # though words.csv has no text
        (64, "articles1.csv -o out --recipe wrong.toml", ["wrong.toml", "colour", "text_column"]),
        (64, "articles1.csv -o out --recipe type.toml", ["type.toml", "prepare.rows", "all", "int"]),
        (64, "articles1.csv -o out --recipe broken.toml", ["broken.toml"]),
        (65, "words.csv -o out", ["words.csv", "content", "id, words", "--text-column"]),
        (65, "articles1.csv -o out --group-by authors", ["authors", "title"]),
        (65, "nothing.csv -o out", ["nothing.csv"]),
        (65, "empty.csv -o out --tokenizer wordpunct", ["no text", "1 duplicate"][:1]),
        (65, "one.csv -o out --tokenizer wordpunct", ["1 document", "too few"]),
        (65, "articles1.csv -o out --tokenizer wordpunct --min-count 9999", ["9,999", "--min-count"]),
        (65, "-o out --train plain.txt --tokenizer whitespace --unknown file", ["<unk>"]),
        (65, "-o out --train plain.txt --valid empty.csv --tokenizer whitespace --min-count 1", ["empty.csv", "valid"]),
        (66, "article1.csv -o out", ["article1.csv does not exist", "articles1.csv"]),
        (66, "*.parquet -o out", ["*.parquet"]),
        (66, "nowhere/a.csv -o out", ["nowhere"]),
        (66, "articles1.csv -o out --recipe nowhere.toml", ["nowhere.toml"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, monkeypatch, capsys, code, command, texts):
    before = sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert isinstance(ended.value.code, int)
    check_failure(subprocess.CompletedProcess(command, ended.value.code, *capsys.readouterr()), code, *texts)
    assert sorted(folder.iterdir()) == before


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    path = news(tmp_path / "a.csv", ARTICLES)
    quietly(tmp_path / "out", inputs=[str(path)])
    before = (tmp_path / "out" / "meta.json").read_bytes()
    values = PrepareSettings(inputs=[str(path)], tokenizer="wordpunct", seed=2)
    with pytest.raises(UsageError, match="--overwrite"):
        prepare(values, tmp_path / "out")
    assert (tmp_path / "out" / "meta.json").read_bytes() == before
    prepare(values, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "meta.json").read_bytes() != before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.csv", "out"]


def test_a_recipe_sets_the_defaults_and_flags_override_it(folder, tmp_path):
    done = run("articles1.csv", "-o", tmp_path / "out", "--recipe", "good.toml", "--seed", 7, cwd=folder)
    assert done.returncode == 0, done.stderr
    used = json.loads((tmp_path / "out" / "meta.json").read_text())["prepare"]
    assert used["inputs"] == ["articles1.csv"]
    assert (used["tokenizer"], used["min_count"], used["seed"]) == ("wordpunct", 1, 7)


@pytest.mark.parametrize("name", sorted({*recipe_names()} - {"finetune"}))  # that one reads a run
def test_the_recipes_of_the_repository_are_right(name):
    resolve(read_section(name, "prepare", PrepareSettings), {})


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path):
    news(tmp_path / "a.csv", [" ".join(f"w{number}" for number in range(40_000))] * 1 + ARTICLES)
    done = run(
        "a.csv", "-o", "out", "--tokenizer", "whitespace", cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    check_failure(done, 65, "out", "full")
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


SMALL_IS_MUCH = "from lmdist.text import inputs, prepare; inputs.ONE_PROCESS_BYTES = {'wordpunct': 0}; prepare.main()"
TWO_WORKERS = [sys.executable, "-c", SMALL_IS_MUCH, "--tokenizer", "wordpunct", "--workers", "2"]


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_stopped_on_request_it_leaves_nothing(tmp_path, number, workers):
    news(tmp_path / "a.csv", [f"{article} {number}" for number in range(20_000) for article in ARTICLES[:10]])
    command = [*TWO_WORKERS, "a.csv", "-o", "out", "--workers", str(workers)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*/shards/0/tokens.bin")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75
    assert stderr.splitlines()[-1] == "lmdist-prepare: interrupted"
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    article = " ".join(f"w{number % 3000}" for number in range(20_000))
    program = (
        "import sys; from lmdist.text.prepare import main; main(sys.argv[1:]); "
        # Not ru_maxrss: it begins with that of the process which started this one.
        "[peak] = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]; sys.stderr.write(peak)"
    )
    peaks = []
    for times in (10, 10, 60):
        news(tmp_path / "a.csv", [f"{article} {number}" for number in range(5 * times)])
        arguments = ["a.csv", "-o", "out", "--overwrite", "--tokenizer", "wordpunct", "--workers", "1"]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stderr.splitlines()[-1]) / 1024)
    assert peaks[2] - peaks[1] < 10, peaks


def test_help_is_quick_and_explains_every_setting():
    done = run("--help")
    command = [sys.executable, "-X", "importtime", "-m", "lmdist.text.prepare", "--help"]
    seen = subprocess.run(command, capture_output=True, text=True)
    slow = {"torch", "nltk", "pandas", "mlflow"}
    assert not slow & {line.rpartition(" ")[2] for line in seen.stderr.splitlines()}
    assert done.returncode == 0
    assert "lmdist-prepare INPUT" in done.stdout
    texts = descriptions(PrepareSettings)
    for name in PrepareSettings.__dataclass_fields__:
        assert texts[name], name
        assert name == "inputs" or f"--{name.replace('_', '-')}" in done.stdout


def test_flags_have_the_defaults_of_the_settings():
    assert vars(parser().parse_args(["a.csv", "-o", "out"])).keys() == {"inputs", "output", "overwrite", "recipe"}


def test_importing_prepare_is_light():
    program = (
        "import sys, lmdist.text.prepare; "
        "assert not {'numpy', 'nltk', 'torch', 'pandas', 'tqdm', 'pyarrow', 'concurrent.futures'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("temporary", ["temporary", "t" * 100])  # too long for the name of a socket
def test_workers_import_nothing_from_the_folder_where_they_run(tmp_path, temporary):
    for name in ("bin", temporary):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "prepare").write_text(f"if __name__ == '__main__':\n    {SMALL_IS_MUCH}")
    news(tmp_path / "a.csv", ARTICLES)
    for trap in ("pandas", "selectors"):  # of what counting imports, and of what a process imports as it starts
        (tmp_path / f"{trap}.py").write_text("import os; os._exit(1)")
    command = [sys.executable, "bin/prepare", "a.csv", "-o", "out", "--tokenizer=wordpunct", "--workers=2"]
    environment = os.environ | {"TMPDIR": str(tmp_path / temporary)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_workers_leave_nothing_in_the_process_that_had_them(tmp_path):
    """A training goes on after it: without a server of forks, and with the environment that its user gave it."""
    news(tmp_path / "a.csv", ARTICLES)
    program = (
        "import os, sys; from multiprocessing import forkserver; import psutil; before = {**os.environ}; "
        f"{SMALL_IS_MUCH}; assert os.environ == before; forkserver.ensure_running(); "
        "[server] = [each for each in psutil.Process().children() if 'forkserver' in str(each.cmdline())]; "
        "assert 'lmdist' not in str(server.cmdline()), server.cmdline()"
    )
    command = [sys.executable, "-c", program, "a.csv", "-o", "out", "--tokenizer=wordpunct", "--workers=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("killed", "by", "why"),
    [
        (
            "a worker",
            signal.SIGKILL,
            "was killed, most likely because the memory was full: take fewer (--workers 1), or more memory",
        ),
        ("a worker", signal.SIGABRT, "ended by SIGABRT: --workers 1 does without them"),
        ("the command", signal.SIGKILL, ""),
    ],
)
def test_a_process_that_is_killed_takes_the_others_along(tmp_path, killed, by, why):
    news(tmp_path / "a.csv", [f"{article} {number}" for number in range(20_000) for article in ARTICLES[:10]])
    process = subprocess.Popen([*TWO_WORKERS, "a.csv", "-o", "out"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*/shards/1/tokens.bin")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    others = psutil.Process(process.pid).children(recursive=True)
    worker = next(worker for server in psutil.Process(process.pid).children() for worker in server.children())
    (worker if killed == "a worker" else process).send_signal(by)
    _, stderr = process.communicate(timeout=60)
    assert not psutil.wait_procs(others, timeout=60)[1]
    if killed == "a worker":
        assert process.returncode == 65
        assert stderr.splitlines()[-1] == f"lmdist-prepare: error: one of 2 worker processes {why}"
        assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]
