"""The training job as users start it: on 1, 2 and 4 ranks, stopped and resumed, and with mistakes."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch.nn import functional

from corpora import chain, write_data_folder
from lmdist import config
from lmdist.console import ProgressBar
from lmdist.errors import EXIT_AGAIN, EXIT_USAGE
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import IGNORED
from lmdist.settings import DEMO_SETTINGS, OptimizerSettings, PrepareSettings, Recipe
from lmdist.signals import StopRequest
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import read_json
from lmdist.tracking.logger import MetricsLogger
from lmdist.tracking.plot import plot_losses
from lmdist.train import prepare_if_absent
from lmdist.training import report
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.read import read_tensors
from lmdist.training.checkpoints.retain import find_checkpoint, newest_checkpoint
from lmdist.training.data import DataFolder, training_batches
from lmdist.training.optimizer import weight_decay_of
from support.jobs import DROPOUT, SMALL, command, environment, losses, rows, start, torchrun, train, train_here

OPTIMIZER_NAMES = get_args(get_type_hints(OptimizerSettings)["name"])
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def data(tmp_path):
    """451 tokens in 8 streams of 56 or 57: the last windows are uneven."""
    splits = {"train": chain(451, 30), "valid": chain(103, 30, seed=1), "test": chain(99, 30, seed=2)}
    return write_data_folder(tmp_path / "data", splits, 30)


def into_run(data: Path, *flags: str) -> list[str]:
    return [f"--data.folder={data}", f"--run_folder={data.parent / 'run'}", *flags]


def recipe(data: Path, *flags: str) -> Recipe:
    return config.load([*SMALL, *into_run(data, *flags)])


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    return read_tensors(HeldFolder(newest), "model.safetensors")


# Only some ranks have rare tokens: on the others a cluster of the adaptive head has no gradient.
ADAPTIVE = "--model.head=adaptive --model.tied=false --optimizer.activation_penalty=2 --optimizer.temporal_penalty=1".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batching", "more", "run_two"),
    [("streams", [], torchrun), ("windows", ADAPTIVE, train)],
    ids=["streams", "windows, adaptive"],
)
def test_the_number_of_ranks_changes_nothing(data, tmp_path, batching, more, run_two):
    flags = [*SMALL, *DROPOUT, f"--data.folder={data}", f"--data.batching={batching}", "--training.epochs=2", *more]
    for ranks, run in ((1, train), (2, run_two), (4, train)):
        run(ranks, *flags, f"--run_folder={ranks}", cwd=tmp_path)
    one = tmp_path / "1"
    assert len(losses(one)) >= 18
    assert losses(one)[-1] < losses(one)[0] - 0.3
    for ranks in (2, 4):
        many = tmp_path / str(ranks)
        np.testing.assert_allclose(losses(many), losses(one), rtol=0, atol=1e-5)
        np.testing.assert_allclose(losses(many, "valid/loss"), losses(one, "valid/loss"), rtol=0, atol=1e-5)
        for name, value in weights(one).items():
            torch.testing.assert_close(weights(many)[name], value, rtol=0, atol=1e-5)


def test_a_job_resumes_with_another_number_of_ranks(data, tmp_path):
    """11 steps on 2 ranks, the rest of 24 on 1 and on 4: the parameters, the carried state and the losses of 24 steps on 2."""
    flags = [*SMALL, *DROPOUT, f"--data.folder={data}", "--schedule.name=plateau"]
    flags += ["--training.validate_every=4", "--training.log_every=3"]
    train(2, *flags, "--training.steps=24", "--run_folder=whole", cwd=tmp_path)
    train(2, *flags, "--training.steps=11", "--run_folder=begun", cwd=tmp_path)
    for ranks in (1, 4):
        run = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "begun", run)
        train(ranks, *flags, "--training.steps=24", f"--run_folder={run}", "--resume=auto", cwd=tmp_path)
        whole = {row["step"]: row["train/loss"] for row in rows(tmp_path / "whole") if "train/loss" in row}
        resumed = {row["step"]: row["train/loss"] for row in rows(run) if "train/loss" in row}
        assert whole.keys() <= resumed.keys()
        np.testing.assert_allclose(
            [resumed[step] for step in whole if step > 12], [whole[step] for step in whole if step > 12], rtol=0, atol=1e-5
        )
        for name in ("model.safetensors", "training.safetensors"):
            one, two = (
                read_tensors(HeldFolder(where / "checkpoints/step-000000024"), name) for where in (tmp_path / "whole", run)
            )
            for key, value in one.items():
                torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5, msg=f"{key} on {ranks} ranks")


@pytest.mark.parametrize(
    ("flags", "golden"),
    [
        (["--model.dropout=0"], [3.385228293, 3.318396432, 3.194803238, 3.184272494]),
        (DROPOUT, [3.381119047, 3.312974930, 3.238065992, 3.224398749]),
    ],
    ids=["without dropout", "with dropout"],
)
def test_the_first_losses_are_those_written_here(data, flags, golden):
    """Any change of the training arithmetic shows, and of the order in which masks are drawn."""
    train_here(*into_run(data, "--training.steps=4", "--schedule.name=cosine", "--optimizer.weight_decay=0.01", *flags))
    np.testing.assert_allclose(losses(data.parent / "run"), golden, rtol=1e-5)


def test_killed_and_resumed_is_the_same_bit_for_bit(data, tmp_path):
    flags = [*SMALL, f"--data.folder={data}", "--model.dropout=0.3", "--training.steps=100", "--checkpoint.every_steps=5"]
    train(2, *flags, "--run_folder=whole", cwd=tmp_path)
    broken = tmp_path / "broken"
    rank_0, rank_1 = start(
        2, *flags, f"--run_folder={broken}", cwd=tmp_path, outputs=[tmp_path / "stdout", tmp_path / "stderr"]
    )
    deadline = time.monotonic() + 120
    while len(list((broken / "checkpoints").glob("step-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rank_1.kill()
    rank_0.join(60)
    assert rank_0.exitcode == EXIT_AGAIN
    newest = newest_checkpoint(broken / "checkpoints")
    assert newest is not None
    killed_at = read_json(newest / "manifest.json")["progress"]["step"]
    assert killed_at < 100, "the job was through before it was killed"

    train(2, *flags, f"--run_folder={broken}", "--resume=auto", cwd=tmp_path)
    assert losses(broken) == losses(tmp_path / "whole")
    assert [row["step"] for row in rows(broken)] == [row["step"] for row in rows(tmp_path / "whole")]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(broken)[name], value), name


def test_the_loss_is_the_plain_one(data):
    """Four steps against the same model trained by hand on all tokens at once."""
    flags = ("--training.steps=4", "--model.dropout=0", "--optimizer.name=sgd", "--optimizer.clip=0")
    asked = recipe(data, *flags)
    train_here(*into_run(data, *flags))

    folder = DataFolder(data)
    torch.manual_seed(asked.seed)
    model = LanguageModel(asked.model, folder.vocabulary_size)
    stochastic = torch.optim.SGD(model.parameters(), 0.02, weight_decay=weight_decay_of(asked.optimizer))
    batches, state, expected = training_batches(folder, asked.data, asked.seed), model.initial_state(8), []
    for step, rate in enumerate(losses(data.parent / "run", "train/learning_rate")):
        stochastic.param_groups[0]["lr"] = rate
        batch = batches.batch(step, slice(0, 8))
        hidden, (h, c) = model(batch.inputs, state)
        state = (h.detach(), c.detach())
        loss = functional.cross_entropy(model.projection(hidden).flatten(0, 1), batch.targets.flatten())
        stochastic.zero_grad()
        loss.backward()
        stochastic.step()
        expected.append(loss.item())
    np.testing.assert_allclose(losses(data.parent / "run"), expected, rtol=1e-6)


def test_accumulation_changes_nothing(data):
    flags = (*DROPOUT, "--training.epochs=1")
    train_here(*into_run(data, *flags))
    train_here(*into_run(data, *flags, "--training.accumulation=4", f"--run_folder={data.parent / 'parts'}"))
    np.testing.assert_allclose(losses(data.parent / "parts"), losses(data.parent / "run"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZER_NAMES)
@pytest.mark.parametrize("batching", ["streams", "windows"])
def test_resumed_is_the_same_bit_for_bit_with_every_optimizer(data, optimizer, batching):
    flags = (*DROPOUT, f"--optimizer.name={optimizer}", "--optimizer.momentum=0.9", f"--data.batching={batching}")
    flags = (*flags, "--schedule.name=plateau", "--training.validate_every=4")
    train_here(*into_run(data, *flags, "--training.steps=13"))
    parts = (*flags, f"--run_folder={data.parent / 'parts'}", "--resume=auto")
    for steps in (1, 6, 13):
        train_here(*into_run(data, *parts, f"--training.steps={steps}"))
    assert losses(data.parent / "parts") == losses(data.parent / "run")
    for name, value in weights(data.parent / "run").items():
        assert torch.equal(weights(data.parent / "parts")[name], value), name


def test_plateau_divides_the_rate_when_validation_is_no_better(data):
    # A rate so small that nothing is learnt beyond the first validations' rounding.
    train_here(
        *into_run(
            data,
            "--optimizer.learning_rate=1e-12",
            "--schedule.name=plateau",
            "--training.validate_every=1",
            "--training.steps=4",
            "--optimizer.name=sgd",
        )
    )
    np.testing.assert_allclose(losses(data.parent / "run", "train/learning_rate"), [1e-12, 1e-12, 2.5e-13, 6.25e-14])


def test_last_checkpoints_and_the_best_are_kept(data):
    train_here(
        *into_run(
            data, "--training.steps=12", "--training.validate_every=3", "--checkpoint.every_steps=1", "--checkpoint.keep=2"
        )
    )
    folder = data.parent / "run" / "checkpoints"
    validated = {row["step"]: row["valid/loss"] for row in rows(data.parent / "run") if "valid/loss" in row}
    assert sorted(validated) == [3, 6, 9, 12]
    best = f"step-{min(validated, key=lambda step: validated[step]):09d}"
    assert {path.name for path in folder.iterdir()} == {"newest", "step-000000011", "step-000000012", best}
    assert find_checkpoint(data.parent / "run").name == best


def test_the_run_folder_has_the_files_that_the_readme_names(data, monkeypatch):
    monkeypatch.setattr(report, "plot_losses", plot_losses)
    train_here(*into_run(data, "--training.steps=3", "--sample.final_words=12"))
    run = data.parent / "run"
    assert {path.name for path in run.iterdir()} == {
        "recipe.toml",
        "finished.toml",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "sample.txt",
        "loss.png",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "sample.txt").read_text().replace("\n", " \n ").split(" ")) >= 12
    again = config.load(["--config", str(run / "recipe.toml")])
    assert again == recipe(data, "--training.steps=3", "--sample.final_words=12")


def test_without_validation_split_the_newest_checkpoint_is_the_best(tmp_path):
    data = write_data_folder(tmp_path / "data", {"train": chain(451, 30)}, 30)
    train_here(*into_run(data, "--training.steps=3"))
    assert find_checkpoint(tmp_path / "run").name == "step-000000003"
    assert not losses(tmp_path / "run", "valid/loss")


DIVERGING = (
    "--optimizer.name=sgd --optimizer.learning_rate=1e12 --optimizer.weight_decay=1e12 --optimizer.clip=0 "
    "--schedule.name=constant"
).split()
MISTAKES = {
    "unknown key": (["--model.nhid=3"], 64, "nhid"),
    "not a number": (["--data.window=many"], 64, "window"),
    "out of range": (["--model.dropout=1"], 64, "model.dropout is 1"),
    "dropout that is no number": (["--model.dropout_input=much"], 64, "model.dropout_input is much; float is expected"),
    "dropout out of range": (
        ["--model.dropout_hidden=1"],
        64,
        "model.dropout_hidden is 1.0; it must be at least 0 and below 1",
    ),
    "no such choice": (["--optimizer.name=no-such-optimizer"], 64, "no-such-optimizer"),
    "a recipe without a name": (["--config"], 64, "--config: expected one argument"),
    "no such recipe": (["--config=nowhere.toml"], 66, "the recipe nowhere.toml does not exist"),
    "no such data": (["--data.folder=nowhere"], 66, "lmdist-prepare"),
    "text too short": (["--data.window=70"], 65, "451 tokens to train on; 8 sequences of 70 need 560"),
    "batch not divisible": (["--training.accumulation=3"], 64, "data.global_batch 8 cannot be divided evenly"),
    "more than any memory": (
        ["--model.embedding_size=100000", "--model.hidden_size=1000000"],
        64,
        "this machine's memory is full",
    ),
    "half precision on a CPU": (["--training.precision=fp16"], 64, "needs a GPU"),
    "diverging": ([*DIVERGING, "--training.steps=9", "--training.log_every=9"], 64, "diverged"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_with_their_exit_code(data, tmp_path, mistake):
    flags, code, message = MISTAKES[mistake]
    done = train(1, *SMALL, f"--data.folder={data}", "--run_folder=run", *flags, cwd=tmp_path, code=code)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("lmdist.train: error: ")
    assert message in line
    assert "Traceback" not in done.stderr


def test_an_update_that_diverges_is_not_saved(tmp_path):
    """The loss is that of before the update, and nothing is validated."""
    folder = write_data_folder(tmp_path / "data", {"train": chain(451, 30)}, 30)
    flags = [*DIVERGING, "--training.steps=1"]
    done = train(1, *SMALL, *flags, f"--data.folder={folder}", "--run_folder=run", cwd=tmp_path, code=64)
    assert "the norm of the parameters is inf at step 1: the training has diverged" in done.stderr
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_missing_cuda_is_an_error(data, tmp_path):
    done = train(1, *SMALL, f"--data.folder={data}", "--training.device=cuda", cwd=tmp_path, code=64)
    assert "torch sees no CUDA device" in done.stderr


def test_ranks_that_do_not_divide_the_batch_are_rejected_once(data, tmp_path):
    done = train(3, *SMALL, f"--data.folder={data}", cwd=tmp_path, code=EXIT_USAGE)
    assert done.stderr.count("cannot be divided evenly over 3 ranks") == 1
    assert "a number of ranks out of [1, 2, 4, 8]" in done.stderr


def test_a_run_is_not_trained_over_and_not_resumed_as_something_else(data, tmp_path):
    flags = [*SMALL, f"--data.folder={data}", "--run_folder=run", "--training.steps=2"]
    train(1, *flags, cwd=tmp_path)
    assert "--resume auto continues it" in train(1, *flags, cwd=tmp_path, code=64).stderr
    other = train(1, *flags, "--resume=auto", "--model.hidden_size=25", cwd=tmp_path, code=64)
    assert "model.hidden_size: the run has 24, the recipe 25; --run_folder run-2 starts another" in other.stderr
    words = write_data_folder(tmp_path / "words", {"train": chain(451, 31)}, 31)
    for resume in ("auto", "never"):  # neither advises what fails
        done = train(1, *flags, f"--data.folder={words}", f"--resume={resume}", cwd=tmp_path, code=64)
        line = done.stderr.splitlines()[-1]
        assert f"data.folder: {words} has another vocab.txt and train.bin than {data}, which the run began with" in line
        assert "resume" not in line
        assert "sha256" not in line


def test_a_run_with_more_steps_than_are_asked_for_is_finished(data, tmp_path):
    """It neither trains on nor fails; with more steps it goes on, to the same end."""
    run = data.parent / "run"
    flags = [*SMALL, *into_run(data, "--resume=auto", "--schedule.name=constant", "--training.validate_every=2")]
    train(1, *flags, "--training.steps=4", cwd=tmp_path)
    (run / "finished.toml").unlink()
    done = train(1, *flags, "--training.steps=2", cwd=tmp_path)
    assert "run has 4 steps already, more than the 2 asked for: nothing to train" in done.stderr
    assert len(losses(run)) == 4
    finished = config.load(["--config", str(run / "finished.toml")])
    assert finished == config.load([*flags, "--training.steps=2"])
    train(1, *flags, "--training.steps=6", cwd=tmp_path)
    train(1, *flags, "--training.steps=6", f"--run_folder={tmp_path / 'whole'}", cwd=tmp_path)
    assert losses(run) == losses(tmp_path / "whole")


def test_help_is_quick_and_explains_the_settings(tmp_path):
    done = train(1, "--help", cwd=tmp_path)
    assert "Size of an LSTM layer's state" in " ".join(done.stdout.split())
    seen = subprocess.run([sys.executable, "-X", "importtime", "-m", "lmdist.train", "--help"], capture_output=True, text=True)
    assert " torch\n" not in seen.stderr


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_is_read_and_every_line_has_a_reason(path):
    asked = config.load(["--config", str(path)])
    for line in path.read_text().splitlines():
        assert "=" not in line.split("#")[0] or "# " in line, f"a reason is missing: {line}"
    for section, values in tomllib.loads(path.read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert getattr(getattr(asked, section), key) == value


def test_the_last_validation_gives_a_hint_for_the_next_run(data, capsys):
    flags = ["--resume=auto", "--model.dropout=0", "--schedule.name=constant"]
    train_here(*into_run(data, *flags, "--training.epochs=2"))
    fallen, risen = r"fell by \d+% to the last validation.*--training\.epochs 4\)", r"risen by \d+%.*--model\.dropout 0\.15\)"
    assert re.search(fallen, capsys.readouterr().err)
    train_here(*into_run(data, *flags, "--training.epochs=60"))
    assert re.search(risen, capsys.readouterr().err)
    for steps, dropout, hint in (("4", "0", ""), ("0", "0.7", "since its best, which is kept: try a shorter run\n")):
        epochs = [] if steps != "0" else ["--training.epochs=61"]
        train_here(*into_run(data, *flags, f"--model.dropout={dropout}", f"--training.steps={steps}", *epochs))
        shown = capsys.readouterr().err
        assert hint in shown if hint else "hint     valid" not in shown


def test_a_loss_that_has_no_perplexity_any_more_is_a_hint_too():
    run: Any = SimpleNamespace(progress=Progress(0), recipe=Recipe(), batches=SimpleNamespace(steps_per_epoch=2))
    reporting = report.Report(run, MetricsLogger(), ProgressBar(4, "step", silent=True), StopRequest())
    run.progress = Progress(4, validations=(8.0, 9000.0), best_valid_nats=8.0)
    assert "valid perplexity has risen beyond all numbers since its best" in reporting.outlook()[0]


@pytest.mark.parametrize("order", [1, -1])
def test_flags_win_over_a_recipe_wherever_they_stand(order):
    arguments = [[f"--config={LAUNCH / 'tutorial.toml'}"], ["--data.window", "3"]]
    asked = config.load([word for part in arguments[::order] for word in part])
    assert (asked.data.window, asked.data.stride) == (3, 1)


def test_a_terminal_gets_a_bar(data, tmp_path):
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    flags = [*SMALL, f"--data.folder={data}", "--training.steps=5"]
    job = subprocess.Popen(command(1, *flags), cwd=tmp_path, env=environment(), stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the way a terminal ends
        while part := os.read(screen, 4096):
            shown += part
    os.close(screen)
    assert job.wait() == 0
    assert b"100%|" in shown
    assert b"tokens/s" in shown
    assert b"valid step 5" in shown


def test_the_demo_recipe_is_the_default():
    demo = config.load(["--config", str(LAUNCH / "demo.toml")])
    assert config.as_dict(demo) | {"prepare": None} == config.as_dict(Recipe()) | {"prepare": None}
    assert demo.prepare == DEMO_SETTINGS


@pytest.mark.parametrize(
    ("given", "expected"),
    [(PrepareSettings(), DEMO_SETTINGS), (PrepareSettings(min_count=2, seed=3), PrepareSettings(inputs=["demo"], seed=3))],
    ids=["nothing", "something"],
)
def test_training_without_a_text_prepares_the_demo(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    articles = "".join(f"Address {n},The cat said {n} times that the cat is a cat.\n" for n in range(9))
    (tmp_path / "data/demo.csv").write_text(f"title,content\n{articles}")  # taken for the demo corpus, which is longer
    prepare_if_absent(Recipe(prepare=given), [], is_main=True)
    found = read_json(tmp_path / "data/demo/meta.json")["prepare"]
    assert found | {"workers": expected.workers} == config.as_dict(Recipe(prepare=expected))["prepare"]


def test_text_to_train_on_is_taken_in_place_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("the cat and the dog and the cat\n" * 3)
    prepare_if_absent(Recipe(prepare=PrepareSettings(train="own.txt", tokenizer="whitespace")), [], is_main=True)
    assert (tmp_path / "data/demo/vocab.txt").read_text().split() == ["<unk>", "<eos>", "the", "and", "cat", "dog"]


def test_padding_counts_for_nothing(data):
    """An ignored target changes neither the sum nor the gradient."""
    from lmdist.model.loss import summed_nats

    model = LanguageModel(recipe(data).model, 30).eval()
    tokens = torch.randint(30, (2, 5))
    hidden, _ = model(tokens, model.initial_state(2))
    targets = tokens.clone()
    targets[1, 2:] = IGNORED
    first = summed_nats(hidden[:1], model.projection, tokens[:1])
    second = summed_nats(hidden[1:, :2], model.projection, tokens[1:, :2])
    torch.testing.assert_close(summed_nats(hidden, model.projection, targets), first + second)


def test_minutes_between_checkpoints_end_after_any_step(data):
    train_here(*into_run(data, "--training.steps=5", "--training.log_every=3", "--checkpoint.every_minutes=1e-9"))
    saved = {path.name for path in (data.parent / "run" / "checkpoints").iterdir()}
    assert saved == {"newest", "step-000000004", "step-000000005"}


@pytest.mark.slow
def test_without_data_the_demo_corpus_is_prepared_and_trained_on(tmp_path):
    flags = ["--training.steps=2", "--prepare.tokenizer=wordpunct", "--tracking.mlflow=false", "--sample.words=5"]
    done = train(2, *flags, "--data.valid_batch=500", cwd=tmp_path)
    assert "starting, to step 2" in done.stderr
    meta = read_json(tmp_path / "data/demo/meta.json")
    assert meta["splits"]["train"]["tokens"] > 400_000
    assert len(rows(tmp_path / "runs/demo")) == 2


def test_the_tutorial_is_one_recipe(tmp_path):
    """The first 4 articles, cleaned; windows of 20 at every word; 1,000 words to a file. With a smaller LSTM."""
    articles = [f'{n},"Article {n}: the cat-flap, said Mr. {n}, is number {n}! {"It is. " * 30}"' for n in range(6)]
    (tmp_path / "articles1.csv").write_text("id,content\n" + "\n".join(articles) + "\n")
    tutorial = ["--config", str(LAUNCH / "tutorial.toml"), "--prepare.inputs", '["articles1.csv"]', "--model.hidden_size=8"]
    train(1, *tutorial, "--training.steps=3", "--tracking.mlflow=false", cwd=tmp_path)
    meta = read_json(tmp_path / "data/tutorial/meta.json")
    assert meta["splits"].keys() == {"train"}
    assert meta["splits"]["train"]["documents"] == 4
    words = (tmp_path / "data/tutorial/vocab.txt").read_text().split()
    assert {"article", "cat", "flap", "mr", "3"} <= set(words)
    assert not {"4", "Mr", "mr.", ",", "cat-flap"} & set(words)
    assert len((tmp_path / "runs/tutorial/sample.txt").read_text().split()) > 900
    assert (tmp_path / "runs/tutorial/loss.png").exists()
