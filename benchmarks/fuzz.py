"""Each file of each folder that lmdist writes is damaged in each way, and the commands that read it must notice.

    python benchmarks/fuzz.py                                       # 10 minutes
    python benchmarks/fuzz.py --quick --seed 3                      # under 2
    python benchmarks/fuzz.py --seed 3 --case 217                   # one case again, with all that the command prints

A case damages one file of a data folder, a checkpoint, a run or a bundle, and runs a command on it in a process of its own, a
fork of this one, which has imported everything; one case in 20 as a user's shell would. It must end by itself within a minute:

    refused     exit code 64, 65 or 66, the reason in one line, the last one
    same        exit code 0, and the result of the folder as it was
    announced   exit code 0, and the result of another checkpoint of the run, of which a warning has told
    obeyed      exit code 0, and another result: of a file without a checksum, which users may edit, or of one with a forged one
    BAD         another result, a traceback, a signal, no end, a control character for the terminal, or a change of a file that
                is not the command's to write

Kinds marked `forged` have the checksums of the changed file, as a stranger could write them. The seed gives the same cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from damages import KINDS
from lmdist.command_line import run_as_process
from lmdist.errors import MESSAGE_CONTROLS
from lmdist.storage.checksums import OWN_CHECKSUM, facts_of, own_checksum, sha256
from lmdist.text.data_folder import BLOCKS
from origin import Row, add_json_option, collect_rows, command_line

SECONDS, QUICK_SECONDS, PATIENCE = 600, 100, 60
SUBPROCESS_EVERY = 20
TRAIN = (
    "lmdist.train --model.embedding_size=8 --model.hidden_size=12 --model.dropout=0.1 --data.folder=data --data.global_batch=4 "
    "--data.window=7 --averaging.name=ema --training.device=cpu --training.precision=fp32 --training.validate_every=2 "
    "--checkpoint.every_steps=2 --checkpoint.keep=9 --tracking.mlflow=false --sample.words=3 --sample.final_words=3"
).split()
COMMANDS: dict[str, Sequence[str]] = {
    "prepare": "lmdist.text.prepare news.csv -o data --tokenizer=word_tokenize --min-count=1 --workers=1".split(),
    "train": [*TRAIN, "--run_folder=run", "--resume=auto", "--training.steps=4"],
    "cache": "lmdist.training.evaluate run --split=valid --cache=50 --json".split(),
    "export": "lmdist_export.export run -o bundle".split(),
    "start": [*TRAIN, "--run_folder=other", "--training.steps=2"],
    "resume": [*TRAIN, "--run_folder=run", "--resume=auto", "--training.steps=6"],
    "evaluate": "lmdist.training.evaluate run --split=valid --json".split(),
    "export again": "lmdist_export.export run -o other".split(),
    "generate": ["lmdist_export.generate", "bundle", "--prompt=The cat", "--max-new-tokens=9", "--seed=1", "--json", "--n=2"],
    "score": ["lmdist_export.score", "bundle", "text.txt", "--words", "--cache"],
}
MAKE = ("prepare", "train", "cache", "export")
"""What makes the folders."""
READERS = {
    "data": ("start", "resume", "evaluate", "export again"),
    "run": ("resume", "evaluate", "export again"),
    "checkpoints": ("resume", "evaluate", "export again"),
    "step": ("resume", "evaluate", "export again"),
    "bundle": ("generate", "score"),
}
"""The commands that read a folder: the run's newest checkpoint is `step`."""
WRITES = {"start": ("other",), "resume": ("run",), "export again": ("other",)}
"""The folders that a command may change."""
EDITABLE = re.compile(r"generation_config\.json|cache\.json|recipe\.toml|finished\.toml|metrics\.jsonl")
"""Files without a checksum, which users may edit or write anew."""


# --- cases: a copy of the folders, damaged in one place, and a command --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """What is damaged how, and the command that reads it."""

    number: int
    folder: str
    file: str
    kind: str
    command: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Negative: the signal that ended it; None: it had not ended in time."""
    stdout: str
    stderr: str


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a command makes of folders that are not damaged."""

    whole: str
    of_others: Sequence[str] = ()
    """The same without one of the run's checkpoints: what a warning that it is skipped may tell of."""


def make_world(world: Path) -> None:
    """Make the folders by the commands themselves, beside a home and a folder that are nobody's business."""
    for name in ("home", "outside"):
        (world / name).mkdir(parents=True)
        (world / name / "secret").write_text("theirs")
    draw = random.Random(0)
    words = "The president said that Mr. Smith would not come. It is here, and the cat isn't. We said it!".split()
    rows = "".join(f'{number},"{" ".join(draw.choices(words, k=40))}"\n' for number in range(60))
    (world / "news.csv").write_text(f"title,content\n{rows}")
    (world / "text.txt").write_text("The president said that it is here .\nWe said it !\n")
    for name in MAKE:
        ended = run(COMMANDS[name], world)
        assert ended.code == 0, f"{name}: {ended.stderr}"


def cases(world: Path, seed: int) -> Iterator[Case]:
    """Yield cases without end: each kind of damage of each file once, in the seed's order, then again with other details."""
    step = max((world / "run" / "checkpoints").glob("step-*")).relative_to(world)
    places = {"data": "data", "run": "run", "checkpoints": "run/checkpoints", "step": str(step), "bundle": "bundle"}
    files = [(name, path) for name, place in places.items() for path in sorted((world / place).iterdir()) if path.is_file()]
    table = [(name, str(path.relative_to(world)), kind) for name, path in files for kind in KINDS]
    draw, number = random.Random(seed), 0
    while True:
        for name, file, kind in draw.sample(table, len(table)):
            yield Case(number, name, file, kind, draw.choice(READERS[name]))
            number += 1


def try_case(
    case: Case, original: Path, world: Path, expected: Expected, seed: int, patience: float
) -> tuple[str, str, Ended] | None:
    """Return the outcome of a case, what was done and why it is bad, and how the command ended; None where it means nothing."""
    shutil.rmtree(world, ignore_errors=True)
    shutil.copytree(original, world)
    done = KINDS[case.kind](world / case.file, random.Random(f"{seed}/{case.number}"))
    if not done:
        return None
    if case.kind.startswith("forged"):
        forge(world / case.file)
    before = snapshot(world, case.command)
    ended = run(COMMANDS[case.command], world, by_shell=case.number % SUBPROCESS_EVERY == 0, seconds=patience)
    changed = sorted(before.items() ^ snapshot(world, case.command).items())
    outcome, why = judge(case, ended, expected, world)
    if changed:
        outcome, why = "BAD", f"it changed {changed[0][0]!a}"
    return outcome, f"{done}{f': {why}' if why else ''}", ended


def forge(path: Path) -> None:
    """Have the manifest beside a changed file hold the checksums of it, and the manifest's own."""
    for manifest in (path.with_name("manifest.json"), path.with_name("meta.json")):
        try:
            value = json.loads(manifest.read_text())
            holder, key = (value, "blocks") if path.name == BLOCKS else (value["files"], path.name)
            if key in holder:
                holder[key] = facts_of(path)
            if OWN_CHECKSUM in value:
                value[OWN_CHECKSUM] = own_checksum(value)
            if manifest == path or key in holder:
                manifest.write_text(json.dumps(value))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # there is none, or it is the changed file and no manifest any more


def judge(case: Case, ended: Ended, expected: Expected, world: Path) -> tuple[str, str]:
    """Return an outcome, and why it is bad."""
    lines = ended.stderr.splitlines()
    errors = [line for line in lines if ": error: " in line]
    if ended.code is None:
        return "BAD", "no end"
    if ended.code < 0:
        return "BAD", f"ended by signal {-ended.code}"
    if "Traceback" in ended.stderr:
        return "BAD", f"a traceback: {lines[-1]:.300}"
    if MESSAGE_CONTROLS.search(ended.stderr + ended.stdout):
        return "BAD", "a control character is printed"
    if ended.code in (64, 65, 66):
        is_one_line = len(errors) == 1 and lines[-1] == errors[0] and len(lines[-1]) < 2000
        return (f"refused {ended.code}", "") if is_one_line else ("BAD", f"the reason is not one line: {lines[-1:]!s:.300}")
    if ended.code != 0:
        return "BAD", f"exit code {ended.code}: {lines[-1:]!s:.300}"
    result = result_of(case.command, world, ended.stdout)
    if result == expected.whole:
        return "same", ""
    if result in expected.of_others and "warning: skipping a damaged checkpoint" in ended.stderr:
        return "announced", ""
    if case.kind.startswith("forged") or EDITABLE.fullmatch(Path(case.file).name):
        return "obeyed", ""
    return "BAD", "another result"


def result_of(command: str, world: Path, stdout: str) -> str:
    """Return what a command has made of the folders: the parameters, the figures, the bundle, or the text."""
    if command in ("start", "resume"):
        step = world / {"start": "other/checkpoints/step-000000002", "resume": "run/checkpoints/step-000000006"}[command]
        return " ".join(sha256(file) for file in sorted(step.glob("*.safetensors")))
    if command == "export again":
        cache = json.loads((world / "other" / "manifest.json").read_text())["cache"]
        files = (file for file in sorted((world / "other").iterdir()) if file.name not in ("manifest.json", "MLmodel"))  # times
        return f"{cache} {' '.join(map(sha256, files))}"
    return re.sub(r'"tokens_per_second": [^,}]+', "", stdout)


def snapshot(world: Path, command: str) -> dict[str, str]:
    """Return what all files of a world hold, but for those that the command, or a library for its cache, may write."""
    found = {}
    for folder, folders, files in os.walk(world):
        for name in [*folders, *files]:
            path = Path(folder) / name
            place, status = str(path.relative_to(world)), path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() and status.st_size < 1 << 20 else b""
            ours = place.split("/")[0] in (*WRITES.get(command, ()), "stdout", "stderr") or place.startswith("home/.")
            if not ours or content == b"theirs":
                found[place] = f"{status.st_mode} {status.st_size * bool(content)} {hashlib.sha256(content).hexdigest()}"
    return found


# --- processes ----------------------------------------------------------------------------------------------------------


def run(words: Sequence[str], world: Path, *, by_shell: bool = False, seconds: float = 3600) -> Ended:
    """Run a command in a world: by a new Python, or by a fork of this process, which takes a tenth of the time."""
    outputs = [world / "stdout", world / "stderr"]
    environment = {**os.environ, "HOME": str(world / "home"), "OMP_NUM_THREADS": "1"}
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # not this benchmark's own handlers
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(world)
        if by_shell:
            os.execve(sys.executable, [sys.executable, "-m", *words], environment)
        os.environ.update(environment)
        run_as_process(lambda: importlib.import_module(words[0]).main(words[1:]))
    until, code = time.monotonic() + seconds, None
    while code is None and time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else None
        time.sleep(0.005)
    if code is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return Ended(code, *(path.read_text("utf-8", "replace") for path in outputs))


def preload() -> None:
    """Import what the commands need, and start no thread."""
    for words in COMMANDS.values():
        importlib.import_module(words[0])
    for name in (
        "lmdist.training.loop lmdist.training.neural_cache lmdist_export.conversion.exporting lmdist_export.sampling.scoring "
        "lmdist_export.sampling.generation torch._dynamo matplotlib.pyplot onnxruntime nltk"
    ).split():
        importlib.import_module(name)


# --- the table ------------------------------------------------------------------------------------------------------------

OUTCOMES = ("refused 64", "refused 65", "refused 66", "same", "announced", "obeyed", "BAD")


def main() -> None:
    """Try cases until the time is over; print a table of the outcomes, and each bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"(default: {SECONDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} seconds")
    parser.add_argument("--patience", type=int, default=PATIENCE, help=f"seconds for a command (default: {PATIENCE})")
    parser.add_argument("--case", type=int, help="only the case of this number, with all that its command prints")
    add_json_option(parser)
    arguments = parser.parse_args()
    until = time.monotonic() + (QUICK_SECONDS if arguments.quick else arguments.seconds)
    preload()
    command = command_line(parser, arguments)
    with (
        collect_rows(arguments.json, ("lmdist", "torch", "onnxruntime"), command) as rows,
        tempfile.TemporaryDirectory(prefix="fuzz-") as scratch,
    ):
        original, world = Path(scratch) / "original", Path(scratch) / "case"
        make_world(original)
        expected = {command: expected_of(command, original, world) for readers in READERS.values() for command in readers}
        counts: dict[tuple[str, str], Counter[str]] = {}
        for case in cases(original, arguments.seed):
            if arguments.case not in (None, case.number):
                continue
            if time.monotonic() > until:
                break
            tried = try_case(case, original, world, expected[case.command], arguments.seed, arguments.patience)
            if tried:
                outcome, what, ended = tried
                counts.setdefault((case.folder, case.kind), Counter())[outcome] += 1
                if outcome == "BAD" or arguments.case is not None:
                    print(f"{outcome}: --case {case.number}: {case.command}, {case.file}, {case.kind}, {what}", flush=True)
                if arguments.case is not None:
                    print(ended.stdout, ended.stderr, sep="\n")
            if arguments.case is not None:
                break
        rows += table_of(counts)
    print_table(rows)
    if any(row["BAD"] for row in rows):
        sys.exit(1)


def expected_of(command: str, original: Path, world: Path) -> Expected:
    """Return what a command makes of folders as they were made, and of a run that lacks a checkpoint."""
    steps = sorted(path.relative_to(original) for path in (original / "run" / "checkpoints").glob("step-*"))
    reads_run = command in READERS["checkpoints"]
    return Expected(
        undamaged(command, original, world), [undamaged(command, original, world, step) for step in steps if reads_run]
    )


def undamaged(command: str, original: Path, world: Path, without: Path | None = None) -> str:
    """Return the result of a command on folders as they were made, but `without` one of them."""
    shutil.rmtree(world, ignore_errors=True)
    shutil.copytree(original, world)
    if without:
        shutil.rmtree(world / without)
    ended = run(COMMANDS[command], world)
    assert ended.code == 0, f"{command}: {ended.stderr}"
    return result_of(command, world, ended.stdout)


def table_of(counts: dict[tuple[str, str], Counter[str]]) -> list[Row]:
    """Return a row for each kind of damage to each folder."""
    return [
        {"case": folder, "variant": kind, "value": found.total(), "unit": "cases", "ratio": None, "spread": None}
        | {name: found[name] for name in OUTCOMES}
        for (folder, kind), found in sorted(counts.items())
    ]


def print_table(rows: list[Row]) -> None:
    """Print the rows, and their sum."""
    total = {"case": "all", "variant": "", "value": 0, **dict.fromkeys(OUTCOMES, 0)}
    for row in rows:
        total |= {name: total[name] + row[name] for name in ("value", *OUTCOMES)}
    print(f"{'folder':<13}{'kind':<15}{'cases':>6}{''.join(f'{name:>12}' for name in OUTCOMES)}")
    for row in [*rows, total]:
        counts = "".join(f"{row[name] or '':>12}" for name in OUTCOMES)
        print(f"{row['case']:<13}{row['variant']:<15}{row['value']:>6}{counts}")


if __name__ == "__main__":
    main()
