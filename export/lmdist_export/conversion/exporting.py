"""Export a checkpoint: write its bundle, compare it with torch, and move it into place.

    trained = TrainedModel.load(Path("runs/news"))
    manifest = export_bundle(trained, Path("bundles/news"), held_out_text(trained, None), "int8")

The graphs are written, opened by onnxruntime and compared with torch (verify.py) before the bundle appears under its name. A
bundle that differs leaves nothing behind, nor does a precision that costs too much. bundle.py and docs/bundle.md describe the
files. The command is lmdist-export (export.py).
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from lmdist import __version__
from lmdist.cache_settings import TUNED, NeuralCache, read_tuned
from lmdist.console import log
from lmdist.errors import UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.perplexity import TextSize
from lmdist.storage.atomic import atomic_folder
from lmdist.storage.checksums import OWN_CHECKSUM, checksums, own_checksum
from lmdist.storage.held import HeldFolder
from lmdist.storage.reading import write_json
from lmdist.text.token_files import Tokens
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist.tracking.metadata import read_metadata
from lmdist.training.checkpoints.read import open_checkpoint, parameters_file
from lmdist.training.checkpoints.retain import find_checkpoint, run_of
from lmdist.training.data import folder_of_model
from lmdist_export import EXPORT_COMMAND
from lmdist_export.bundle import FORMAT, GENERATION_CONFIG, MANIFEST, VERSION, Bundle
from lmdist_export.conversion.tokenizer_json import TOKENIZER, obstacle, write_tokenizer
from lmdist_export.conversion.verify import MAX_LOSS_PERCENT, TOLERANCES, check_perplexity, check_values
from lmdist_export.conversion.weights import write_graphs
from lmdist_export.options import EXPORTED
from lmdist_export.sampling.runtime import runtime_version
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving.mlflow_model import write_model

AUTO_PRECISIONS = ("fp32", "int8", "int4")
SPEED_TOKENS = 30


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in memory: all that an export takes from its checkpoint."""

    path: Path
    """Of its checkpoint."""
    model: LanguageModel
    manifest: dict[str, Any]
    vocabulary: Vocabulary
    tokenizer: WordTokenizer
    contents: dict[str, bytes]
    """The vocabulary's and the tokenizer's files."""

    @classmethod
    def load(cls, run_or_checkpoint: str | Path) -> Self:
        """Load it from a checkpoint, of a run from the best one; raises MissingInputError or DataError."""
        found = open_checkpoint(find_checkpoint(Path(run_or_checkpoint)))
        return cls(found.path, found.model(), found.manifest, found.vocabulary, found.tokenizer, found.contents)

    @property
    def run(self) -> str:
        """Return NAME of runs/NAME/checkpoints/STEP, or the folder's own name if it lies elsewhere."""
        return (run_of(self.path) or self.path.resolve()).name

    @property
    def run_id(self) -> str | None:
        """Return the id in MLflow of the run that it lies in, if it has one."""
        run = run_of(self.path)
        return None if run is None else read_metadata(run).get("run_id")

    @property
    def step(self) -> int:
        """Return the step at which its checkpoint was written."""
        return self.manifest["progress"]["step"]

    @property
    def cache(self) -> NeuralCache | None:
        """Return the neural cache that lmdist-evaluate has tuned for this checkpoint, if any; logs where it was another's."""
        run = run_of(self.path)
        if run is None or not (run / TUNED).exists():
            return None
        cache = read_tuned(run, self.manifest["files"][parameters_file(self.manifest)]["sha256"])
        if cache is None:
            log(f"without {run / TUNED}: it is not of this checkpoint; lmdist-evaluate --cache tunes it again", EXPORT_COMMAND)
        return cache

    @property
    def origin(self) -> str:
        """Return the run and the step, for people."""
        return f"{self.run}, step {self.step:,}"


class HeldOutText(NamedTuple):
    """A split of a data folder."""

    split: str
    tokens: Tokens
    size: TextSize | None
    """Of the original text, where it was counted."""


def held_out_text(trained: TrainedModel, data: str | None) -> HeldOutText | None:
    """Return a split of the folder `data`, or of the one that the model was trained on; None if `data` is "none".

    It is the valid split, or another if there is none: two runtimes are compared, not two models.
    """
    if data == "none":
        return None
    otherwise = ", or export without held-out text by --data none"
    folder = folder_of_model(trained.manifest, Path(data) if data else None, otherwise)
    split = next(name for name in ("valid", "test", "train") if folder.has(name))
    return HeldOutText(split, folder.tokens(split), folder.text_size(split))


def export_bundle(
    trained: TrainedModel,
    output: str | Path,
    held_out: HeldOutText | None,
    precision: str = "fp32",
    max_loss_percent: float | None = None,
    *,
    replace: bool = False,
) -> dict[str, Any]:
    """Write and verify the bundle `output`, atomically, in place of another one if `replace`; return its manifest.

    Raises MismatchError for a graph that differs from torch, UsageError for a precision that is impossible or costs too much.
    """
    check_held_out(held_out, precision)
    if reason := obstacle(trained.tokenizer.settings, trained.vocabulary):
        log(f"without {TOKENIZER}: {reason}", EXPORT_COMMAND)
    with atomic_folder(Path(output), replace=replace) as folder:
        if precision == "auto":
            return write_fastest(trained, folder, held_out, max_loss_percent)
        return write_bundle(trained, folder, held_out, precision, max_loss_percent)


def check_held_out(held_out: HeldOutText | None, precision: str) -> None:
    """Raise UsageError for a precision whose cost is to be measured, and no text to measure it on."""
    if held_out is None and precision not in ("fp32", "fp16"):
        raise UsageError(f"--precision {precision} needs held-out text to measure its cost: give its folder by --data")


def write_fastest(
    trained: TrainedModel, folder: Path, held_out: HeldOutText | None, max_loss_percent: float | None
) -> dict[str, Any]:
    """Write bundles of several precisions and keep the one that generates one text fastest here; return its manifest."""
    speeds: dict[str, float] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for precision in AUTO_PRECISIONS:
        trial = folder / precision
        trial.mkdir()
        try:
            manifests[precision] = write_bundle(trained, trial, held_out, precision, max_loss_percent)
        except UsageError as error:
            log(f"without {precision}: {error}", EXPORT_COMMAND)
            continue
        speeds[precision] = tokens_per_second(trial)
        log(f"{precision}: {speeds[precision]:,.0f} tokens/s", EXPORT_COMMAND)
    fastest = max(speeds, key=lambda precision: speeds[precision])
    for file in (folder / fastest).iterdir():
        file.rename(folder / file.name)
    for trial in [path for path in folder.iterdir() if path.is_dir()]:
        shutil.rmtree(trial)
    return manifests[fastest]


def write_bundle(
    trained: TrainedModel, folder: Path, held_out: HeldOutText | None, precision: str, max_loss_percent: float | None
) -> dict[str, Any]:
    """Write the bundle of one precision into an empty folder and verify it; return its manifest."""
    model = trained.model
    if precision == "int4" and model.settings.head == "adaptive":
        raise UsageError(
            "--precision int4 stores a projection of one row a word, and this model has an adaptive head: use int8"
        )
    sizes = write_graphs(model, folder, trained.run, precision)
    for name, content in trained.contents.items():
        (folder / name).write_bytes(content)
    if not obstacle(trained.tokenizer.settings, trained.vocabulary):
        write_tokenizer(folder, trained.tokenizer, trained.vocabulary)
    files = checksums(folder)
    log(f"comparing {precision} with torch" + ("" if held_out is None else ", also on held-out text"), EXPORT_COMMAND)
    generation = EXPORTED
    sampler = Sampler(Bundle(HeldFolder(folder), {}, sizes, trained.vocabulary, generation))
    max_loss = MAX_LOSS_PERCENT.get(precision, 0.0) if max_loss_percent is None else max_loss_percent
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": dataclasses.asdict(sizes),
        "cache": None if (cache := trained.cache) is None else dataclasses.asdict(cache),
        "run": trained.run,
        "run_id": trained.run_id,
        "step": trained.step,
        "started_from": trained.manifest["progress"]["started_from"],
        "tolerance": TOLERANCES.get(precision),
        "differences": check_values(sampler, model),
        "held_out": held_out and check_perplexity(sampler, model, held_out.split, held_out.tokens, max_loss, held_out.size),
        "versions": {
            "lmdist": __version__,
            "torch": torch.__version__,
            "onnx": version("onnx"),
            "onnxruntime": runtime_version(),
        },
        # generation_config.json is not among them, because users edit it, nor are MLflow's files.
        "files": files,
    }
    manifest[OWN_CHECKSUM] = own_checksum(manifest)
    write_json(folder / GENERATION_CONFIG, dataclasses.asdict(generation))
    write_json(folder / MANIFEST, manifest)
    write_model(folder, trained.run_id, has_pieces=trained.tokenizer.settings.has_pieces)
    return manifest


def tokens_per_second(folder: Path) -> float:
    """Return the speed at which a bundle generates one text here, with one thread."""
    bundle = Bundle.load(folder)
    sampler = Sampler(bundle, threads=1)
    state = sampler.start([[bundle.generation.bos_token_id]]).seeded(0)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        sampler.generate(state, bundle.generation, SPEED_TOKENS)
        seconds.append(time.perf_counter() - started)
    return SPEED_TOKENS / min(seconds)
