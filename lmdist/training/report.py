"""What a run reports: console lines, metrics, samples and pictures. Only rank 0 writes.

This module does not know how a step is computed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lmdist import config
from lmdist.console import ProgressBar, duration, next_line, shown, unused_path
from lmdist.counted import counted
from lmdist.errors import DataError
from lmdist.perplexity import COMPARED, per_word_and_byte, perplexity
from lmdist.settings import Recipe
from lmdist.signals import StopRequest
from lmdist.storage.atomic import write_atomic
from lmdist.tracking.logger import MetricsLogger, RunLogger, logger_of_rank
from lmdist.tracking.plot import plot_losses
from lmdist.tracking.run_folder import FINISHED, METRICS, PICTURE, RECIPE, SAMPLE, SAMPLES
from lmdist.training.budget import UNDECIDED, TimeBudget
from lmdist.training.run import Run
from lmdist.training.sample import sample
from lmdist.training.starting_point import lines_of

SECONDS_BETWEEN_PICTURES = 60.0
SMALLEST_CHANGE = 0.01
"""The smallest change of the valid perplexity of which a hint is given."""
MOST_DROPOUT = 0.7
"""The most that a hint recommends."""
LARGE_VOCABULARY = 100_000
SLOW_STEPS = 5
"""The first steps of a process, in which libraries are loaded and kernels chosen."""
TIMED_STEPS = 15
"""The steps after them, from which the time of the run is estimated."""


@contextmanager
def report_on(run: Run, stop: StopRequest) -> Iterator[Report]:
    """Open the logger and the progress bar of a run, and print what the job is about to do; a `stop` cuts samples short."""
    done, silent = run.progress.step, not run.world.is_main
    total = 0 if run.total_steps == UNDECIDED else run.total_steps
    with open_logger(run) as logger, ProgressBar(total, "step", done=done, silent=silent) as console:
        for line in announcement(run):
            console.log(line)
        yield Report(run, logger, console, stop)


def open_logger(run: Run) -> MetricsLogger:
    """Return rank 0's logger, after writing the resolved recipe; on other ranks one that writes nothing."""
    if not run.world.is_main:
        return logger_of_rank(run.path, run.world.broadcast(""))
    run.path.mkdir(parents=True, exist_ok=True)
    write_recipe(run)
    logger = RunLogger(
        run.path,
        run.recipe.tracking,
        config.named_settings(run.recipe),
        run.folder.path.name,
        run.folder.meta,
        run.progress.step,
        resume=run.recipe.resume == "auto",
        description=f"{model_line(run)}. {data_line(run)}.",
        started_from=run.progress.started_from,
    )
    run.world.broadcast(logger.run_key)
    return logger


def write_recipe(run: Run) -> None:
    """Write the resolved recipe; with training.minutes, which steps it became is a comment at its end."""
    plan = [
        f"# {planned['minutes']:g} minutes: decided after step {planned['step']:,}, to step {planned['total_steps']:,}\n"
        for planned in (run.progress.plan if run.budget else ())
    ]
    write_atomic(run.path / RECIPE, config.as_toml(run.recipe) + "".join(plan))


def model_line(run: Run) -> str:
    """Return the sizes of the model."""
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    layers = "-".join(str(size) for size in [run.recipe.model.embedding_size, *run.model.layer_sizes])
    head = ", adaptive head" if run.recipe.model.head == "adaptive" else " tied" if run.recipe.model.tied else ""
    return f"LSTM {layers}{head}, {num_parameters:,} parameters"


def data_line(run: Run) -> str:
    """Return the name and the sizes of the data."""
    folder = run.folder
    tokens = folder.meta["splits"]["train"]["tokens"]
    return f"{folder.path}: {tokens:,} tokens to train on, vocabulary {folder.vocabulary_size:,}"


def announcement(run: Run) -> list[str]:
    """Return the lines that say what the job is about to do."""
    done, total_steps = run.progress.step, run.total_steps
    if done > total_steps:
        return [f"{run.path} has {counted(done, 'step')} already, more than the {total_steps:,} asked for: nothing to train"]
    recipe, world, folder, precision = run.recipe, run.world, run.folder, run.precision
    start = f"resuming after step {done:,}" if done else "starting"
    end = f"to step {total_steps:,}" if total_steps != UNDECIDED else "to a step that the speed decides"
    if run.budget:
        end += f", in the {duration(max(0, run.budget.seconds_left))} left of {duration(60 * run.budget.minutes)}"
    lines = [
        f"{run.path}: {start}, {end} ({run.batches.steps_per_epoch:,} per epoch)",
        f"  data   {data_line(run)}",
        f"  model  {model_line(run)}",
        f"  batch  {recipe.data.global_batch} {recipe.data.batching} x {recipe.data.window} tokens "
        f"on {counted(world.size, 'rank')}, {world.device.type}",
        f"  speed  {precision.name}{f' ({precision.reason})' if precision.reason else ''}",
    ]
    lines += lines_of(run.progress.started_from)
    if recipe.init.freeze:
        until = f"until step {recipe.init.freeze_steps:,}" if recipe.init.freeze_steps else "to the end"
        lines.append(f"  init   {', '.join(recipe.init.freeze)} not trained {until}")
    if recipe.averaging.name != "none":
        lines.append(f"  average of the parameters by {recipe.averaging.name}, which is validated, sampled and exported")
    if folder.vocabulary_size > LARGE_VOCABULARY and recipe.model.head == "full":
        lines.append("  hint   --model.head adaptive --model.tied false trains several times as fast at this vocabulary size")
    return [*lines, *run.hints]


class Report:
    """Reports on a run in the course of training."""

    def __init__(self, run: Run, logger: MetricsLogger, console: ProgressBar, stop: StopRequest) -> None:
        self.run = run
        self.logger = logger
        self.console = console
        self.stop = stop
        self.tokens_before = run.progress.tokens
        self.seconds_before = run.progress.seconds
        self.first_step = run.progress.step
        self.timed_from = 0.0  # seconds of the steps before those that are timed

    def show_progress(self, start: float) -> None:
        """Move the progress bar; after the first steps print how long the run takes.

        `start` is when the step that has just been done began, by time.perf_counter.
        """
        progress = self.run.progress
        self.console.update(progress.step)
        if self.run.budget:
            return
        steps, left = progress.step - self.first_step, self.run.total_steps - progress.step
        if steps not in (SLOW_STEPS, SLOW_STEPS + TIMED_STEPS) or left == 0:
            return
        if self.run.world.device.type == "cuda":
            torch.cuda.synchronize()  # the steps are only queued
        seconds = progress.seconds + time.perf_counter() - start  # in steps: validations and checkpoints come on top
        if steps == SLOW_STEPS:
            self.timed_from = seconds
            return
        each = (seconds - self.timed_from) / TIMED_STEPS
        at_most = "at most " if self.run.recipe.training.patience else ""
        self.console.log(
            f"  time   about {duration(left * each)} for {at_most}{counted(left, 'more step')} of {each:.3g} s; "
            "validations come on top"
        )

    def plan(self) -> None:
        """Report how many steps were decided to fit into training.minutes."""
        run, progress = self.run, self.run.progress
        assert run.budget
        if run.world.is_main:
            with suppress(OSError):  # on a full disk the checkpoint has it
                write_recipe(run)
        self.console.set_total(run.total_steps)
        last, epochs = duration(60 * run.budget.minutes), run.total_steps / run.batches.steps_per_epoch
        self.console.log(
            f"  time   {last} last to step {run.total_steps:,}, {epochs:.3g} epochs, by the speed up to step {progress.step:,}"
        )
        if run.total_steps <= run.recipe.schedule.warmup_steps:
            warmup = f"--schedule.warmup_steps {max(1, run.total_steps // 10)}"
            self.console.log(f"  hint   all of it is warmup, and the learning rate never reaches its height: give {warmup}")

    def training(self, nats: float, gradient_norm: float, learning_rate: float) -> None:
        """Report the training since the last call; `nats` is its loss per token."""
        progress, total_steps, budget = self.run.progress, self.run.total_steps, self.run.budget
        decided = total_steps != UNDECIDED
        speed = (progress.tokens - self.tokens_before) / (progress.seconds - self.seconds_before)
        self.tokens_before, self.seconds_before = progress.tokens, progress.seconds
        seconds_left = (total_steps - progress.step) * progress.seconds / progress.step
        if budget and not decided:
            seconds_left = budget.seconds_left
        figures = f"loss {nats:.4f}  ppl {perplexity(nats):,.1f}  tokens/s {speed:,.0f}  lr {learning_rate:.3g}"
        of_all = f"/{total_steps}" if decided else ""
        self.console.show(figures, f"step {progress.step}{of_all}  {figures}  eta {duration(max(0, seconds_left))}")
        self.logger.log_metrics(
            progress.step,
            {
                "train/loss": nats,
                "train/perplexity": perplexity(nats),
                "train/gradient_norm": gradient_norm,  # in fp16 the step of a norm that is not finite is skipped
                "train/learning_rate": learning_rate,
                "train/tokens": progress.tokens,
                "train/tokens_per_second": speed,
                **({"train/total_steps": total_steps} if budget and decided else {}),
            },
        )

    def validation(self) -> None:
        """Report a validation, with a sample and the picture of the losses so far."""
        progress = self.run.progress
        nats, best = progress.valid_nats, progress.best_valid_nats
        assert nats is not None
        assert best is not None
        assert self.run.validation is not None
        compared = per_word_and_byte(nats * len(self.run.validation), self.run.folder.text_size("valid"))
        more = "".join(f"  {COMPARED[name]} {shown(value)}" for name, value in compared.items())
        self.console.log(
            f"valid step {progress.step}  loss {nats:.4f}  ppl {perplexity(nats):,.2f}  best {perplexity(best):,.2f}{more}"
        )
        if progress.averaged_from == progress.step:
            self.console.log(f"averaging the parameters from step {progress.step} on, because validation has stalled")
        self.logger.log_metrics(
            progress.step,
            {
                "valid/loss": nats,
                "valid/perplexity": perplexity(nats),
                "valid/best_perplexity": perplexity(best),
                **{f"valid/{name}": value for name, value in compared.items()},
            },
        )
        self.write_picture_and_sample(f"{SAMPLES}/step-{progress.step:09d}.txt", self.run.recipe.sample.words)

    def finish(self) -> bool:
        """Write the last sample and picture, and print where the results are; return whether a stop has cut it short."""
        if not self.logger.writes:
            return False
        run, path, num_tokens = self.run, self.run.path, self.run.recipe.sample.final_words
        self.write_picture_and_sample(SAMPLE, num_tokens)
        if num_tokens and self.stop.requested:
            return True
        training = run.recipe.training
        is_early = run.progress.step < run.total_steps
        early = f"ended before step {run.total_steps:,}: {counted(training.patience, 'validation')} without a better one"
        lines = [
            *([early] if is_early else []),
            f"done: {counted(run.progress.step, 'step')}, {counted(run.progress.tokens, 'token')} "
            f"in {duration(run.progress.seconds)}",
            *([f"  time     {time_taken(run.budget, is_early=is_early)}"] if run.budget else []),
            f"  run      {path}",
            *([f"  sample   {path / SAMPLE}"] if num_tokens else []),
            f"  picture  {path / PICTURE}",
            *self.outlook(),
            self.next_line(),
        ]
        for line in lines:
            self.console.log(line)
        return False

    def outlook(self) -> list[str]:
        """Return a hint for the next run, if the last validation tells one: a longer run, or a better regularized one."""
        progress, training = self.run.progress, self.run.recipe.training
        if len(progress.validations) < 2 or progress.step == self.first_step:  # nothing was trained: an old validation's
            return []
        # Over an epoch: two validations that are closer to each other differ by chance.
        per_epoch = self.run.batches.steps_per_epoch // (training.validate_every or self.run.batches.steps_per_epoch)
        compared = min(max(per_epoch, 1), len(progress.validations) - 1)
        before, last = progress.validations[-1 - compared], progress.validations[-1]
        assert progress.best_valid_nats is not None
        fall, rise = 1 - perplexity(last - before), perplexity(last - progress.best_valid_nats) - 1
        name = next((name for name in ("minutes", "steps") if getattr(training, name)), "epochs")
        longer = f"training.{name} {2 * getattr(training, name):g}"
        if fall >= SMALLEST_CHANGE:
            where = "to the last validation" if compared == 1 else f"over the last {compared} validations"
            return [f"  hint     valid perplexity fell by {fall:.0%} {where}: try a longer run (--{longer})"]
        if rise >= SMALLEST_CHANGE:
            dropout = self.run.recipe.model.dropout
            more = f"more dropout (--model.dropout {min(MOST_DROPOUT, dropout + 0.15):.2g}), or "
            how_much = f"by {rise:.0%}" if math.isfinite(rise) else "beyond all numbers"
            return [
                f"  hint     valid perplexity has risen {how_much} since its best, which is kept: "
                f"try {more if dropout < MOST_DROPOUT else ''}a shorter run"
            ]
        return []

    def next_line(self) -> str:
        """Return the commands that measure the model on text that it was not trained on, if there is any, and export it."""
        path, folder = self.run.path, self.run.folder
        split = next((name for name in ("test", "valid") if folder.has(name)), None)
        evaluate = ["lmdist-evaluate", path, *([] if split == "test" else ["--split", split])]
        export = ["lmdist-export", path, "-o", unused_path(Path("bundles") / path.resolve().name)]
        return next_line(*([evaluate] if split else []), export)

    def write_picture_and_sample(self, name: str, num_tokens: int) -> None:
        """Draw the losses so far, and write a sample of `num_tokens` tokens to the file `name` of the run folder."""
        if not self.logger.writes:
            return
        picture = self.run.path / PICTURE
        try:
            # All ranks wait for the picture, and a long run has many points: at most one a minute, and one at the end.
            if name == SAMPLE or age(picture) > SECONDS_BETWEEN_PICTURES:
                plot_losses(self.run.path / METRICS, picture)
            if num_tokens:
                self.logger.log_text(name, self.sample(num_tokens))
        except (OSError, DataError) as error:  # a full disk, or a link, costs these, not the run
            self.console.log(f"warning: the picture and the sample could not be written: {error}")

    def sample(self, num_tokens: int) -> str:
        """Return a text that the model generates; its seed is the run's plus the step."""
        run = self.run
        seed = run.recipe.seed + run.progress.step
        ids = sample(run.averaging.model, num_tokens, run.recipe.sample.temperature, seed, self.stop)
        return run.folder.tokenizer.detokenize(run.folder.vocabulary.decode(ids)) + "\n"


def time_taken(budget: TimeBudget, *, is_early: bool) -> str:
    """Return how much of its time a run has taken, and why it is not all of it, or more, unless the run has ended early."""
    taken = f"{duration(budget.progress.elapsed_seconds)} of {duration(60 * budget.minutes)}"
    reason = "" if is_early else budget.why_missed()
    return f"{taken}: {reason}" if reason else taken


def age(path: Path) -> float:
    """Return the seconds since a file was written, infinite if there is none."""
    return time.time() - path.stat().st_mtime if path.exists() else float("inf")


def mark_finished(run: Run, asked: Recipe) -> None:
    """Write the recipe as it was asked for, without what was chosen for it, to finished.toml: a restarted job exits at once."""
    if run.world.is_main:
        with suppress(OSError):  # on a full disk the checkpoint is what counts
            write_atomic(run.path / FINISHED, config.as_toml(dataclasses.replace(asked, resume="auto")))
