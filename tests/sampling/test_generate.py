"""lmdist-generate: text on stdout, log lines on stderr, and the same text for the same seed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmdist_export import generate
from lmdist_export.sampling.completion import in_order
from lmdist_export.sampling.generation import Text
from support import failures
from support.small_bundles import PLAIN_WORDS, UNTIED, command, edit_json, in_fresh_process, make_bundle, neutral


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return neutral(make_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def whitespace_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the whitespace tokenizer, so that the words of a text can be counted; `<eos>` is a line break."""
    return neutral(make_bundle(tmp_path_factory.mktemp("whitespace"), UNTIED, "whitespace", PLAIN_WORDS))


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the command, and returns its stdout and stderr."""

    def call(*arguments: object) -> tuple[str, str]:
        generate.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return output.out, output.err

    return call


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]):
    """Return a function that runs a failing command, and returns its exit code and its one line."""

    return partial(failures.only_line, generate.main, capsys)


def test_the_command(bundle: Path) -> None:
    arguments = (bundle, "--prompt", "The president said", "--seed", 1, "--max-new-tokens", 30, "--ignore-eos")
    first, second = (command("lmdist_export.generate", *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The president said")
    assert first.stdout == second.stdout
    assert "30 tokens in" in first.stderr
    assert "warning: not in the vocabulary, and read as <unk>: The; known in lowercase: the" in first.stderr


def test_the_seed_decides(bundle: Path, written) -> None:
    def text(*arguments: object) -> str:
        return written(bundle, "--ignore-eos", "--max-new-tokens", 40, *arguments)[0]

    assert text("--seed", 5) == text("--seed", 5)
    assert text("--seed", 5) != text("--seed", 6)
    assert text("--seed", 5, "--temperature", 0) == text("--seed", 6, "--temperature", 0)


def test_the_printed_seed_repeats_the_text(bundle: Path, written) -> None:
    out, err = written(bundle, "--ignore-eos")
    seed = next(line.rpartition(" ")[2] for line in err.splitlines() if ": seed " in line)
    assert written(bundle, "--ignore-eos", "--seed", seed)[0] == out
    assert "seed" not in written(bundle, "--seed", seed)[1]


@pytest.mark.parametrize("options", [(), ("--ignore-eos", "--prompt", "(the cat said,"), ("--top-k", 3)])
def test_streamed_text_is_the_text(bundle: Path, written, options: tuple[object, ...]) -> None:
    for seed in range(5):
        arguments = (bundle, "--seed", seed, "--max-new-tokens", 50, *options)
        assert written(*arguments, "--stream")[0] == written(*arguments)[0]


def test_words_are_streamed_one_by_one(whitespace_bundle: Path) -> None:
    arguments = [str(whitespace_bundle), "--stream", "--seed", "1", "--max-new-tokens", "1000000", "--ignore-eos"]
    with subprocess.Popen(
        [sys.executable, "-m", "lmdist_export.generate", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(20)  # long before the last of a million words
        process.stdout.close()  # as `| head` does
        assert process.stderr is not None
        error = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"Traceback" not in error


def test_ignore_eos_generates_all_tokens(whitespace_bundle: Path, written) -> None:
    out, _ = written(whitespace_bundle, "--seed", 3, "--max-new-tokens", 300, "--ignore-eos", "--prompt", "the cat")
    words = out.removesuffix("\n").replace("\n", " <eos> ").split()
    assert words[:2] == ["the", "cat"]
    assert len(words) == 302
    assert "<eos>" in words
    assert set(words) == {*PLAIN_WORDS, "<eos>"}  # and no <unk>


def test_a_text_stops_at_its_end(whitespace_bundle: Path, written) -> None:
    whole, _ = written(whitespace_bundle, "--seed", 3, "--max-new-tokens", 300, "--ignore-eos")
    out, err = written(whitespace_bundle, "--seed", 3, "--max-new-tokens", 300)
    assert out == whole.partition("\n")[0] + "\n"
    assert f"{len(out.split())} tokens in" in err


def test_unknown_words_are_written_only_when_allowed(whitespace_bundle: Path, written) -> None:
    arguments = (whitespace_bundle, "--seed", 1, "--max-new-tokens", 300, "--ignore-eos")
    assert "<unk>" not in written(*arguments)[0]
    assert "<unk>" in written(*arguments, "--allow-unk")[0]


def test_several_texts(whitespace_bundle: Path, written) -> None:
    arguments = (whitespace_bundle, "--seed", 2, "--max-new-tokens", 25, "--prompt", "the dog")
    three, err = written(*arguments, "--n", 3)
    texts = [part.strip() for part in three.replace("===== 2 =====", "|").replace("===== 3 =====", "|").split("|")]
    assert len(texts) == 3
    assert len(set(texts)) == 3
    assert all(text.startswith("the dog") for text in texts)
    assert written(*arguments)[0].strip() == texts[0]
    assert f"{sum(len(text.split()) - 2 for text in texts)} tokens in" in err


def test_a_file_in_place_of_stdout(bundle: Path, tmp_path: Path, written) -> None:
    out, err = written(bundle, "--seed", 1, "-o", tmp_path / "sample.txt")
    text = (tmp_path / "sample.txt").read_text(encoding="utf-8")
    assert (out, text) == ("", written(bundle, "--seed", 1)[0])
    assert str(tmp_path / "sample.txt") in err
    assert [path.name for path in tmp_path.iterdir()] == ["sample.txt"]


def test_values_come_from_the_bundle_and_flags_go_above(bundle: Path, tmp_path: Path, written) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    edit_json(copy / "generation_config.json", max_new_tokens=7, do_sample=False)
    greedy, err = written(copy, "--ignore-eos")
    assert "7 tokens in" in err
    assert "seed" not in err
    assert greedy == written(bundle, "--ignore-eos", "--temperature", 0, "--max-new-tokens", 7)[0]
    sampled = written(copy, "--ignore-eos", "--temperature", 1, "--seed", 1, "--max-new-tokens", 40)[0]
    assert sampled == written(bundle, "--ignore-eos", "--seed", 1, "--max-new-tokens", 40)[0]


def test_unknown_words_of_the_prompt(bundle: Path, written) -> None:
    out, err = written(bundle, "--prompt", "The zebra said Xylophone zebra", "--seed", 1)
    assert out.startswith("The zebra said Xylophone zebra")
    assert "read as <unk>: The, zebra, Xylophone; known in lowercase: the\n" in err
    assert "warning" not in written(bundle, "--prompt", "the cat", "--seed", 1)[1]


def test_a_prompt_that_ends_in_an_abbreviation_goes_on(bundle: Path, written) -> None:
    out, err = written(bundle, "--prompt", "the cat said Mr.", "--seed", 1)
    assert out.startswith("the cat said Mr.")
    assert "read as <unk>: Mr.\n" in err  # the word, not Mr and a full stop
    assert "warning" not in written(bundle, "--prompt", "the cat said.", "--seed", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", -1), "--temperature is -1.0; it must be at least 0"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--temperature", "hot"), "invalid float value: 'hot'"),
        (("--top-p", 0), "--top-p is 0.0; it must be above 0"),
        (("--top-p", 1.5), "--top-p is 1.5"),
        (("--top-k", -1), "--top-k is -1"),
        (("--max-new-tokens", 0), "--max-new-tokens is 0; it must be from 1 to 1,000,000,000,000"),
        (("--n", 0), "--n is 0; it must be from 1 to 1,000,000"),
        (("--n", 2, "--stream"), "--stream prints one text"),
        (("--seed", -1), "--seed is -1"),
        (("--threads", -1), "threads is -1"),
        (("--provider", "tpu"), "invalid choice: 'tpu'"),
        (("-o", "."), "is a folder without its name"),
        (("-o", "/dev/null"), "is not a file"),
        (("-o", "nowhere/sample.txt"), "nothing can be written in nowhere"),
    ],
)
def test_wrong_values(bundle: Path, failure, arguments: tuple[object, ...], message: str) -> None:
    code, line = failure(bundle, *arguments)
    assert code == 64
    assert message in line


WRONG_TOGETHER = [
    (("--prompt", "the", "--prompts-file", "-"), "--prompt and --prompts-file are both given"),
    (("--logprobs", 2), "give --json as well"),
    (("--json", "--logprobs", -1), "--logprobs is -1"),
    (("--stream", "--json"), "--stream prints one text"),
    (("--num-beams", 2, "--top-k", 3), "and --top-k for sampling: give only one of them"),
    (("--num-beams", 2, "--seed", 3), "and --seed for sampling: give only one of them"),
    (("--num-beams", 2, "--stream"), "and --stream for sampling: give only one of them"),
    (("--num-beams", 2, "--n", 3), "at most so many texts"),
    (("--length-penalty", 2), "give --num-beams as well"),
    (("--min-new-tokens", 9, "--max-new-tokens", 8), "min_new_tokens is 9; it must be from 0 to max_new_tokens, 8"),
    (("--logit-bias", "the"), "WORD=X is expected"),
    (("--logit-bias", "the=much"), "WORD=X is expected"),
    (("--logit-bias", "=3"), "WORD=X is expected"),
    (("--bad-words", " "), "has no words"),
    (("--batch-size", 0), "--batch-size is 0"),
    *((("--min-p", value), "--min-p is") for value in (-0.1, 1.1)),
    *((("--typical-p", value), "--typical-p is") for value in (0, 1.1)),
    (("--repetition-penalty", 0), "--repetition-penalty is 0"),
    (("--presence-penalty", "nan"), "--presence-penalty is nan"),
    (("--no-repeat-ngram-size", -1), "--no-repeat-ngram-size is -1"),
    (("--num-beams", 0), "--num-beams is 0"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG_TOGETHER, ids=[" ".join(map(str, flags)) for flags, _ in WRONG_TOGETHER]
)
def test_wrong_values_of_options(whitespace_bundle: Path, failure, arguments: tuple[object, ...], message: str) -> None:
    code, line = failure(whitespace_bundle, *arguments)
    assert code == 64
    assert message in line


def test_lists_may_have_words_that_the_model_does_not_know(whitespace_bundle: Path, written) -> None:
    arguments = (whitespace_bundle, "--seed", 3, "--max-new-tokens", 60, "--ignore-eos")
    lists = ("--bad-words", "cat", "--stop", "old too", "--logit-bias", "dog=2")
    expected, _ = written(*arguments, *lists)
    found, err = written(*arguments, *lists, "--bad-words", "zebra", "--stop", "the zebra", "--logit-bias", "zebra=9")
    assert found == expected
    for name in ("--stop", "--bad-words", "--logit-bias"):
        assert f"warning: {name}: not in the vocabulary, so never generated: 'zebra'\n" in err
    # A text with an unknown word never ends a text before `<unk>`.
    with_unk = (*arguments, "--allow-unk", "--logit-bias", "<unk>=3")
    assert written(*with_unk, "--stop", "zebra")[0] == written(*with_unk)[0]


@pytest.mark.parametrize(
    "options",
    [
        ("--top-k", 3),
        ("--top-p", 0.6),
        ("--min-p", 0.3),
        ("--typical-p", 0.5),
        ("--repetition-penalty", 3),
        ("--presence-penalty", 3),
        ("--frequency-penalty", 3),
        ("--no-repeat-ngram-size", 2),
        ("--min-new-tokens", 20),
        ("--logit-bias", "cat=4"),
        ("--bad-words", "the"),
        ("--stop", "the"),
        ("--temperature", 0.3),
    ],
    ids=lambda options: options[0],
)
def test_each_option_changes_the_text_and_not_by_how_it_is_written(
    whitespace_bundle: Path, written, options: tuple[object, ...]
) -> None:
    arguments = (whitespace_bundle, "--prompt", "the cat", "--max-new-tokens", 40)
    if options[0] != "--min-new-tokens":
        arguments = (*arguments, "--ignore-eos")  # most texts of this model are too short to have anything twice
    changed = 0
    for seed in range(4):
        text, _ = written(*arguments, *options, "--seed", seed)
        assert written(*arguments, *options, "--seed", seed, "--stream")[0] == text
        as_json = json.loads(written(*arguments, *options, "--seed", seed, "--json")[0])
        assert as_json["text"] + "\n" == text
        changed += text != written(*arguments, "--seed", seed)[0]
    assert changed


def test_lines_of_json(whitespace_bundle: Path, tmp_path: Path, written) -> None:
    prompts = ["the cat", "", "zebra said", "is not it"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    arguments = (whitespace_bundle, "--seed", 4, "--n", 3, "--max-new-tokens", 12, "--json", "--logprobs", 2)
    out, err = written(*arguments, "--prompts-file", tmp_path / "prompts.txt", "--batch-size", 5)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt_number"], line["index"]) for line in lines] == [(prompt, n) for prompt in range(4) for n in range(3)]
    assert "read as <unk>: zebra" in err
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    for line in lines:
        alone, _ = written(*arguments, "--prompt", prompts[line["prompt_number"]])
        same = json.loads(alone.splitlines()[line["index"]])
        # Another batch size is another order of sums: in log-probabilities that shows.
        for found, expected in zip(line["logprobs"]["token_logprobs"], same["logprobs"]["token_logprobs"], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
        assert {**line, "prompt_number": 0, "logprobs": None} == {**same, "logprobs": None}
        assert line["text"] == " ".join([*prompts[line["prompt_number"]].split(), *line["words"]])
        assert (len(line["words"]) == 12) == (line["finish_reason"] == "length")
        assert line["logprobs"]["tokens"] == line["words"]
        for best in line["logprobs"]["top_logprobs"]:
            assert len(best) == 2
            assert list(best.values()) == sorted(best.values(), reverse=True)
    without, _ = written(*arguments[:-2], "--no-echo", "--prompt", "the cat")
    assert [json.loads(line)["text"] for line in without.splitlines()] == [" ".join(line["words"]) for line in lines[:3]]


def test_prompts_from_stdin_are_answered_in_order(whitespace_bundle: Path) -> None:
    arguments = ["--prompts-file", "-", "--seed", "1", "--json", "--max-new-tokens", "5"]
    prompts = [" ".join(PLAIN_WORDS[: number % 7]) for number in range(40)]
    found = subprocess.run(
        [sys.executable, "-m", "lmdist_export.generate", str(whitespace_bundle), *arguments],
        input="\n".join(prompts).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["prompt_number"] for line in lines] == list(range(40))
    assert all(line["text"].startswith(prompt) for line, prompt in zip(lines, prompts, strict=True))


def test_what_is_piped_into_the_command_are_its_prompts(whitespace_bundle: Path) -> None:
    arguments = ("lmdist_export.generate", whitespace_bundle, "--seed", 1, "--max-new-tokens", 5)

    def text(*options: object, given: str | None = None) -> str:
        return command(*arguments, *options, given=given).stdout

    assert text(given="the cat\n") == text("--prompt", "the cat")
    assert text("--n", 2, given="the cat\nit is\n").count("=====") == 6  # four texts
    assert text("--stream", given="the cat\n") == text("--stream", "--prompt", "the cat")
    assert text() == text(given="") == text("--prompt", "", given="the cat\n")
    assert text("--prompt", "it is", given="the cat\n") == text("--prompt", "it is")
    several = command(*arguments, "--stream", given="the cat\nit is\n")
    assert (several.returncode, "stdin has several lines" in several.stderr) == (65, True)


def test_a_prompt_to_stream_that_cannot_be_read_is_one_line(whitespace_bundle: Path) -> None:
    line = [sys.executable, "-m", "lmdist_export.generate", str(whitespace_bundle), "--stream", "--seed", "1"]
    done = subprocess.run(line, input=b"\xff\n", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (65, b"")
    assert done.stderr.splitlines()[-1].startswith(b"lmdist-generate: error: stdin, line 1: byte 1 is not UTF-8")
    assert b"Traceback" not in done.stderr


def test_a_closed_stdout_is_one_line(whitespace_bundle: Path) -> None:
    line = f"exec {sys.executable} -m lmdist_export.generate {whitespace_bundle} --prompt the >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 64
    assert done.stderr.splitlines()[-1] == "lmdist-generate: error: stdout is closed: give a file by -o FILE"


def test_prompts_that_cannot_be_read(whitespace_bundle: Path, tmp_path: Path, failure) -> None:
    assert failure(whitespace_bundle, "--prompts-file", tmp_path / "none")[0] == 66
    assert failure(whitespace_bundle, "--prompts-file", tmp_path)[0] == 64


@pytest.mark.parametrize("search", [(), ("--num-beams", 2)], ids=["sampled", "beams"])
def test_texts_before_a_prompt_that_cannot_be_read_are_written(
    whitespace_bundle: Path, tmp_path: Path, search: tuple[object, ...]
) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"the cat\r\n\r\n\xff\r\nthe dog\r\n")
    options = ("--max-new-tokens", 3, "--json", *search)
    done = command("lmdist_export.generate", whitespace_bundle, "--prompts-file", tmp_path / "prompts.txt", *options)
    first, second = [json.loads(line) for line in done.stdout.splitlines()]
    assert first["text"].split() == ["the", "cat", *first["words"]]
    assert second["text"].split() == second["words"]
    assert done.returncode == 65
    assert "prompts.txt, line 3: byte 1 is not UTF-8" in done.stderr.splitlines()[-1]
    output = tmp_path / "texts.jsonl"
    to_file = command(
        "lmdist_export.generate", whitespace_bundle, "--prompts-file", tmp_path / "prompts.txt", "-o", output, *options
    )
    assert to_file.returncode == 65
    assert f"{output} has what was done before" in to_file.stderr
    assert [json.loads(line)["prompt_number"] for line in output.read_text().splitlines()] == [0, 1]
    (tmp_path / "prompts.txt").write_bytes(b"\xff")
    command("lmdist_export.generate", whitespace_bundle, "--prompts-file", tmp_path / "prompts.txt", "-o", output, *options)
    assert len(output.read_text().splitlines()) == 2, "a command that has done nothing replaces nothing"


@pytest.mark.parametrize("to_file", [False, True], ids=["stdout", "file"])
def test_an_interrupt_leaves_the_texts_that_are_done(whitespace_bundle: Path, tmp_path: Path, *, to_file: bool) -> None:
    output = tmp_path / "texts.jsonl"
    arguments = ["--prompts-file", "-", "--seed", "1", "--json", "--max-new-tokens", "100000", "--stop", "cat dog"]
    arguments += ["-o", str(output)] if to_file else []
    command_line = [sys.executable, "-m", "lmdist_export.generate", str(whitespace_bundle), *arguments, "--ignore-eos"]
    prompts = "\n".join(["the cat", "cat the", "we said", "it is", "too old", "here we"] * 50)
    with subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(prompts.encode())
        process.stdin.close()
        first = [] if to_file else [process.stdout.readline()]
        while to_file and not any(file.stat().st_size for file in tmp_path.iterdir()):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM if to_file else signal.SIGINT)
        rest = process.stdout.readlines()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 75
    assert error.endswith(b"lmdist-generate: interrupted\n")
    assert b"Traceback" not in error
    lines = output.read_bytes().splitlines() if to_file else [*first, *rest]
    numbers = [json.loads(line)["prompt_number"] for line in lines]
    assert numbers == sorted(set(numbers))
    assert 0 < len(numbers) < 300
    assert [file.name for file in tmp_path.iterdir()] == [output.name] * to_file


def test_texts_that_wait_for_their_turn_are_written_at_an_interrupt() -> None:
    prompts: list[Any] = ["first", "second", "third"]

    def texts_until_interrupt() -> Iterator[tuple[Any, Text]]:
        for place in (4, 1, 0, 3):
            number, text = divmod(place, 2)
            yield prompts[number], Text([], number, text)
        raise KeyboardInterrupt

    texts = in_order(texts_until_interrupt(), 2)
    found = [next(texts) for _ in range(4)]
    assert [(prompt, text.number) for prompt, text in found] == [("first", 0), ("first", 1), ("second", 1), ("third", 0)]
    with pytest.raises(KeyboardInterrupt):
        next(texts)


def test_a_search(whitespace_bundle: Path, written) -> None:
    arguments = (whitespace_bundle, "--prompt", "the cat", "--num-beams", 5, "--max-new-tokens", 6, "--json", "--logprobs", 0)
    texts = [json.loads(line) for line in written(*arguments, "--n", 3, "--ignore-eos")[0].splitlines()]
    scores = [sum(text["logprobs"]["token_logprobs"]) for text in texts]
    assert scores == sorted(scores, reverse=True)
    assert len({text["text"] for text in texts}) == 3
    assert [text["index"] for text in texts] == [0, 1, 2]
    greedy = json.loads(written(whitespace_bundle, *arguments[1:3], *arguments[5:], "--temperature", 0, "--ignore-eos")[0])
    assert scores[0] >= sum(greedy["logprobs"]["token_logprobs"])
    assert written(*arguments, "--ignore-eos")[0] == written(*arguments, "--ignore-eos")[0]


@pytest.mark.parametrize("search", [(), ("--temperature", 0), ("--num-beams", 3)], ids=["sampled", "greedy", "beams"])
def test_a_text_without_allowed_tokens_does_not_affect_others(
    whitespace_bundle: Path, tmp_path: Path, written, search: tuple[object, ...]
) -> None:
    prompts = ["the cat", " ".join(PLAIN_WORDS), "", " ".join(PLAIN_WORDS[3:])]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    arguments = (whitespace_bundle, "--no-repeat-ngram-size", 1, "--logit-bias", "<eos>=-inf", "--max-new-tokens", 5, *search)
    seed = () if "--num-beams" in search else ("--seed", 1)
    out, err = written(*arguments, *seed, "--prompts-file", tmp_path / "prompts.txt", "--json")
    texts = [json.loads(line) for line in out.splitlines()]
    assert [text["prompt_number"] for text in texts] == [0, 1, 2, 3]
    assert [(len(text["words"]), text["finish_reason"]) for text in texts] == [
        (5, "length"), (0, "exhausted"), (5, "length"), (3, "exhausted"),
    ]  # fmt: skip
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert "prompt_number 3, index 0 ends after 3 tokens" in "".join(warnings)
    assert "13 tokens in" in err
    if not search:
        out, err = written(*arguments, *seed, "--stream", "--prompt", prompts[3])
        assert out == texts[3]["text"] + "\n"
        assert "prompt_number 0, index 0 ends after 3 tokens" in err


def test_what_is_no_bundle(bundle: Path, tmp_path: Path, failure) -> None:
    assert failure(tmp_path / "none")[0] == 66
    assert failure(tmp_path)[0] == 66
    code, line = failure(bundle.parent / "runs/small/checkpoints/step-000000007")
    assert (code, "lmdist-export" in line) == (65, True)
    assert failure()[0] == 64


def test_nothing_heavy_is_loaded(bundle: Path, whitespace_bundle: Path) -> None:
    # NLTK takes scikit-learn, and that pandas, wherever they are installed: it is imported for a prompt that needs it only.
    for arguments in ([bundle], [whitespace_bundle, "--prompt", "the cat said"]):
        result = in_fresh_process("generate", arguments, {"torch", "pandas", "mlflow", "onnx", "matplotlib", "nltk"})
        assert result.stderr.splitlines()[-1] == "set()"


def test_help_is_light() -> None:
    result = in_fresh_process("generate", ["--help"], {"torch", "numpy", "onnxruntime", "nltk"})
    assert result.stderr == "set()\n"
    assert "--top-p" in result.stdout
