"""The training loop, read top to bottom in `train`.

One step is one global batch, whatever the number of ranks: the loss is the sum of nats over the batch's words divided by
their number. Every rank computes; rank 0 writes. The job around it is train.py's matter.
"""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmdist import config
from lmdist.console import Console, duration
from lmdist.errors import Stopped, UsageError
from lmdist.model.cuda_graph import Function, Graphed
from lmdist.model.language_model import LanguageModel, State
from lmdist.model.loss import IGNORED, activation_penalty, summed_nats
from lmdist.model.precision import Precision, choose, prepare_for
from lmdist.perplexity import perplexity
from lmdist.settings import Recipe
from lmdist.signals import StopRequest
from lmdist.storage.atomic import write_atomic
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist.tracking.logger import MetricsLogger, RunLogger
from lmdist.tracking.plot import plot_losses
from lmdist.training import checkpoint, optimizer
from lmdist.training.checkpoint import Progress
from lmdist.training.data import Folder, training_batches
from lmdist.training.distributed import World
from lmdist.training.evaluate import evaluate
from lmdist.training.metrics import Nats
from lmdist.training.sample import sample

FINAL_SAMPLE = "sample.txt"
SECONDS_A_PICTURE = 60.0
LARGE_VOCABULARY = 100_000

Checkpoint = tuple[Path, dict[str, Any]]
"""A checkpoint's folder and its manifest."""


def train(recipe: Recipe, world: World, stop: StopRequest) -> None:
    """Train as the recipe says, from the newest checkpoint on or from nothing; raises Stopped where `stop` asks for it."""
    torch.set_flush_denormal(True)
    checkpoints = Path(recipe.run_folder) / "checkpoints"
    newest = newest_checkpoint(recipe, world)
    rows = world.rows(recipe.data.global_batch)
    rows_at_once = (rows.stop - rows.start) // recipe.training.accumulation
    precision = agreed_precision(recipe, world, newest, rows_at_once)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, precision=precision.name))
    settings = recipe.training

    folder = Folder(Path(recipe.data.folder))
    batches = training_batches(folder, recipe.data, recipe.seed)
    validation = folder.tokens("valid") if folder.has("valid") else None
    total_steps = settings.steps or math.ceil(settings.epochs * batches.steps_per_epoch)
    validate_every = settings.validate_every or batches.steps_per_epoch

    def due(step: int) -> bool:
        """Whether the model is validated after `step` steps."""
        return validation is not None and step > 0 and (step == total_steps or step % validate_every == 0)

    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.model, folder.vocabulary_size).to(world.device)
    network = world.wrap(model, settings.gradient_compression)
    optimiser = optimizer.build(recipe.optimizer, model)
    scaler = torch.GradScaler(world.device.type, enabled=precision.name == "fp16")
    told = prepare_for(precision, model, world.device, rows_at_once, recipe.data.row_length)
    progress, streams = restore(newest, recipe, folder, model, optimiser)
    if progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    state = model.initial_state(rows.stop - rows.start)
    if streams is not None:
        state = (streams[0][rows].to(world.device), streams[1][rows].to(world.device))  # each (R, S)

    penalties = recipe.optimizer.activation_penalty, recipe.optimizer.temporal_penalty

    def forward_backward(inputs: Tensor, targets: Tensor, h: Tensor, c: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        """One part of a batch: adds its gradients, gives its nats and the state after; `share` is a word's in the loss.

        DDP averages gradients over the W ranks, hence the factor W.
        """
        with precision.autocast(world.device):
            raw, (h, c) = network(inputs, (h, c))  # (B, T, H), (B, S)
            hidden = model.dropout(raw)
            part_nats = summed_nats(hidden, model.projection, targets)
            loss = part_nats * share
            if penalties != (0, 0):
                loss = loss + activation_penalty(raw, hidden, *penalties) * (len(inputs) / recipe.data.global_batch)
        scaler.scale(loss * world.size).backward()
        return part_nats.detach(), h.detach(), c.detach()

    rehearse(forward_backward, model, rows_at_once, recipe.data.row_length, world)
    # DDP, sums over parts and the adaptive head, which asks how many words are rare, do not fit into a CUDA graph.
    fits = world.device.type == "cuda" and world.size == settings.accumulation == 1 and recipe.model.head == "full"
    part: Function = Graphed(forward_backward, model) if fits else forward_backward
    nats, tokens, seconds_since_log, saved = Nats(world, progress.nats, progress.counted), 0, 0.0, time.monotonic()
    saving = stopping = False
    stop.deferred = True  # from here on a request to stop waits for the end of a step

    with (
        open_tracker(recipe, world, folder, progress.step) as tracker,
        Console(total_steps, progress.step, silent=not world.is_main) as console,
        closing(checkpoint.Saver(checkpoints, config.as_dict(recipe), folder.path, recipe.checkpoint.keep)) as saver,
    ):
        console.say(announcement(recipe, world, folder, model, precision, batches.steps_per_epoch, total_steps, progress.step))
        for line in told:
            console.say(line)
        while True:
            # Between two steps: a validation where one is due and was not cut short by a stop, a checkpoint, the end.
            if due(progress.step) and progress.valid_nats is None and not stopping:
                assert validation is not None
                valid = evaluate(model, validation, recipe.data.valid_batch, recipe.data.window, world, stop)
                stopping = world.any(stop.requested)
                if not stopping:
                    progress.valid_nats = finite(valid.mean(), "validation loss", progress.step)
                    if progress.best_valid_nats is None or progress.valid_nats < progress.best_valid_nats:
                        progress.best_valid_nats = progress.valid_nats
                    elif recipe.schedule.name == "plateau":
                        progress.divisions += 1
                    show_validation(recipe, folder, model, progress, console, tracker)
                saving = True
            if saving:
                progress.loss_scale = scaler.state_dict()
                streams = (world.gather_rows(state[0]), world.gather_rows(state[1]))  # each (G, S)
                if world.is_main:
                    saver.save(checkpoint.snapshot(progress, model, optimiser, streams))
                saved = time.monotonic()
            if stopping or progress.step == total_steps:
                break

            began = time.perf_counter()
            # One global batch. Its data, its dropout and its learning rate depend on nothing but its number.
            batch = batches.batch(progress.step, rows)
            torch.manual_seed((recipe.seed * 1_000_003 + progress.step) * 65_537 + world.rank)
            rate = optimizer.learning_rate(
                recipe.optimizer.learning_rate, recipe.schedule, progress.step, total_steps, progress.divisions
            )
            for group in optimiser.param_groups:
                group["lr"] = rate
            if batch.fresh:
                state = model.initial_state(rows.stop - rows.start)

            # Forward and backward, part by part.
            last_states: list[State] = []
            split = [
                tensor.chunk(settings.accumulation) for tensor in (*batch.words(world.device), *state, batch.targets != IGNORED)
            ]
            share = torch.full((), 1 / batch.tokens, device=world.device)  # torch.tensor would wait for the GPU
            for number, (inputs, targets, h, c, there) in enumerate(zip(*split, strict=True), start=1):
                with world.accumulating(network, last=number == settings.accumulation):
                    part_nats, h, c = part(inputs, targets, h, c, share)
                nats.add(part_nats, int(there.sum()))
                last_states.append((h, c))
            h, c = zip(*last_states, strict=True)
            state = (torch.cat(h), torch.cat(c))  # each (R, S)

            # The update, the same on every rank.
            scaler.unscale_(optimiser)
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or math.inf)
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad(set_to_none=True)

            progress.step += 1
            progress.tokens += batch.tokens
            progress.valid_nats = None
            tokens += batch.tokens
            console.advance()

            # Now and then a line, and a checkpoint to come: at the same step on every rank.
            stopping = world.any_before(stop.requested)
            ended = progress.step == total_steps
            logging = ended or due(progress.step) or at_multiple(progress.step, settings.log_every)
            saving = ended or stopping or at_multiple(progress.step, recipe.checkpoint.every_steps)
            if saving or logging:
                progress.nats, progress.counted = (
                    nats.totals()
                )  # a GPU is waited for only here: time is right from line to line
            progress.seconds += time.perf_counter() - began
            seconds_since_log += time.perf_counter() - began
            if saving or logging:
                mean = finite(progress.nats / progress.counted, "training loss", progress.step)
                if settings.precision != "fp16":  # the scaler leaves out the steps whose gradients are too large for fp16
                    finite(norm.item(), "norm of the gradient", progress.step)
                if logging:
                    speed, left = tokens / seconds_since_log, (total_steps - progress.step) * progress.seconds / progress.step
                    console.show(progress.step, mean, perplexity(mean), speed, rate, left)
                    tracker.log_metrics(
                        progress.step,
                        {
                            "train/loss": mean,
                            "train/perplexity": perplexity(mean),
                            "train/gradient_norm": norm.item(),
                            "train/learning_rate": rate,
                            "train/tokens": progress.tokens,
                            "train/tokens_per_second": speed,
                        },
                    )
                    nats, tokens, seconds_since_log = Nats(world), 0, 0.0
                    progress.nats, progress.counted = 0.0, 0
                    minutes = (time.monotonic() - saved) / 60
                    saving = saving or world.any(0 < recipe.checkpoint.every_minutes <= minutes)

        saver.close()
        if stopping:
            world.close()  # no rank ends before the last checkpoint is on the disk: torchrun would end the one that writes it
            raise Stopped(f"stopped on request after step {progress.step:,}, which is saved; --resume auto goes on from there")
        finish(recipe, folder, model, progress, console, tracker)
    if world.is_main:
        with suppress(OSError):  # a full disk: the checkpoint is there, and that is what counts
            write_atomic(Path(recipe.run_folder) / config.FINISHED, config.as_toml(dataclasses.replace(recipe, resume="auto")))
    world.close()  # no rank ends before all is done: one that is lost now and started anew would have no peers


def newest_checkpoint(recipe: Recipe, world: World) -> Checkpoint | None:
    """The newest good checkpoint of the run and its manifest, if there is one and the recipe wants to go on from it."""
    checkpoints = Path(recipe.run_folder) / "checkpoints"
    if world.is_main:
        checkpoint.tidy(checkpoints)
    found = world.agree(str(checkpoint.newest(checkpoints) or "") if world.is_main else "")
    if not found:
        return None
    newest = Path(found)
    if recipe.resume == "never":
        raise UsageError(
            f"{recipe.run_folder} holds a run already ({newest.name}): --resume auto goes on with it, "
            "--run_folder NAME starts another"
        )
    return newest, checkpoint.read_manifest(newest)


def agreed_precision(recipe: Recipe, world: World, newest: Checkpoint | None, rows: int) -> Precision:
    """The precision that rank 0 chooses for `rows` at once; all ranks have one, though they may be of several kinds."""
    before = newest[1]["recipe"]["training"]["precision"] if newest else ""
    chosen = choose(recipe.training.precision, before, world.device, recipe.model, rows)
    name, _, why = str(world.agree(f"{chosen.name} {chosen.why}")).partition(" ")
    return Precision(name, why)


def rehearse(forward_backward: Function, model: LanguageModel, rows: int, length: int, world: World) -> None:
    """Go through DDP once before the first step, with words that nobody learns from.

    After its first backward DDP lays out the gradients anew, and on more than two ranks sums of another layout are rounded
    differently. With the rehearsal a run that is resumed adds up as one that was never stopped.
    """
    if world.size == 1:
        return
    tokens = torch.zeros(rows, length, dtype=torch.long, device=world.device)
    forward_backward(tokens, tokens, *model.initial_state(rows), torch.ones((), device=world.device))
    model.zero_grad(set_to_none=True)


def restore(
    newest: Checkpoint | None, recipe: Recipe, folder: Folder, model: LanguageModel, optimiser: torch.optim.Optimizer
) -> tuple[Progress, State | None]:
    """Restore what the checkpoint holds, if there is one; gives the progress and all G streams' state."""
    if newest is None:
        return Progress(), None
    path, manifest = newest
    same = {
        "the words": (manifest["files"]["vocab.txt"], folder.meta["files"]["vocab.txt"]),
        "train.bin": (manifest["data"]["files"]["train.bin"], folder.meta["files"]["train.bin"]),
        "seed": (manifest["recipe"]["seed"], recipe.seed),
        "optimizer.name": (manifest["recipe"]["optimizer"]["name"], recipe.optimizer.name),
    }
    for section, kept in (("model", recipe.model), ("data", recipe.data)):
        for key, value in dataclasses.asdict(kept).items():
            if (section, key) not in (("data", "folder"), ("data", "valid_batch")):
                same[f"{section}.{key}"] = (manifest["recipe"][section][key], value)
    for name, (before, now) in same.items():
        if before != now:
            raise UsageError(f"{path} was trained with another {name}: {before}, and this recipe has {now}")
    checkpoint.load_parameters(model, path)
    return checkpoint.load_training(path, optimiser)


def open_tracker(recipe: Recipe, world: World, folder: Folder, step: int) -> MetricsLogger:
    """Rank 0's tracker, with the resolved recipe saved beside it; on the other ranks one that keeps nothing."""
    if not world.is_main:
        return MetricsLogger()
    run = Path(recipe.run_folder)
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "recipe.toml", config.as_toml(recipe))
    return RunLogger(
        run, recipe.tracking, config.flat(recipe), folder.path.name, folder.meta, step, resume=recipe.resume == "auto"
    )


def announcement(
    recipe: Recipe,
    world: World,
    folder: Folder,
    model: LanguageModel,
    precision: Precision,
    steps_per_epoch: int,
    total_steps: int,
    step: int,
) -> str:
    """What the job is about to do."""
    size = sum(parameter.numel() for parameter in model.parameters())
    layers = "-".join(str(size) for size in [recipe.model.embedding_size, *model.layer_sizes])
    head = ", adaptive head" if recipe.model.head == "adaptive" else " tied" if recipe.model.tied else ""
    hint = ""
    if folder.vocabulary_size > LARGE_VOCABULARY and recipe.model.head == "full":
        hint = "\n  hint   with so many words --model.head adaptive --model.tied false trains several times as fast"
    beginning = f"going on after step {step:,}" if step else "starting"
    return (
        f"{recipe.run_folder}: {beginning}, to step {total_steps:,} ({steps_per_epoch:,} an epoch)\n"
        f"  data   {folder.path}: {folder.meta['splits']['train']['tokens']:,} words to train on, "
        f"vocabulary {folder.vocabulary_size:,}\n"
        f"  model  LSTM {layers}{head}, {size:,} parameters\n"
        f"  batch  {recipe.data.global_batch} {recipe.data.batching} x {recipe.data.window} words "
        f"on {world.size} rank(s), {world.device.type}\n"
        f"  speed  {precision.name}{f' ({precision.why})' if precision.why else ''}{hint}"
    )


def at_multiple(step: int, every: int) -> bool:
    """Whether `step` is one of every `every`; 0 is never."""
    return every > 0 and step % every == 0


def finite(value: float, name: str, step: int) -> float:
    """`value`; raises UsageError where it is no finite number, which every rank sees at the same step."""
    if not math.isfinite(value):
        raise UsageError(
            f"the {name} is {value} at step {step}: the training has diverged. Lower --optimizer.learning_rate, "
            "or clip gradients with --optimizer.clip 0.25; the last checkpoint is from before"
        )
    return value


def show_validation(
    recipe: Recipe, folder: Folder, model: LanguageModel, progress: Progress, console: Console, tracker: MetricsLogger
) -> None:
    """Show and log a validation; rank 0 adds some words by the model and the picture of the losses so far."""
    assert progress.valid_nats is not None
    assert progress.best_valid_nats is not None
    console.say(
        f"valid step {progress.step}  loss {progress.valid_nats:.4f}  ppl {perplexity(progress.valid_nats):,.2f}  "
        f"best {perplexity(progress.best_valid_nats):,.2f}"
    )
    tracker.log_metrics(progress.step, {"valid/loss": progress.valid_nats, "valid/perplexity": perplexity(progress.valid_nats)})
    name = f"samples/step-{progress.step:09d}.txt"
    show_text_and_picture(recipe, folder, model, recipe.sample.words, name, progress.step, console, tracker)


def show_text_and_picture(
    recipe: Recipe,
    folder: Folder,
    model: LanguageModel,
    words: int,
    name: str,
    step: int,
    console: Console,
    tracker: MetricsLogger,
) -> None:
    """Some words by the model under a name in the run's folder, and the picture of the losses so far: rank 0's matter."""
    if not tracker.writes:
        return
    picture = Path(recipe.run_folder) / "loss.png"
    ended = name == FINAL_SAMPLE
    try:
        # All ranks wait for the picture, and a long run has many points: at most one a minute, and one at the end.
        if ended or not picture.exists() or time.time() - picture.stat().st_mtime > SECONDS_A_PICTURE:
            plot_losses(picture.with_name("metrics.jsonl"), picture)
        if words:
            tracker.log_text(name, write_words(recipe, folder, model, words, step))
    except OSError as error:  # a full disk costs these, not the run
        console.say(f"warning: the picture and the sample could not be written: {error}")


def write_words(recipe: Recipe, folder: Folder, model: LanguageModel, words: int, step: int) -> str:
    """Text of so many words by the model."""
    ids = sample(model, words, recipe.sample.temperature, seed=recipe.seed + step)
    tokenizer = WordTokenizer.load(folder.path / "text.json")
    return tokenizer.detokenize(Vocabulary.load(folder.path / "vocab.txt").decode(ids)) + "\n"


def finish(
    recipe: Recipe, folder: Folder, model: LanguageModel, progress: Progress, console: Console, tracker: MetricsLogger
) -> None:
    """The last sample, the picture of the losses, and where everything lies."""
    if not tracker.writes:
        return
    run = Path(recipe.run_folder)
    words = recipe.sample.final_words
    show_text_and_picture(recipe, folder, model, words, FINAL_SAMPLE, progress.step, console, tracker)
    lines = [
        f"done: {progress.step:,} steps, {progress.tokens:,} words in {duration(progress.seconds)}",
        f"  run      {run}",
        *([f"  sample   {run / FINAL_SAMPLE}"] if words else []),
        f"  picture  {run / 'loss.png'}",
        *([f"  MLflow   {tracker.page}"] if tracker.page else []),
        f"next: lmdist-evaluate {run}; lmdist-export {run} -o bundles/{run.name}",
    ]
    for line in lines:
        console.say(line)
