"""The time budget: how many steps fit into training.minutes, by the speed so far.

A schedule is a function of a step and of the total of steps, so a run by time needs a total too. It is decided after step 16,
when libraries are loaded and the speed is known, and again at each log line, and at the last step, where the end that it leads
to has moved away from the end of the time. A run of fewer steps than 16 is known by step 2 or 4. Between two decisions it
holds, on all ranks and over a stop: Progress.plan in the checkpoint has all of them, and the learning rate of each step follows
from these.

    time    0 min ------------------------------------------------ 30 min
    steps   2   4   16 |.......... steps .......... | valid | steps .. | valid

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
EARLY = (2, 4, 16)
"""The steps of a process after which the total is looked at beside those of log lines; after a resume the last is the first.
The first step of all, which may take as long as hundreds of others, tells nothing. A first total is only taken where it lies
before the next of these steps: the beginning of a schedule is where a wrong one does the most harm."""
MOST_UNSEEN = 0.2
"""A validation that was not measured yet is not thought to take more than this share of all the time, and counts once."""
MISSED = 0.05
"""The share of its time by which a run may end earlier or later without a word about it."""
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
        left, last = 60 * minutes - progress.elapsed_seconds, progress.plan[-1] if progress.plan else None
        if last and last["minutes"] == minutes and last["total_steps"] >= progress.step:
            self.total_steps = last["total_steps"]
        elif progress.step >= EARLY[-1] or left <= 0:  # another budget than before, or a new one: at the speed that there was
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
        step = self.progress.step
        is_last = step == self.total_steps
        if not (logging or is_last or done in EARLY) or (self.is_resumed and done < EARLY[-1]):
            return False
        total_steps = int(self.world.broadcast(str(self.decided(step, done))))
        if total_steps == self.total_steps:
            return False
        self.record(total_steps)
        return True

    def decided(self, step: int, done: int) -> int:
        """Return the total that is right by what this rank has measured, or the one in force where that is near."""
        left, pace = self.seconds_left, self.current_pace(done)
        found = step + pace.steps_within(left, step)
        if self.total_steps == UNDECIDED:
            following = next((early for early in EARLY if early > done), None)
            return UNDECIDED if done < EARLY[0] or (following and found - step > following - done) else found
        if step == self.total_steps and pace.seconds_for(1, step) > left:
            return step
        error = pace.seconds_for(self.total_steps - step, step) - left
        return self.total_steps if abs(error) <= max(TOLERANCE * 60 * self.minutes, DRIFT * left) else found

    def why_missed(self) -> str:
        """Return why a run that is at its last step did not end with its time; "" where it did."""
        progress, asked = self.progress, 60 * self.minutes
        left, done = asked - progress.elapsed_seconds, progress.step - self.first_step
        if abs(left) <= MISSED * asked:
            return ""
        if not done:
            return "it was at its end before"
        more = self.current_pace(done).seconds_for(1, progress.step)
        if 0 < left < more:
            return f"one more step and the validations with it take {more:.3g} s"
        return f"the speed has changed since step {progress.plan[-1]['step']:,}, by which the end was decided"

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
        """Return the pace of the last half of the `done` steps of this process, or of somewhat more.

        Before the last of EARLY a validation that was not measured is left out: a guess by slow steps would end the run.
        """
        mark = 1 << (done.bit_length() - 2) if done > 1 else 0
        pace = self.pace((self.progress.seconds - self.marks[mark]) / (done - mark))
        return pace._replace(validation_seconds=self.validation_seconds or 0.0) if done < EARLY[-1] else pace

    def pace(self, step_seconds: float) -> Pace:
        """Return the pace; a validation that was not measured yet reads its tokens as fast as a step does, which is slower."""
        seconds, every = self.validation_seconds, self.validate_every
        if seconds is None:
            every = UNDECIDED  # the last one only: a guess should not end a run before it has seen one
            seconds = self.valid_tokens * step_seconds * self.progress.step / max(1, self.progress.tokens)
            seconds = min(seconds, MOST_UNSEEN * 60 * self.minutes)
        return Pace(max(step_seconds, 1e-9), seconds, every)

    def record(self, total_steps: int) -> None:
        """Take a total from here on, and record it."""
        self.total_steps = total_steps
        planned: Planned = {"step": self.progress.step, "total_steps": total_steps, "minutes": self.minutes}
        self.progress.plan = (*self.progress.plan, planned)
