"""training.minutes: the run ends when its time does, its schedule with it, and all of it follows from what is recorded."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from corpora import chain, write_data_folder
from lmdist import config
from lmdist.errors import EXIT_AGAIN, UsageError
from lmdist.settings import ScheduleSettings, TrainingSettings
from lmdist.storage.reading import read_json
from lmdist.training import budget
from lmdist.training.budget import UNDECIDED, Pace, TimeBudget
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.retain import newest_checkpoint
from lmdist.training.distributed import World
from lmdist.training.schedule import SCHEDULES, Position, learning_rate
from support.jobs import SMALL, environment, losses, rows, start, train, train_here, wait_for_steps

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_folder(tmp_path / "data", {"train": chain(4500, 30), "valid": chain(103, 30, seed=1)}, 30)


# --- what is decided -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [1, 7, 10, 99])
@pytest.mark.parametrize("validation_seconds", [0.0, 0.3, 5.0])
def test_so_many_steps_fit_and_not_one_more(done: int, validation_seconds: float) -> None:
    pace = Pace(0.5, validation_seconds, 10)

    def plainly(steps: int) -> float:
        validated = [step for step in range(done, done + steps + 1) if step % 10 == 0 or step == done + steps]
        return 0.5 * steps + validation_seconds * len(validated)

    steps = pace.steps_within(60, done)
    assert pace.seconds_for(steps, done) == pytest.approx(plainly(steps))
    assert plainly(steps) <= 60 < plainly(steps + 1)
    assert pace.steps_within(-1, done) == pace.steps_within(0, done) == 1


class Clock:
    """A job whose steps and validations take the time that they are said to take, and none of it really passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(budget.time, "perf_counter", lambda: self.now)

    def run(
        self,
        progress: Progress,
        minutes: float,
        until: int = UNDECIDED,
        *,
        speed: float = 1.0,
        slow: float = 5,
        valid: int = 1000,
    ) -> TimeBudget:
        """Run to the end, or to step `until`.

        A step takes 0.5 s, the first one `slow`, and `speed` times that from step 300 on; a validation, of `valid` tokens, 8.
        """
        found = TimeBudget(minutes, progress, self.now - progress.elapsed_seconds, 100, valid, ONE)
        first = progress.step
        while progress.step < min(until, found.total_steps):
            seconds = (slow if progress.step == first else 0.5) * (speed if progress.step > 300 else 1)
            self.now += seconds
            progress.elapsed_seconds += seconds
            progress.step += 1
            progress.tokens += 100
            progress.seconds += seconds
            found.after_step(logging=progress.step % 20 == 0)
            if progress.step % 100 == 0 or progress.step == found.total_steps:
                self.now += 8
                progress.elapsed_seconds += 8
                progress.validations = (*progress.validations, 1.0)
        return found


@pytest.mark.parametrize("speed", [1, 0.5, 3])
@pytest.mark.parametrize("minutes", [2, 10, 60])
def test_it_ends_with_its_time_whatever_the_speed_becomes(monkeypatch: pytest.MonkeyPatch, minutes: int, speed: float) -> None:
    progress = Progress()
    found = Clock(monkeypatch).run(progress, minutes, speed=speed)
    assert progress.elapsed_seconds == pytest.approx(60 * minutes, rel=0.01)
    assert found.total_steps == progress.step == progress.plan[-1]["total_steps"]
    assert progress.plan[0]["step"] == 16
    assert len(progress.plan) <= (4 if speed == 1 else 13), "a total that fits stays"


@pytest.mark.parametrize("slow", [0.5, 20, 60])
@pytest.mark.parametrize("valid", [1000, 10_000, 1_000_000])
@pytest.mark.parametrize("minutes", [2, 10])
def test_neither_a_slow_first_step_nor_a_guess_ends_a_run(
    monkeypatch: pytest.MonkeyPatch, minutes: int, valid: int, slow: float
) -> None:
    progress = Progress()
    Clock(monkeypatch).run(progress, minutes, slow=slow, valid=valid)
    assert 0.8 <= progress.elapsed_seconds / (60 * minutes) <= 1.1
    assert progress.plan[0]["step"] == 16, "the first steps are at the beginning of the schedule"
    assert progress.plan[0]["total_steps"] > 40


@pytest.mark.parametrize(("minutes", "slow", "steps", "known"), [(0.06, 1.5, 5, 4), (0.1, 1.5, 10, 4), (0.15, 8, 3, 2)])
def test_a_run_of_a_few_steps_is_known_before_its_end(
    monkeypatch: pytest.MonkeyPatch, minutes: float, slow: float, steps: int, known: int
) -> None:
    progress = Progress()
    found = Clock(monkeypatch).run(progress, minutes, slow=slow)
    assert progress.plan == ({"step": known, "total_steps": steps, "minutes": minutes},)
    assert progress.step == steps
    assert re.fullmatch(r"|one more step and .* take 0.5 s|the speed has changed since step \d, .*", found.why_missed())


def test_steps_beyond_an_old_plan_are_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"step": 16, "total_steps": 300, "minutes": 3}
    progress = Progress(step=320, tokens=32_000, seconds=160, elapsed_seconds=165, plan=(plan,))  # pyright: ignore
    found = TimeBudget(3, progress, Clock(monkeypatch).now - 165, 1000, 0, ONE)
    assert found.total_steps == 350


@pytest.mark.parametrize("killed", [40, 333])
def test_after_a_stop_the_rest_of_the_time_is_left(monkeypatch: pytest.MonkeyPatch, killed: int) -> None:
    progress = Progress()
    Clock(monkeypatch).run(progress, 5, until=killed)
    before = progress.plan
    Clock(monkeypatch).run(progress, 5, until=killed + 15)
    assert progress.plan == before, "the first steps of a process are slow, and change nothing"
    Clock(monkeypatch).run(progress, 5)
    assert progress.elapsed_seconds == pytest.approx(300, rel=0.03)
    over = Clock(monkeypatch).run(progress, 5)
    assert over.total_steps == progress.step, "a run at its end stays there"
    longer = Clock(monkeypatch).run(progress, 10)
    assert progress.elapsed_seconds == pytest.approx(600, rel=0.03)
    assert [planned["minutes"] for planned in longer.progress.plan[-1:]] == [10]
    less = Clock(monkeypatch).run(progress, 1)
    assert less.total_steps == progress.step, "less time than was used leaves nothing"
    assert less.why_missed() == "it was at its end before"
    assert longer.why_missed() == ""


def test_the_time_of_a_run_by_epochs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(step=100, tokens=10_000, seconds=50, elapsed_seconds=60)
    found = TimeBudget(3, progress, Clock(monkeypatch).now - 60, 1000, 0, ONE)
    assert found.total_steps == 100 + 240
    assert progress.plan == ({"step": 100, "total_steps": 340, "minutes": 3},)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "inverse-sqrt"])
def test_before_the_first_decision_every_schedule_is_at_its_beginning(name: Any) -> None:
    first, fourth = (learning_rate(1.0, ScheduleSettings(name), Position(step, UNDECIDED)) for step in (0, 3))
    assert fourth == pytest.approx(first)


# --- real jobs -----------------------------------------------------------------------------------------------------


def check_rates(run: Path, peak: float, schedule: ScheduleSettings) -> None:
    """Check that the rate of each step follows from the newest checkpoint, and that the last step is the schedule's last."""
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    progress = read_json(newest / "manifest.json")["progress"]
    plan = [{"step": 0, "total_steps": UNDECIDED}, *progress["plan"]]
    logged = [row for row in rows(run) if "train/learning_rate" in row]
    assert [row["step"] for row in logged] == list(range(1, progress["step"] + 1))
    for row in logged:
        total = next(planned["total_steps"] for planned in reversed(plan) if planned["step"] < row["step"])
        assert row["train/learning_rate"] == learning_rate(peak, schedule, Position(row["step"] - 1, total)), row["step"]
    assert all(row.get("train/total_steps", 0) < UNDECIDED for row in logged)
    assert logged[-1]["train/total_steps"] == progress["step"] == plan[-1]["total_steps"]


def check_time(run: Path, seconds: int, printed: str) -> None:
    """Check that a run has taken its time, give or take 5 %, or says why not."""
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    taken = read_json(newest / "manifest.json")["progress"]["elapsed_seconds"]
    said = re.search(rf"  time     \d+s of {seconds}s(: .+)?\n", printed)
    assert said
    assert bool(said[1]) == (abs(taken - seconds) > 0.05 * seconds), (taken, said[0])


def is_decided(run: Path, stderr: Path) -> bool:
    """Return whether a checkpoint has how many steps there are."""
    said = re.search(r"by the speed up to step (\d+)", stderr.read_text()) if stderr.exists() else None
    return said is not None and any(int(path.name[5:]) >= int(said[1]) for path in run.glob("checkpoints/step-[0-9]*"))


def test_killed_and_resumed_on_two_ranks_it_ends_in_time(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*SMALL, f"--data.folder={data}", f"--run_folder={run}", "--training.minutes=0.1", "--checkpoint.every_steps=1"]
    rank_0, rank_1 = start(2, *flags, cwd=tmp_path, outputs=[tmp_path / "stdout", tmp_path / "stderr"])
    deadline = time.monotonic() + 120
    while not is_decided(run, tmp_path / "stderr"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    rank_1.kill()
    rank_0.join(60)
    assert rank_0.exitcode == EXIT_AGAIN, "the job was through before it was killed"
    assert re.search(r"starting, to a step that the speed decides, in the \ds left of 6s", (tmp_path / "stderr").read_text())
    killed = newest_checkpoint(run / "checkpoints")
    assert killed is not None
    before = read_json(killed / "manifest.json")["progress"]

    done = train(2, *flags, "--resume=auto", cwd=tmp_path)
    total = before["plan"][-1]["total_steps"]
    assert re.search(rf"resuming after step {before['step']:,}, to step {total:,}, in the \ds left of 6s", done.stderr)
    check_time(run, 6, done.stderr)
    check_rates(run, 0.02, ScheduleSettings())
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    after = read_json(newest / "manifest.json")["progress"]
    assert after["plan"][: len(before["plan"])] == before["plan"]
    assert after["elapsed_seconds"] > before["elapsed_seconds"] > 0
    assert (run / "recipe.toml").read_text().splitlines()[-1].startswith("# 0.1 minutes: decided after step ")
    assert config.load(["--config", str(run / "recipe.toml")]).training.minutes == 0.1
    trained = losses(run)
    train_here(*flags[len(SMALL) :], "--resume=auto")
    assert losses(run) == trained, "it was over"


@pytest.mark.slow
def test_a_job_of_the_launcher_that_is_killed_ends_in_its_time(data: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--data.folder=data", "--run_folder=run", "--training.minutes=0.1", "--checkpoint.every_steps=5"]
    command = [sys.executable, "-m", "lmdist.job.launcher", "--nproc-per-node=1", "--restarts=1", *flags]
    with (tmp_path / "stderr").open("w") as stderr:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=stderr)
    wait_for_steps(tmp_path / "run", 60)
    ranks = psutil.Process(job.pid).children(recursive=True)
    next(process for process in ranks if process.environ().get("RANK") == "0").kill()
    assert job.wait(120) == 0
    printed = (tmp_path / "stderr").read_text()
    assert "rank 0 was killed by SIGKILL" in printed
    check_time(tmp_path / "run", 6, printed)
    check_rates(tmp_path / "run", 0.02, ScheduleSettings())


def test_without_a_valid_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data_folder(tmp_path / "data", {"train": chain(451, 30)}, 30)
    run = tmp_path / "run"
    flags = "--training.minutes=0.01", "--schedule.name=cosine", "--schedule.warmup_steps=1000000"
    train_here(f"--data.folder={data}", f"--run_folder={run}", *flags)
    check_rates(run, 0.02, ScheduleSettings("cosine", warmup_steps=1_000_000))
    shown = capsys.readouterr().err
    assert "last to step" in shown
    assert "hint   all of it is warmup" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5}, "training.minutes is 30 and training.steps is 5, and both .* give --training.steps 0"),
        ({"epochs": 2.0}, "training.minutes is 30 and training.epochs is 2, and both .* give --training.epochs 0"),
        ({"minutes": 0.001}, "training.minutes is 0.001; it must be 0, or at least 0.01"),
        ({"minutes": -1}, "training.minutes is -1; it must be from 0"),
    ],
)
def test_mistakes(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingSettings(**{"minutes": 30, **settings})


def test_a_recipe_s_own_length_can_be_taken_back() -> None:
    asked = config.load(["--config", "ptb", "--training.minutes", "30", "--training.epochs", "0", "--training.steps", "0"])
    assert (asked.training.minutes, asked.training.epochs) == (30, 0)
    with pytest.raises(UsageError, match="both say how long the run is"):
        config.load(["--config", "ptb", "--training.minutes", "30"])
