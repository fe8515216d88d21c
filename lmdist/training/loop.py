"""The training loop, read top to bottom in `train`.

One step is one global batch, whatever the number of ranks. Every rank computes; rank 0 writes. run.py prepares what the loop
works on, step.py computes a step, report.py logs. The process around it is train.py's matter.
"""

from __future__ import annotations

import math
import time
from contextlib import closing

import torch
from torch import nn

from lmdist import config
from lmdist.errors import Stopped, UsageError
from lmdist.model.lstm import State
from lmdist.settings import Recipe
from lmdist.signals import StopRequest
from lmdist.tracking.run_folder import CHECKPOINTS
from lmdist.training.checkpoints.write import Saver, take_snapshot
from lmdist.training.distributed import World
from lmdist.training.measuring import evaluate
from lmdist.training.metrics import NatsTotal
from lmdist.training.optimizer import optimizer_state, set_momentum
from lmdist.training.report import mark_finished, report_on
from lmdist.training.run import Run, set_up
from lmdist.training.schedule import Position, learning_rate, momentum


def train(recipe: Recipe, world: World, stop: StopRequest) -> None:
    """Train by `recipe`, from its newest checkpoint or from scratch; raise Stopped when `stop` is requested."""
    torch.set_flush_denormal(True)
    run = set_up(recipe, world)
    asked, recipe = recipe, run.recipe  # the second has the precision that was chosen
    progress, training_step = run.progress, run.training_step
    saver = Saver(run.path / CHECKPOINTS, config.as_dict(recipe), run.folder, recipe.checkpoint.keep)
    nats, last_save = NatsTotal(world, progress.nats, progress.counted), time.monotonic()
    saving = stopping = False
    stop.deferred = True  # from here on a request to stop waits for the end of a step

    with report_on(run, stop) as report, closing(saver):
        while True:
            # Between two steps: validate, unless the validation is in the checkpoint already; save; leave.
            if run.validation_due and progress.valid_nats is None and not stopping:
                assert run.validation is not None
                valid = evaluate(run.averaging.model, run.validation, recipe.data.valid_batch, recipe.data.window, world, stop)
                stopping = world.any(stop.requested)  # which has cut the validation short
                if not stopping:
                    run.add_validation(check_finite(valid.mean(), "validation loss", progress.step))
                    report.validation()
                saving = True
            if saving:
                progress.loss_scale = training_step.scaler.state_dict()
                progress.elapsed_seconds = time.perf_counter() - run.began
                streams = tuple(world.gather(part) for part in training_step.state)  # parts (G, S)
                check_savable(run, streams)
                if world.is_main:
                    run.folder.check_unchanged()
                    averaged = run.averaging.averaged
                    saver.save(take_snapshot(progress, run.model, training_step.optimizer, streams, averaged))
                last_save = time.monotonic()
            if stopping or run.finished:
                break

            # One step. Its data, its dropout and its learning rate depend on its number only.
            start = time.perf_counter()
            batch = run.batches.batch(progress.step, world.part_of(recipe.data.global_batch))
            position = Position(progress.step, run.total_steps, progress.divisions)
            rate = batch.rate_share * learning_rate(recipe.optimizer.learning_rate, recipe.schedule, position)
            set_momentum(training_step.optimizer, momentum(recipe.schedule, position))
            training_step.forward_backward(batch, progress.step, nats)
            norm = training_step.clip_and_update(rate)
            run.averaging.update()
            progress.step += 1
            progress.tokens += batch.num_tokens
            progress.valid_nats = None
            report.show_progress(start)

            # Decide at the same step on every rank: stop, log, save. Only reading the loss waits for a GPU.
            stopping = world.any_delayed(stop.requested)
            logging = run.finished or run.validation_due or is_multiple(progress.step, recipe.training.log_every)
            saving = run.finished or stopping or is_multiple(progress.step, recipe.checkpoint.every_steps)
            if saving or logging:
                progress.nats, progress.counted = nats.totals()
            progress.seconds += time.perf_counter() - start
            if run.budget and not run.out_of_patience and run.budget.after_step(logging=logging):
                report.plan()
            if saving or logging:
                loss = check_finite(progress.nats / progress.counted, "training loss", progress.step)
                if recipe.training.precision != "fp16":  # there the scaler skips steps whose gradients overflow
                    check_finite(norm.item(), "norm of the gradient", progress.step)
                if logging:
                    report.training(loss, norm.item(), rate)
                    nats, progress.nats, progress.counted = NatsTotal(world), 0.0, 0
                    minutes = (time.monotonic() - last_save) / 60
                    saving = saving or world.any(0 < recipe.checkpoint.every_minutes <= minutes)

        saver.close()
        if stopping:
            world.close()  # after the last checkpoint is written: torchrun would kill the rank that writes it
            raise Stopped(
                f"stopped on request after step {progress.step:,}, which is saved; --resume auto continues from there"
            )
        interrupted = report.finish()
    if not interrupted:
        mark_finished(run, asked)
    # After all is written: a rank that is lost and restarted earlier would have no peers.
    if world.close(interrupted=interrupted):
        raise Stopped("stopped on request in the last sample; the run is saved, and --resume auto samples anew")


def is_multiple(step: int, every: int) -> bool:
    """Return whether `step` is a multiple of `every`; never if that is 0."""
    return every > 0 and step % every == 0


def check_savable(run: Run, streams: State) -> None:
    """Raise UsageError on every rank at the same step where a checkpoint would hold a number that is not finite."""
    parameters = [parameter.detach() for parameter in run.model.parameters()]
    check_finite(nn.utils.get_total_norm(parameters).item(), "norm of the parameters", run.progress.step)
    # A square of a gradient may be too large for fp32 though the parameters are not: no run resumes from that.
    kept = {"optimizer": optimizer_state(run.training_step.optimizer).values(), "LSTM": streams}
    for name, tensors in kept.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            check_finite(math.nan, f"state of the {name}", run.progress.step)


def check_finite(value: float, name: str, step: int) -> float:
    """Return `value`; raise UsageError on every rank at the same step if it is not finite."""
    if not math.isfinite(value):
        raise UsageError(
            f"the {name} is {value} at step {step}: the training has diverged. Lower --optimizer.learning_rate, "
            "or clip gradients with --optimizer.clip 0.25; the last checkpoint is from before"
        )
    return value
