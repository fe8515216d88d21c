"""lmdist-score: log-probabilities are torch's, perplexity is lmdist-evaluate's, lists are read as a stream."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmdist.errors import UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import ReadSettings, TextSettings
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import find_checkpoint
from lmdist.training.distributed import World
from lmdist.training.evaluate import read_file
from lmdist.training.measuring import evaluate
from lmdist_export import score
from lmdist_export.bundle import Bundle
from lmdist_export.sampling import sampler as sampler_module
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.scoring import Scorer, score_batch
from support import failures
from support.small_bundles import PLAIN_WORDS, TIED, UNTIED, command, in_fresh_process, make_bundle

# With common beginnings, one that is the beginning of another, one twice, an empty one, and words that are not known.
SENTENCES = [
    "the cat said that it is here",
    "the cat said that it is not here",
    "",
    "the cat said",
    "zebra is old",
    "the cat said that it is here",
    "we said that the zebra is not so old too",
    "of",
    "the cat said that it is old and the zebra too",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its bundle, with the whitespace tokenizer."""
    folder = tmp_path_factory.mktemp("blanks")
    make_bundle(folder, UNTIED, "whitespace", PLAIN_WORDS)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    return folder / "bundle"


@pytest.fixture(scope="module")
def sampler(bundle: Path) -> Sampler:
    return Sampler(Bundle.load(bundle))


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return open_checkpoint(find_checkpoint(folder / "runs" / "small")).model()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{sentence}\n" for sentence in SENTENCES), encoding="utf-8")
    return path


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs the command with `stdin`, and returns its stdout."""

    def call(*arguments: object, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin.encode())))
        score.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a failing command, and returns its exit code and its one line."""

    def call(*arguments: object, stdin: bytes = b"") -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        return failures.only_line(score.main, capsys, *arguments)

    return call


def by_torch(model: LanguageModel, vocabulary: Vocabulary, words: Sequence[str]) -> torch.Tensor:
    """The log-probabilities (T + 1, V) of the word after `<eos>`, and after each of the words."""
    tokens = torch.tensor([[1, *vocabulary.encode(words)]])
    with torch.no_grad():
        hidden, _ = model(tokens, model.initial_state(1))
        return model.logits(hidden)[0].log_softmax(dim=-1)


def expected_scores(model: LanguageModel, vocabulary: Vocabulary, sentence: str) -> list[float]:
    """The log-probability of each word, and of the end."""
    ids = torch.tensor([*vocabulary.encode(sentence.split()), 1])
    return by_torch(model, vocabulary, sentence.split()).gather(1, ids[:, None])[:, 0].tolist()


def rows(output: str) -> list[list[str]]:
    return [line.split("\t") for line in output.splitlines()]


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 256])
def test_scores_are_those_of_torch_in_the_order_of_the_sentences(sampler, model, batch_size) -> None:
    scores = list(Scorer(sampler, batch_size=batch_size).score(iter(SENTENCES)))
    assert [one.text for one in scores] == SENTENCES
    for one in scores:
        assert one.tokens == [*one.text.split(), "<eos>"]
        assert one.unknown.tolist() == [word == "zebra" for word in one.tokens]
        expected = expected_scores(model, sampler.bundle.vocabulary, one.text)
        np.testing.assert_allclose(one.log_probabilities, expected, atol=2e-5)
        assert one.log_probability == pytest.approx(sum(expected), abs=1e-4)
        known = [value for value, word in zip(expected, one.tokens, strict=True) if word != "zebra"]
        assert one.known_log_probability == pytest.approx(sum(known), abs=1e-4)


def test_the_end_can_be_left_out(sampler) -> None:
    with_end = list(Scorer(sampler).score(SENTENCES))
    for one, other in zip(Scorer(sampler, end=False).score(SENTENCES), with_end, strict=True):
        assert [*one.tokens, "<eos>"] == other.tokens
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities[:-1], atol=2e-5)
        assert one.bytes == other.bytes - 1 == len(one.text)


def test_random_texts_score_in_batches_as_one_by_one(sampler) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 4, random.integers(0, 9)).tolist() for _ in range(200)]  # 4 words: many begin the same
    for ids, scores in zip(texts, score_batch(sampler, texts), strict=True):
        alone, _ = sampler.score(np.array([[1, *ids[:-1]]])[:, : len(ids)], np.array([ids], np.int64))
        np.testing.assert_allclose(scores, alone[0], atol=2e-5)


def test_common_prefixes_are_read_once(sampler, monkeypatch) -> None:
    read = 0

    def counting(method):
        def counted(tokens, *others):
            nonlocal read
            read += tokens.size
            return method(tokens, *others)

        return counted

    for name in ("step", "score"):
        monkeypatch.setattr(sampler, name, counting(getattr(sampler, name)))
    score_batch(sampler, [[5, 6, 7, 8, 1], [5, 6, 7, 9, 1], [5, 6, 7, 8, 1], [5, 6, 1]])
    # <eos>; the words behind which one is scored: 5 and 6 of all; 6 of the third row's end; 7 twice, 8 and 9.
    assert read == 1 + 1 + 2 + 2 + 2


def test_small_pieces_of_logits_change_nothing(sampler, monkeypatch) -> None:
    random = np.random.default_rng(1)
    tokens, targets = random.integers(0, 17, (2, 5, 11))
    state = random.normal(size=(2, 5, sampler.sizes.state_size)).astype(np.float32)
    whole, (h, c) = sampler.score(tokens, targets, (state[0], state[1]))
    for places in (1, 3, 10, 17):
        monkeypatch.setattr(sampler_module, "LOGITS_AT_ONCE", places * sampler.sizes.padded)
        pieces, after = sampler.score(tokens, targets, (state[0], state[1]))
        np.testing.assert_allclose(pieces, whole, atol=2e-5)
        np.testing.assert_allclose(after, (h, c), atol=2e-5)


def test_with_carried_state_the_perplexity_is_that_of_evaluate(folder, bundle, model, text, written) -> None:
    checkpoint = open_checkpoint(find_checkpoint(folder / "runs" / "small"))
    found = read_file(checkpoint, str(text), ReadSettings())
    nats = evaluate(model, found.tokens, 1, 256, World(0, 1, torch.device("cpu")))
    for batch_size in (1, 2, 256):
        figures = json.loads(written(bundle, text, "--carry-state", "--json", "--batch-size", batch_size))
        assert figures["words"] == nats.count
        assert figures["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
        assert (figures["original_words"], figures["bytes"]) == found.size
        assert figures["perplexity_per_word"] == figures["perplexity"], "the text is tokenized already, line by line"
    assert json.loads(written(bundle, text, "--json"))["perplexity"] != pytest.approx(math.exp(nats.mean()), rel=1e-3)


def test_a_line_that_a_carried_state_passes_over_is_no_text(sampler, monkeypatch) -> None:
    monkeypatch.setitem(vars(sampler.bundle), "tokenizer", WordTokenizer(TextSettings("wordpunct")))
    scores = Scorer(sampler, carry_state=True).score(["the cat", "", " ", "is"])
    assert [score.size for score in scores] == [(3, 8), (0, 0), (0, 0), (2, 3)]


# --- what is printed -----------------------------------------------------------------------------------------------


def test_summary(bundle, model, sampler, written) -> None:
    stdin = "the zebra\nwe said größe\n"
    figures = json.loads(written(bundle, "--json", stdin=stdin))
    vocabulary = sampler.bundle.vocabulary
    (the, zebra, end), (we, said, size, other_end) = (expected_scores(model, vocabulary, line) for line in stdin.splitlines())
    known, unknown = the + end + we + said + other_end, zebra + size
    assert figures == {
        "sentences": 2,
        "words": 7,
        "unknown_words": 2,
        "unknown_rate": pytest.approx(2 / 7),
        "original_words": 7,
        "bytes": len(stdin.encode()),  # 26: the ö and the ß have two
        "log_probability": pytest.approx(known + unknown, abs=1e-4),
        "log_probability_without_unknown": pytest.approx(known, abs=1e-4),
        "perplexity": pytest.approx(math.exp(-(known + unknown) / 7), rel=1e-4),
        "perplexity_without_unknown": pytest.approx(math.exp(-known / 5), rel=1e-4),
        "perplexity_per_word": pytest.approx(math.exp(-(known + unknown) / 7), rel=1e-4),
        "bits_per_byte": pytest.approx(-(known + unknown) / math.log(2) / 26, rel=1e-4),
        "perplexity_per_byte": pytest.approx(math.exp(-(known + unknown) / 26), rel=1e-4),
        "perplexity_per_byte_without_unknown": pytest.approx(math.exp(-known / (26 - 5 - 7)), rel=1e-4),
    }
    table = written(bundle, stdin=stdin)
    assert [line.split()[0] for line in table.splitlines()][:4] == ["sentences", "words", "unknown", "unknown"]
    assert f"{figures['perplexity']:.2f}" in table
    without_end = json.loads(written(bundle, "--json", "--no-eos", stdin=stdin))
    assert (without_end["words"], without_end["bytes"]) == (5, 24)


def test_nothing_known_has_no_perplexity_without_the_unknown(bundle, written) -> None:
    figures = json.loads(written(bundle, "--json", "--no-eos", stdin="zebra\n"))
    assert figures["perplexity_without_unknown"] is None
    assert figures["perplexity_per_byte_without_unknown"] is None
    assert figures["log_probability_without_unknown"] == 0


def test_words_and_sentences(bundle, sampler, text, written) -> None:
    scores = list(Scorer(sampler).score(SENTENCES))
    words = rows(written(bundle, text, "--words"))
    as_json = [json.loads(line) for line in written(bundle, text, "--words", "--json").splitlines()]
    expected = [
        (number, word, log_probability, bool(unknown))
        for number, one in enumerate(scores, start=1)
        for word, log_probability, unknown in zip(one.tokens, one.log_probabilities, one.unknown, strict=True)
    ]
    assert len(words) == len(as_json) == len(expected)
    for row, fields, (number, word, log_probability, unknown) in zip(words, as_json, expected, strict=True):
        assert [row[0], row[1], row[3]] == [str(number), word, str(int(unknown))]
        assert float(row[2]) == pytest.approx(log_probability, abs=2e-5)
        assert (fields["sentence"], fields["word"], fields["unknown"]) == (number, word, unknown)
    sentences = rows(written(bundle, text, "--sentences"))
    assert [row[3] for row in sentences] == SENTENCES
    assert [int(row[1]) for row in sentences] == [len(one.tokens) for one in scores]
    assert [int(row[2]) for row in sentences] == [sentence.count("zebra") for sentence in SENTENCES]
    assert [float(row[0]) for row in sentences] == pytest.approx([one.log_probability for one in scores], abs=1e-4)
    first = json.loads(written(bundle, text, "--sentences", "--json").splitlines()[4])
    assert first["text"] == "zebra is old"
    assert (first["words"], first["unknown"], first["bytes"]) == (4, 1, 13)
    assert first["log_probability_without_unknown"] > first["log_probability"]
    assert first["original_words"] == 4
    compared = rows(written(bundle, text, "--sentences", "--compare"))
    assert [[*row[:3], *row[5:]] for row in compared] == sentences
    for row, one in zip(compared, scores, strict=True):
        assert float(row[3]) == pytest.approx(math.exp(-one.log_probability / len(one.tokens)), rel=1e-4)
        assert float(row[4]) == pytest.approx(-one.log_probability / math.log(2) / (len(one.text.encode()) + 1), rel=1e-4)
    assert [float(value) for value in compared[4][3:5]] == pytest.approx(
        [first["perplexity_per_word"], first["bits_per_byte"]], abs=1e-5
    )
    blank = json.loads(written(bundle, "--sentences", "--json", "--no-eos", stdin="\n"))
    assert (blank["original_words"], blank["bytes"], blank["perplexity_per_word"], blank["bits_per_byte"]) == (0, 0, None, None)


def test_files_stdin_and_an_output_file(bundle, text, tmp_path, written) -> None:
    (tmp_path / "windows.txt").write_bytes("\ufeffthe dog\r\nhere".encode())  # a mark, CRLF, and no break at the end
    stdin = "the cat\tsaid\n"
    output = written(bundle, "--sentences", tmp_path / "windows.txt", "-", text, stdin=stdin)
    assert [line.split("\t", 3)[3] for line in output.splitlines()] == ["the dog", "here", "the cat\tsaid", *SENTENCES]
    assert [row[2] for row in rows(output)][:3] == ["0", "0", "0"]
    assert written(bundle, "--sentences", text, "-o", tmp_path / "scores.tsv") == ""
    assert (tmp_path / "scores.tsv").read_text(encoding="utf-8") == written(bundle, "--sentences", text)


# --- n-best lists --------------------------------------------------------------------------------------------------

MOSES = """\
0 ||| the cat is here ||| LM0= -9.5 TM0= -1 ||| -3.25
0 ||| the cat zebra here ||| LM0= -9 TM0= -2 ||| -3.5 ||| 0-0 1-1
0 |||  ||| LM0= -1 ||| -9
7 ||| we said that ||| LM0= -3 ||| -1
"""


def test_nbest_adds_the_log_probability(bundle, sampler, written) -> None:
    values = [
        one.log_probability for one in Scorer(sampler).score(["the cat is here", "the cat zebra here", "", "we said that"])
    ]
    lines = written(bundle, "--nbest", stdin=MOSES).splitlines()
    found = [float(line.split("lmdist= ")[1].split()[0]) for line in lines]
    assert found == pytest.approx(values, abs=1e-4)
    assert lines[1].startswith("0 ||| the cat zebra here ||| LM0= -9 TM0= -2 lmdist= -")
    assert lines[1].endswith(" ||| -3.5 ||| 0-0 1-1")
    plain = rows(written(bundle, "--nbest", stdin="a\tthe cat is here\nb\tthe cat zebra here\t-3.5\n"))
    assert [row[:-1] for row in plain] == [["a", "the cat is here"], ["b", "the cat zebra here", "-3.5"]]
    assert [float(row[-1]) for row in plain] == pytest.approx(values[:2], abs=1e-4)


@pytest.mark.parametrize(("weight", "bonus"), [(None, None), (0, 0), (0.1, -3), (2, 5), (0, 100), (-1, 0)])
def test_nbest_picks_the_best(bundle, sampler, written, weight, bonus) -> None:
    random = np.random.default_rng(2)
    lists = [
        [(" ".join(random.choice(PLAIN_WORDS, random.integers(1, 7))), float(random.normal())) for _ in range(9)]
        for _ in range(20)
    ]
    stdin = "".join(f"{number}\t{text}\t{value}\n" for number, texts in enumerate(lists) for text, value in texts)
    options = [] if weight is None else ["--lm-weight", weight, "--word-bonus", bonus]
    expected = []
    for texts in lists:
        totals = [
            value + (1 if weight is None else weight) * one.log_probability + (bonus or 0) * len(one.tokens)
            for (_, value), one in zip(texts, Scorer(sampler).score(text for text, _ in texts), strict=True)
        ]
        expected.append(texts[int(np.argmax(totals))][0])
    best = rows(written(bundle, "--nbest", "--best", "--batch-size", 50, *options, stdin=stdin))
    assert [row[0] for row in best] == [str(number) for number in range(20)]
    assert [row[1] for row in best] == expected
    as_json = [json.loads(line) for line in written(bundle, "--nbest", "--json", *options, stdin=stdin).splitlines()]
    assert [one["id"] for one in as_json] == [str(number) for number in range(20) for _ in range(9)]
    totals = np.array([one["total"] for one in as_json]).reshape(20, 9)
    assert [texts[place][0] for texts, place in zip(lists, totals.argmax(axis=1), strict=True)] == expected


def test_of_equals_the_first_is_the_best(bundle, written) -> None:
    stdin = "a\tthe cat\t1\na\twe\t1\nb\twe\t1\na\told\t1\n"
    best = rows(written(bundle, "--nbest", "--best", "--lm-weight", 0, stdin=stdin))
    assert [row[:2] for row in best] == [["a", "the cat"], ["b", "we"], ["a", "old"]]  # an ID that comes again is a new list


# --- a keyboard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 100])
def test_next_words_are_the_most_likely_of_torch(bundle, sampler, model, written, count) -> None:
    vocabulary = sampler.bundle.vocabulary
    lines = written(bundle, "--next", count, stdin="the zebra said\n\n").splitlines()
    as_json = [json.loads(line) for line in written(bundle, "--next", count, "--json", stdin="the zebra said\n\n").splitlines()]
    for line, found, text in zip(lines, as_json, ("the zebra said", ""), strict=True):
        probabilities = by_torch(model, vocabulary, text.split())[-1].exp()
        probabilities[0] = -1  # <unk> is nothing to suggest
        best = probabilities.topk(min(count, len(vocabulary) - 1))
        assert line.split("\t")[::2] == vocabulary.decode(best.indices.tolist())
        assert [float(value) for value in line.split("\t")[1::2]] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert found["text"] == text
        assert [one["word"] for one in found["next"]] == line.split("\t")[::2]


@pytest.mark.parametrize("options", [(), ("--no-eos",), ("--carry-state",)])
def test_accuracy_is_a_plain_count(bundle, sampler, model, text, written, options) -> None:
    vocabulary = sampler.bundle.vocabulary
    if "--carry-state" in options:
        texts = [[word for sentence in SENTENCES for word in [*sentence.split(), "<eos>"]][:-1]]
    else:
        texts = [sentence.split() for sentence in SENTENCES]
    right, words = dict.fromkeys((1, 3, 5), 0), 0
    for text_words in texts:
        likely = by_torch(model, vocabulary, text_words)
        likely[:, 0] = -math.inf
        for place, target in enumerate([*vocabulary.encode(text_words), *([] if "--no-eos" in options else [1])]):
            words += 1
            for top in right:
                right[top] += target in likely[place].topk(top).indices.tolist()
    figures = json.loads(written(bundle, text, "--accuracy", "--json", *options))
    assert figures["words"] == words
    assert figures["unknown_words"] == 3
    assert {top: figures[f"top_{top}_accuracy"] for top in right} == pytest.approx(
        {top: count / words for top, count in right.items()}
    )
    assert 0 < right[1] < right[5] < words
    assert 0 < figures["latency_p50_ms"] <= figures["latency_p95_ms"] <= figures["latency_p99_ms"]
    assert "top 3 accuracy" in written(bundle, text, "--accuracy", *options)


# --- a command among others ----------------------------------------------------------------------------------------


def popen(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lmdist_export.score", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_lines_are_answered_while_the_pipe_is_open(bundle) -> None:
    with popen(bundle, "--nbest", "--batch-size", 2) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(b"%d\tthe cat\n%d\twe said\n" % (number, number))
            process.stdin.flush()
            assert process.stdout.readline().startswith(b"%d\tthe cat\t-" % number)
            assert process.stdout.readline().startswith(b"%d\twe said\t-" % number)
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(timeout=60) == 0


def test_no_more_than_a_batch_is_read_ahead(sampler) -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "the cat"

    scores = Scorer(sampler, batch_size=8).score(endless())
    for number in range(1, 100):
        next(scores)
        assert read < number + 8


def test_a_closed_pipe_is_no_error(bundle, tmp_path) -> None:
    (tmp_path / "long.txt").write_text("the cat said that it is here\n" * 20_000)
    with popen(bundle, tmp_path / "long.txt", "--words") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()  # as `| head` does
        error = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"Traceback" not in error


def test_text_is_utf8_whatever_the_machine_writes(bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lmdist_export.score", str(bundle), "--sentences"],
        input="größe\n".encode(),
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout.decode().endswith("\tgröße\n")


def test_the_command(tmp_path) -> None:
    bundle = make_bundle(tmp_path, TIED, "wordpunct")
    (tmp_path / "text.txt").write_text("The president said that the cat, (it) is here.\n")
    done = command("lmdist_export.score", bundle, "--words", tmp_path / "text.txt")
    assert done.returncode == 0, done.stderr
    words = [row[1] for row in rows(done.stdout)]
    assert words == [*"The president said that the cat , ( it ) is here .".split(), "<eos>"]
    assert [row[1] for row in rows(done.stdout) if row[3] == "1"] == ["The", "here"]
    assert done.stderr.startswith("lmdist-score: 1 line in ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--words", "--sentences"), "not allowed with argument"),
        (("--next", 0), "--next is 0; it must be from 1 to 1,000,000"),
        (("--next", "many"), "invalid int value: 'many'"),
        (("--batch-size", 0), "--batch-size is 0; it must be from 1 to 65,536"),
        (("--best",), "--best is for --nbest: leave it out"),
        (("--compare",), "--compare is for --sentences: leave it out"),
        (("--words", "--lm-weight", 0), "--lm-weight is for --nbest"),
        (("--nbest", "--carry-state"), "--carry-state is for --words, --sentences, --accuracy or none of these"),
        (("--accuracy", "--batch-size", 3), "--batch-size is for"),
        (("--nbest", "--lm-weight", 1), "give --best or --json"),
        (("--nbest", "--best", "--word-bonus", "nan"), "--word-bonus is nan; it must be from -1,000,000 to 1,000,000"),
        (("--carry-state", "--no-eos"), "cannot be left out"),
        (("--threads", -1), "threads is -1"),
        (("--provider", "tpu"), "invalid choice: 'tpu'"),
        ((".",), ". is a folder; a text file is expected"),
        (("-o", "."), "is a folder without its name"),
        (("-o", "nowhere/scores.tsv"), "nothing can be written in nowhere"),
    ],
)
def test_wrong_values(bundle, failure, arguments: tuple[object, ...], message: str) -> None:
    code, line = failure(bundle, *arguments)
    assert code == 64
    assert message in line


def test_wrong_input(bundle, tmp_path, failure) -> None:
    assert failure(tmp_path / "none")[0] == 66
    code, line = failure(bundle, "nowhere.txt")
    assert (code, "nowhere.txt does not exist" in line) == (66, True)
    (tmp_path / "latin.txt").write_bytes(b"the cat\nthe gr\xf6\xdfe\n")
    code, line = failure(bundle, tmp_path / "latin.txt", "-o", tmp_path / "scores.tsv")
    assert (code, "latin.txt, line 2: byte 7 is not UTF-8" in line) == (65, True)
    assert not (tmp_path / "scores.tsv").exists()
    assert failure(bundle, "--words", stdin=b"\xff\n")[1].startswith("lmdist-score: error: stdin, line 1: ")
    for options in ((), ("--accuracy",)):
        code, line = failure(bundle, *options)
        assert (code, "at least one line is expected" in line) == (65, True)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("just words", "it has 1 field"),
        ("1\ttwo\t3\t4", "it has 4 fields"),
        ("1\tthe cat\tgood", "its score is 'good'"),
        ("1\tthe cat\tnan", "its score is 'nan'"),
        ("1 ||| the cat", "it has 2 fields"),
        ("1 ||| the cat ||| -3", "it has 3 fields"),
        ("1 ||| the cat ||| LM0= -3 ||| ", "its score is ''"),
    ],
)
def test_wrong_lists(bundle, failure, line: str, problem: str) -> None:
    code, error = failure(bundle, "--nbest", stdin=f"{line}\n1\tthe cat\n".encode())
    assert code == 65
    assert f"stdin, line 1: {problem}; expected is ID ||| HYPOTHESIS" in error


def test_empty_lists_print_nothing(bundle, written) -> None:
    for options in (("--nbest",), ("--nbest", "--best"), ("--words",), ("--sentences",), ("--next", 3)):
        assert written(bundle, *options) == ""


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [("--sentences", b"the cat\nit is\n", b"\xff"), ("--nbest", b"1\tthe cat\t-1\n1\tit is\t-2\n", b"no list")],
    ids=["sentences", "nbest"],
)
def test_what_comes_before_a_line_that_cannot_be_used_is_scored(
    bundle: Path, tmp_path: Path, kind: str, good: bytes, bad: bytes
) -> None:
    (tmp_path / "good").write_bytes(good)
    (tmp_path / "bad").write_bytes(good + bad + b"\nthe dog\n")
    expected = command("lmdist_export.score", bundle, tmp_path / "good", kind).stdout
    assert len(expected.splitlines()) == 2
    found = command("lmdist_export.score", bundle, tmp_path / "bad", kind)
    assert (found.returncode, found.stdout) == (65, expected)
    to_file = command("lmdist_export.score", bundle, tmp_path / "bad", kind, "-o", tmp_path / "scores")
    assert (to_file.returncode, (tmp_path / "scores").read_text()) == (65, expected)
    assert f"{tmp_path / 'scores'} has what was done before" in to_file.stderr


def test_a_string_is_no_list_of_sentences(sampler) -> None:
    for method in (Scorer(sampler).score, Scorer(sampler).predict):
        with pytest.raises(UsageError, match=r"the sentences are 'the cat'; a list is expected, as \['the cat'\]"):
            method("the cat")


def test_a_scorer_that_contradicts_itself(sampler) -> None:
    with pytest.raises(UsageError, match="cannot be left out"):
        Scorer(sampler, end=False, carry_state=True)


def test_nothing_heavy_is_loaded(bundle, text) -> None:
    for options in ([], ["--accuracy"]):
        result = in_fresh_process(
            "score", [bundle, text, *options], {"torch", "pandas", "mlflow", "onnx", "matplotlib", "nltk"}
        )
        assert result.stderr.splitlines()[-1] == "set()"


def test_help_is_light() -> None:
    result = in_fresh_process("score", ["--help"], {"torch", "numpy", "onnxruntime", "nltk"})
    assert result.stderr == "set()\n"
    assert "--carry-state" in result.stdout
