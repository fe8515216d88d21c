"""A run, ready to train: what a recipe, its data folder and its newest checkpoint become before the first step.

This module does not know the loop.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from lmdist import config
from lmdist.console import unused_path
from lmdist.errors import OwnDataError, UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.model.precision import Precision, choose, configure_precision
from lmdist.settings import Recipe
from lmdist.storage.checksums import own_checksum
from lmdist.text.data_folder import VOCABULARY, token_files
from lmdist.text.token_files import Tokens
from lmdist.tracking.run_folder import CHECKPOINTS
from lmdist.training.agreement import check_agreement
from lmdist.training.averaging import AVERAGES, Averaging
from lmdist.training.budget import TimeBudget
from lmdist.training.checkpoints.format import AVERAGED, Progress
from lmdist.training.checkpoints.read import Checkpoint, open_checkpoint
from lmdist.training.checkpoints.retain import newest_verified, remove_unfinished
from lmdist.training.data import DataFolder, Streams, Windows, training_batches
from lmdist.training.distributed import World
from lmdist.training.schedule import SCHEDULES
from lmdist.training.starting_point import start
from lmdist.training.step import TrainingStep

ON_RANK_0 = ("init_from", "init.embeddings")
"""Settings that cannot change and that rank 0 alone acts on: a base that only its machine may have."""


@dataclasses.dataclass
class Run:
    """Everything that the training loop works on."""

    recipe: Recipe
    """The recipe, with the precision that was chosen."""
    world: World
    folder: DataFolder
    batches: Streams | Windows
    validation: Tokens | None
    """The tokens of the valid split."""
    model: LanguageModel
    training_step: TrainingStep
    averaging: Averaging
    progress: Progress
    began: float
    """When the run would have begun without a stop, by time.perf_counter."""
    budget: TimeBudget | None
    """With training.minutes: what decides the steps."""
    precision: Precision
    hints: list[str]
    """Lines for the user: what has changed since the checkpoint, and about the speed of the model on this machine."""

    @property
    def path(self) -> Path:
        """Return the run folder."""
        return Path(self.recipe.run_folder)

    @property
    def total_steps(self) -> int:
        """Return the number of steps of the run, so far as it is known."""
        training = self.recipe.training
        if self.budget:
            return self.budget.total_steps
        return training.steps or math.ceil(training.epochs * self.batches.steps_per_epoch)

    @property
    def finished(self) -> bool:
        """Return whether all steps are done, or validation has stalled for longer than training.patience."""
        return self.progress.step >= self.total_steps or self.out_of_patience  # beyond it after a resume with fewer steps

    @property
    def out_of_patience(self) -> bool:
        """Return whether the last `training.patience` validations were not better than the best one."""
        validations, best = self.progress.validations, self.progress.best_valid_nats
        # The best one is not among them where it was measured before checkpoints held them all.
        stalled = len(validations) - 1 - validations.index(best) if best in validations else len(validations)
        return 0 < self.recipe.training.patience <= stalled

    @property
    def validation_due(self) -> bool:
        """Return whether the model is validated after the steps done so far."""
        every = self.recipe.training.validate_every or self.batches.steps_per_epoch
        step = self.progress.step
        return self.validation is not None and step > 0 and (self.finished or step % every == 0)

    def add_validation(self, nats: float) -> None:
        """Record a validation and what follows from it: the best one, a lower learning rate, the beginning of an average."""
        progress = self.progress
        progress.valid_nats = nats
        progress.validations = (*progress.validations, nats)
        if progress.best_valid_nats is None or nats < progress.best_valid_nats:
            progress.best_valid_nats = nats
        elif SCHEDULES[self.recipe.schedule.name].divides:
            progress.divisions += 1
        self.averaging.start_if_due()


def set_up(recipe: Recipe, world: World) -> Run:
    """Return the run of `recipe`, restored from its newest checkpoint if there is one; a collective call."""
    folder = DataFolder(Path(recipe.data.folder))
    check_agreement(recipe, folder, world)
    newest = find_newest(recipe, folder, world)
    part_size = recipe.data.global_batch // world.size // recipe.training.accumulation
    precision = agree_on_precision(recipe, world, newest, part_size)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, precision=precision.name))

    batches = training_batches(folder, recipe.data, recipe.seed)
    validation = folder.tokens("valid") if folder.has("valid") else None
    if validation is None:
        check_needs_no_validations(recipe, folder)

    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.model, folder.vocabulary_size).to(world.device)
    # Rank 0 alone reads what the run starts from: TrainingStep gives its parameters to the others.
    started_from = start(model, recipe, folder) if world.is_main and newest is None else None
    world.wait_for_all()
    training_step = TrainingStep(recipe, model, precision, world)
    hints = changed_settings(newest, recipe) if newest else []
    hints += configure_precision(precision, model, world.device, part_size, recipe.data.sequence_length)
    progress = restore(newest, recipe, training_step) if newest else Progress(started_from=started_from)
    averaging = Averaging(recipe.averaging, model, progress)
    if newest:
        restore_average(newest, averaging)
    averaging.start_if_due()
    training_step.warm_up_ddp()
    began = time.perf_counter() - progress.elapsed_seconds
    return Run(
        recipe=recipe,
        world=world,
        folder=folder,
        batches=batches,
        validation=validation,
        model=model,
        training_step=training_step,
        averaging=averaging,
        progress=progress,
        began=began,
        budget=time_budget(recipe, progress, began, batches.steps_per_epoch, validation, world),
        precision=precision,
        hints=hints,
    )


def time_budget(
    recipe: Recipe, progress: Progress, began: float, steps_per_epoch: int, validation: Tokens | None, world: World
) -> TimeBudget | None:
    """Return what decides the number of steps where the recipe has training.minutes; None where it says how many they are."""
    minutes = recipe.training.minutes
    if not minutes:
        return None
    validate_every = recipe.training.validate_every or steps_per_epoch
    return TimeBudget(minutes, progress, began, validate_every, 0 if validation is None else len(validation), world)


def find_newest(recipe: Recipe, folder: DataFolder, world: World) -> Checkpoint | None:
    """Return the newest undamaged checkpoint of the run, the same on each rank; raise UsageError if it may not be resumed."""
    checkpoints = Path(recipe.run_folder) / CHECKPOINTS
    newest = None
    if world.is_main:
        remove_unfinished(checkpoints)
        newest = newest_verified(checkpoints)
    world.wait_for_all()
    # A machine that restarts resumes, whatever a peer that starts late was told: rank 0 decides.
    found = f"{own_checksum(newest.manifest)} {newest.path}" if newest else ""
    resume, _, found = world.broadcast(f"{recipe.resume} {found}").partition(" ")
    if not found:
        return None
    checksum, _, path = found.partition(" ")
    newest = newest or open_checkpoint(Path(path))
    if own_checksum(newest.manifest) != checksum:
        raise OwnDataError(f"{path} is another checkpoint on rank {world.rank} than on rank 0: give all ranks one run folder")
    differences = differences_from(newest.manifest, recipe, folder, is_main=world.is_main)
    another = f"--run_folder {shlex.quote(str(unused_path(Path(recipe.run_folder))))} starts another"
    if differences:
        raise UsageError(f"{recipe.run_folder} holds a run of another recipe: {'; '.join(differences)}; {another}")
    if resume == "never":
        raise UsageError(f"{recipe.run_folder} holds a run already ({newest.path.name}): --resume auto continues it, {another}")
    return newest


def check_needs_no_validations(recipe: Recipe, folder: DataFolder) -> None:
    """Raise UsageError if the recipe has a setting that acts on validations, which a folder without a valid split has not."""
    averaging, schedule = recipe.averaging.name, recipe.schedule.name
    for setting, needs_them in (
        ("training.patience", recipe.training.patience > 0),
        (f"averaging.name {averaging}", averaging in AVERAGES and AVERAGES[averaging].needs_validations),
        (f"schedule.name {schedule}", SCHEDULES[schedule].divides),
    ):
        if needs_them:
            raise UsageError(f"{setting} needs validations, and {folder.path} has no valid split: leave it out")


def agree_on_precision(recipe: Recipe, world: World, newest: Checkpoint | None, part_size: int) -> Precision:
    """Return the precision that rank 0 chooses for `part_size` sequences at once; the ranks' machines may differ."""
    before = newest.manifest["recipe"]["training"]["precision"] if newest else ""
    chosen = choose(recipe.training.precision, before, world.device, recipe.model, part_size)
    name, _, reason = world.broadcast(f"{chosen.name} {chosen.reason}").partition(" ")
    return Precision(name, reason)


def differences_from(manifest: dict[str, Any], recipe: Recipe, folder: DataFolder, *, is_main: bool) -> list[str]:
    """Return where a checkpoint's recipe and data differ from these, of what a resumed run cannot change.

    Those of ON_RANK_0 are compared on rank 0 alone.
    """
    settings = [
        f"{name}: the run has {before}, the recipe {now}"
        for name, (before, now) in pairs_of(manifest["recipe"], recipe).items()
        if before != now and is_fixed(name) and (is_main or name not in ON_RANK_0)
    ]
    files, files_now = {**manifest["data"]["files"], **manifest["files"]}, folder.meta["files"]
    names = [VOCABULARY, *dict.fromkeys(token_files("train", files) + token_files("train", files_now))]
    data = [name for name in names if files.get(name) != files_now.get(name)]
    if data:
        before = manifest["recipe"]["data"]["folder"]
        was = "when the run began" if before == str(folder.path) else f"{before}, which the run began with"
        settings.insert(0, f"data.folder: {folder.path} has another {' and '.join(data)} than {was}")
    return settings


def restore(newest: Checkpoint, recipe: Recipe, training_step: TrainingStep) -> Progress:
    """Restore model, optimizer, loss scaler and LSTM state from a checkpoint of the same recipe; return the progress."""
    newest.load_parameters(training_step.model)
    progress, streams = newest.load_training(training_step.optimizer)
    # The time of a run that was begun before all of it was measured is that of its steps.
    progress.elapsed_seconds = max(progress.elapsed_seconds, progress.seconds)
    if progress.loss_scale:
        training_step.scaler.load_state_dict(progress.loss_scale)
    if streams is not None:
        part = training_step.world.part_of(recipe.data.global_batch)
        training_step.state = tuple(stream[part].to(training_step.world.device) for stream in streams)  # parts (B, S)
    return progress


def restore_average(newest: Checkpoint, averaging: Averaging) -> None:
    """Restore the average of a checkpoint; another `averaging.name` than the checkpoint's begins anew."""
    if newest.manifest["recipe"]["averaging"]["name"] != averaging.settings.name:
        averaging.progress.averaged_from = None
    if averaging.progress.averaged_from is not None:
        newest.load_parameters(averaging.start(), AVERAGED)


def is_fixed(name: str) -> bool:
    """Return whether a setting cannot change when a run is resumed.

    The rest may: a step's learning rate, its dropout and all that says how long, how often and where follow from the recipe
    alone, not from the steps before.
    """
    section, _, key = name.rpartition(".")
    return (
        name in ("seed", "optimizer.name", *ON_RANK_0)
        or (section == "data" and key not in ("folder", "valid_batch"))
        or (section == "model" and "dropout" not in key)
    )


def changed_settings(newest: Checkpoint, recipe: Recipe) -> list[str]:
    """Return a line with the settings of the training that differ from the checkpoint's; none where all are the same."""
    changed = [
        f"{name} {reprlib.repr(before)} -> {now!r}"
        for name, (before, now) in pairs_of(newest.manifest["recipe"], recipe).items()
        if before != now and name.startswith(("model.", "init.", "optimizer.", "schedule.", "averaging."))
    ]
    return [f"  changed since step {newest.manifest['progress']['step']:,}: {', '.join(changed)}"] if changed else []


def pairs_of(before: dict[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return each setting's value in a checkpoint's recipe, or its default if it is newer than that, and in `recipe`."""
    values = config.named_settings(Recipe()) | config.named_values(before)
    return {name: (values[name], now) for name, now in config.named_settings(recipe).items()}
