"""The time budget: how many steps fit into training.minutes, by the speed so far.

A schedule is a function of a step and of the total of steps, so a run by time needs a total too. It is decided after the first
step, again after 4 and 16, when libraries are loaded and the speed is known, and at each log line where the end that it leads
to has moved away from the end of the time. Between two decisions it holds, on all ranks and over a stop: Progress.plan in the
checkpoint has all of them, and the learning rate of each step follows from these.

    time    0 min ------------------------------------------------ 30 min
    steps   1   4   16 |.......... steps .......... | valid | steps .. | valid

The time is that between the first step and the last one's validation, with all that is between steps, in all processes of the
run; neither the start of a process is in it, nor what a killed one did after its last checkpoint. Rank 0 measures. This module
does not know what a step does.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from typing import NamedTuple

import torch

from lmdist.training.checkpoints.format import Planned, Progress
from lmdist.training.distributed import World

UNDECIDED = 10**12
"""The total of steps before the first decision: every schedule is at its beginning."""
EARLY = (1, 4, 16)
"""The steps of a process after which the total is looked at beside those of log lines; after a resume the last is the first."""
TOLERANCE, DRIFT = 0.01, 0.05
"""A total whose end is not further from the end of the time stays: by this share of all the time, or of what is left of it. The
speed of a shared machine goes up and down, and there is time to make up for it."""


class Pace(NamedTuple):
    """What a step and a validation take."""

    step_seconds: float
    validation_seconds: float
    """0 where there is no valid split."""
    validate_every: int

    def seconds_for(self, steps: int, done: int) -> float:
        """Return the time that `steps` more steps take after those `done`, with all validations, also one that is due now."""
        validations = (done + steps - 1) // self.validate_every - (done - 1) // self.validate_every + 1
        return steps * self.step_seconds + validations * self.validation_seconds

    def steps_within(self, seconds: float, done: int) -> int:
        """Return how many more steps fit into a time, at least 1."""
        most = min(UNDECIDED, int(seconds / self.step_seconds)) + 1
        return max(1, bisect_right(range(1, most), seconds, key=lambda steps: self.seconds_for(steps, done)))


class TimeBudget:
    """Decides how many steps a run has, so that it ends when its time does."""

    def __init__(
        self, minutes: float, progress: Progress, began: float, validate_every: int, valid_tokens: int, world: World
    ) -> None:
        """Begin or go on where `progress` stands, the same on all ranks, for what a checkpoint holds decides.

        `began` is when the run would have begun without a stop, by time.perf_counter.
        """
        self.minutes = minutes
        self.progress = progress
        self.validate_every = validate_every
        self.valid_tokens = valid_tokens
        self.world = world
        self.began = began
        self.first_step = progress.step
        self.marks = {0: progress.seconds}
        """The seconds in steps after 1, 2, 4, 8, ... steps of this process."""
        self.seen = time.perf_counter(), progress.seconds, len(progress.validations)
        """The time, the seconds in steps and the number of validations after the last step."""
        self.validation_seconds: float | None = None
        """Of the last validation of this process, with its sample and its picture."""
        self.total_steps = UNDECIDED
        if progress.plan and progress.plan[-1]["minutes"] == minutes:
            self.total_steps = progress.plan[-1]["total_steps"]
        elif progress.step:  # by a budget that is another than before, or new: at the speed that there was
            left = 60 * minutes - progress.elapsed_seconds
            pace = self.pace(progress.seconds / progress.step)
            self.record(progress.step + pace.steps_within(left, progress.step) if left > 0 else progress.step)
        self.is_resumed = self.total_steps != UNDECIDED

    @property
    def seconds_left(self) -> float:
        """Return the time that is left."""
        return 60 * self.minutes - (time.perf_counter() - self.began)

    def after_step(self, *, logging: bool) -> bool:
        """Measure a step, and decide how many there are where that is due; return whether it has changed.

        A collective call. `logging`: a log line is written, and rank 0 has waited for its GPU.
        """
        done = self.progress.step - self.first_step
        self.measure(done)
        # The first steps of a process are slow: where a total is in force they tell nothing against it.
        if not (logging or done in EARLY) or (self.is_resumed and done < EARLY[-1]):
            return False
        step, left, pace = self.progress.step, self.seconds_left, self.current_pace(done)
        error = pace.seconds_for(self.total_steps - step, step) - left
        stays = self.total_steps != UNDECIDED and abs(error) <= max(TOLERANCE * 60 * self.minutes, DRIFT * left)
        total_steps = int(self.world.broadcast(str(self.total_steps if stays else step + pace.steps_within(left, step))))
        if total_steps == self.total_steps:
            return False
        self.record(total_steps)
        return True

    def measure(self, done: int) -> None:
        """Note the time after a step, the one number `done` of this process."""
        progress, now = self.progress, time.perf_counter()
        is_mark = done & (done - 1) == 0
        if is_mark and self.world.device.type == "cuda":
            torch.cuda.synchronize()  # the steps are only queued
            progress.seconds += time.perf_counter() - now
            now = time.perf_counter()
        before, seconds, validations = self.seen
        if len(progress.validations) > validations:
            self.validation_seconds = (now - before) - (progress.seconds - seconds)
        self.seen = now, progress.seconds, len(progress.validations)
        if is_mark:
            self.marks[done] = progress.seconds

    def current_pace(self, done: int) -> Pace:
        """Return the pace of the last half of the `done` steps of this process, or of somewhat more."""
        mark = 1 << (done.bit_length() - 2) if done > 1 else 0
        return self.pace((self.progress.seconds - self.marks[mark]) / (done - mark))

    def pace(self, step_seconds: float) -> Pace:
        """Return the pace; a validation that was not measured yet reads its tokens as fast as a step does, which is slower."""
        seconds = self.validation_seconds
        if seconds is None:
            seconds = self.valid_tokens * self.progress.seconds / max(1, self.progress.tokens)
        return Pace(max(step_seconds, 1e-9), seconds, self.validate_every)

    def record(self, total_steps: int) -> None:
        """Take a total from here on, and record it."""
        self.total_steps = total_steps
        planned: Planned = {"step": self.progress.step, "total_steps": total_steps, "minutes": self.minutes}
        self.progress.plan = (*self.progress.plan, planned)
