"""A trained model becomes a bundle: `lmdist-export RUN_OR_CHECKPOINT -o BUNDLE`.

The graphs are written, opened by onnxruntime and compared with torch (verify.py) before the bundle appears under its name: one
that differs leaves nothing behind, nor does a precision that costs too much. What the bundle is made of is said in bundle.py
and docs/bundle.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.errors import CommandParser, DataError, MissingInputError, UsageError, exit_on_error
from lmdist_export import PRECISIONS

if TYPE_CHECKING:
    import numpy as np

    from lmdist.model.language_model import LanguageModel

DEFECT = 1
LAYOUTS = ("bundle", "sherpa-onnx")
SPEED_WORDS = 30


def parser() -> argparse.ArgumentParser:
    """The command line of lmdist-export."""
    made = CommandParser(
        prog="lmdist-export",
        description="Turn a trained model into an ONNX bundle that onnxruntime samples without torch. "
        "It is compared with torch first: one that differs is not written.",
    )
    made.add_argument(
        "checkpoint",
        type=Path,
        help="a run (runs/NAME: its best checkpoint is taken) or a checkpoint; with --register and without -o, a bundle",
    )
    made.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="the folder to write")
    made.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="bundle",
        help="bundle: for lmdist-generate and any onnxruntime; sherpa-onnx: as the language model of a speech recogniser "
        "(default: bundle)",
    )
    made.add_argument(
        "--data",
        metavar="FOLDER",
        help="the data folder whose valid split is the held-out text (default: the one the model was trained on); "
        "none: do without",
    )
    made.add_argument(
        "--precision",
        choices=(*PRECISIONS, "auto"),
        default="fp32",
        help="of the weights. fp16: half as large, as fast on a CPU; int8: a quarter, several times as fast, on a CPU only; "
        "int4: int8 with a projection of 4 bits, faster for one text at a time; auto: the fastest here of those that cost "
        "little enough (default: fp32)",
    )
    made.add_argument(
        "--max-perplexity-loss",
        type=float,
        metavar="PERCENT",
        help="what a precision may cost on the held-out text, or nothing is written (default: int8 1, int4 3)",
    )
    made.add_argument("--overwrite", action="store_true", help="replace what lies there, if it is of the same layout")
    made.add_argument(
        "--register",
        metavar="NAME",
        help="bring the bundle into MLflow (MLFLOW_TRACKING_URI, else mlflow.db in this directory) as the next version of the "
        "registered model NAME, so that mlflow models serve -m models:/NAME@ALIAS serves it",
    )
    made.add_argument("--alias", help="what the version is called beside its number (default: champion)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Export, or say in one line why not."""
    arguments = parser().parse_args(argv)
    with exit_on_error("lmdist-export"):
        if arguments.layout == "sherpa-onnx":
            check_flags(arguments)
        check_registration(arguments)
        if not arguments.output:
            register(arguments.checkpoint, arguments)
            return
        check_output(arguments.output, arguments.layout, overwrite=arguments.overwrite)
        from lmdist_export.conversion.verify import MismatchError

        try:
            if arguments.layout == "bundle":
                manifest = export(
                    arguments.checkpoint, arguments.output, arguments.data, arguments.precision, arguments.max_perplexity_loss
                )
                lines = table(arguments.output, manifest)
            else:
                lines = export_sherpa(arguments.checkpoint, arguments.output)
        except MismatchError as error:
            sys.stderr.write(f"lmdist-export: the graph does not answer as torch does, and nothing was written: {error}\n")
            sys.exit(DEFECT)
        sys.stdout.write(lines)
        if arguments.register:
            sys.stdout.flush()
            register(arguments.output, arguments)


def register(bundle: Path, arguments: argparse.Namespace) -> None:
    """Bring a bundle into MLflow, and say how it is served."""
    from lmdist_export.serving import registry

    say(f"registering {bundle} as {arguments.register}")
    sys.stdout.write(registry.register(bundle, arguments.register, arguments.alias or registry.CHAMPION))


def check_registration(arguments: argparse.Namespace) -> None:
    """Raise UsageError for names that MLflow does not take, and where there is nothing to write and nothing to register."""
    if arguments.register is None and arguments.alias is not None:
        raise UsageError(f"--alias {arguments.alias} is for a registered model: give --register NAME as well")
    if arguments.register is not None:
        from lmdist_export.serving import registry

        registry.check_names(arguments.register, arguments.alias or registry.CHAMPION)
    if not arguments.output:
        from lmdist_export.bundle import read_manifest

        if arguments.register is None:
            raise UsageError("-o is missing: give the folder to write, as in -o bundles/NAME")
        try:
            read_manifest(arguments.checkpoint)
        except (DataError, MissingInputError) as error:
            raise UsageError(f"without -o a bundle is registered as it is, and {error}") from None


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise UsageError for a flag that means nothing to the layout sherpa-onnx."""
    for flag, value, taken in (
        ("--data", arguments.data, (None, "none")),
        ("--precision", arguments.precision, ("fp32",)),
        ("--max-perplexity-loss", arguments.max_perplexity_loss, (None,)),
        ("--register", arguments.register, (None,)),
    ):
        if value not in taken:
            raise UsageError(
                f"{flag} {value}: --layout sherpa-onnx is written in fp32, reads no held-out text and is no model of MLflow; "
                "leave it out"
            )


def check_output(output: Path, layout: str, *, overwrite: bool) -> None:
    """Raise UsageError unless `output` is free, or is of this layout and may be replaced."""
    from lmdist_export.bundle import read_manifest

    if not os.path.lexists(output):
        place = next(parent for parent in output.absolute().parents if os.path.lexists(parent))
        if not os.path.isdir(place) or not os.access(place, os.W_OK):
            raise UsageError(f"-o {output}: nothing can be written in {place}; give another name")
        return
    if not overwrite:
        raise UsageError(f"{output} is there already: give another name, or --overwrite to replace it")
    if layout == "sherpa-onnx":
        from lmdist_export.conversion import sherpa

        if not sherpa.is_layout(output):
            raise UsageError(
                f"{output} is there and holds other things than {sherpa.MODEL} and {sherpa.TOKENS}; "
                "--overwrite replaces only a folder of these"
            )
        return
    try:
        read_manifest(output)
    except (DataError, MissingInputError):
        raise UsageError(f"{output} is there and is not a bundle; --overwrite replaces only bundles") from None


def export(
    run_or_checkpoint: Path, output: Path, data: str | None, precision: str = "fp32", most_loss: float | None = None
) -> dict[str, Any]:
    """Write and verify the bundle; give its manifest."""
    from lmdist.storage.atomic import atomic_folder
    from lmdist.training.checkpoints.read import load_model
    from lmdist.training.checkpoints.retain import find_checkpoint
    from lmdist_export.conversion.tokenizer_json import TOKENIZER, obstacle, text_of

    path = find_checkpoint(run_or_checkpoint)
    model, origin = load_model(path)
    held_out = held_out_text(origin, data)
    if held_out is None and precision not in ("fp32", "fp16"):
        raise UsageError(f"--precision {precision} needs held-out text to know what it costs: give its folder by --data")
    say(f"{path}: step {origin['progress']['step']:,}, {model.vocabulary_size:,} words, layers {model.layer_sizes} -> {output}")
    if reason := obstacle(*text_of(path)):
        say(f"without {TOKENIZER}: {reason}")
    made = partial(write_bundle, path, model, origin, held_out, most_loss)
    with atomic_folder(output) as folder:
        return made(folder, precision) if precision != "auto" else write_fastest(folder, made)


def write_fastest(folder: Path, made: Callable[[Path, str], dict[str, Any]]) -> dict[str, Any]:
    """Write bundles of several precisions, and keep that which makes words fastest here for one text; give its manifest."""
    speeds: dict[str, float] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for precision in ("fp32", "int8", "int4"):
        trial = folder / precision
        trial.mkdir()
        try:
            manifests[precision] = made(trial, precision)
        except UsageError as error:
            say(f"without {precision}: {error}")
            continue
        speeds[precision] = words_a_second(trial)
        say(f"{precision}: {speeds[precision]:,.0f} words/s")
    fastest = max(speeds, key=lambda precision: speeds[precision])
    for file in (folder / fastest).iterdir():
        file.rename(folder / file.name)
    for trial in [place for place in folder.iterdir() if place.is_dir()]:
        shutil.rmtree(trial)
    return manifests[fastest]


def words_a_second(folder: Path) -> float:
    """How fast a bundle makes one text here, one thread."""
    from lmdist_export.bundle import Bundle
    from lmdist_export.sampling.sampler import Sampler

    bundle = Bundle.load(folder)
    sampler = Sampler(bundle, threads=1)
    state = sampler.start([[bundle.generation.bos_token_id]]).seeded(0)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        sampler.generate(state, bundle.generation, SPEED_WORDS)
        seconds.append(time.perf_counter() - began)
    return SPEED_WORDS / min(seconds)


def write_bundle(
    path: Path,
    model: LanguageModel,
    origin: dict[str, Any],
    held_out: tuple[str, np.ndarray] | None,
    most_loss: float | None,
    folder: Path,
    precision: str,
) -> dict[str, Any]:
    """Write the bundle of one precision into an empty folder, and verify it; give its manifest."""
    from importlib.metadata import version

    import torch

    from lmdist import __version__
    from lmdist.storage.checksums import checksums
    from lmdist.storage.reading import write_json
    from lmdist.text.vocabulary import Vocabulary
    from lmdist.tracking.run_folder import read_metadata
    from lmdist_export.bundle import FORMAT, GENERATION_CONFIG, VERSION, Bundle
    from lmdist_export.conversion.tokenizer_json import write_tokenizer
    from lmdist_export.conversion.verify import MOST_LOSS, TOLERANCES, check_perplexity, check_values
    from lmdist_export.conversion.weights import write_graphs
    from lmdist_export.options import GenerationConfig
    from lmdist_export.sampling.runtime import runtime_version
    from lmdist_export.sampling.sampler import Sampler
    from lmdist_export.serving.mlflow_model import write_model

    if precision == "int4" and model.settings.head == "adaptive":
        raise UsageError(
            "--precision int4 stores a projection of one row a word, and this model has an adaptive head: take int8"
        )
    run = run_name(path)
    sizes = write_graphs(model, folder, run, precision)
    for name in ("vocab.txt", "text.json"):
        shutil.copyfile(path / name, folder / name)
    write_tokenizer(folder)
    files = checksums(folder)
    say(f"comparing {precision} with torch" + ("" if held_out is None else ", on held-out text too"))
    generation = GenerationConfig()
    graph = Sampler(Bundle(folder, {}, sizes, Vocabulary.load(folder / "vocab.txt"), generation))
    allowed = MOST_LOSS.get(precision, 0.0) if most_loss is None else most_loss
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": dataclasses.asdict(sizes),
        "run": run,
        "step": origin["progress"]["step"],
        "tolerance": TOLERANCES.get(precision),
        "differences": check_values(graph, model),
        "held_out": None if held_out is None else check_perplexity(graph, model, *held_out, allowed),
        "versions": {
            "lmdist": __version__,
            "torch": torch.__version__,
            "onnx": version("onnx"),
            "onnxruntime": runtime_version(),
        },
        # generation_config.json is not among them, for it is the user's to edit; nor is what belongs to MLflow.
        "files": files,
    }
    write_json(folder / GENERATION_CONFIG, dataclasses.asdict(generation))
    write_json(folder / "manifest.json", manifest)
    write_model(folder, read_metadata(path.parent.parent).get("run_id"))
    return manifest


def export_sherpa(run_or_checkpoint: Path, output: Path) -> str:
    """Write and verify the model as sherpa-onnx takes it; give the lines that say so."""
    from lmdist.text.vocabulary import Vocabulary
    from lmdist.training.checkpoints.read import load_model
    from lmdist.training.checkpoints.retain import find_checkpoint
    from lmdist_export.conversion import sherpa

    path = find_checkpoint(run_or_checkpoint)
    model, origin = load_model(path)
    made_of = f"{run_name(path)}, step {origin['progress']['step']:,}"
    say(f"{path}: {made_of}, {model.vocabulary_size:,} words, layers {model.layer_sizes} -> {output}")
    differences = sherpa.write(model, Vocabulary.load(path / "vocab.txt"), output, made_of)
    return sherpa.table(output, differences, made_of)


def held_out_text(origin: dict[str, Any], data: str | None) -> tuple[str, np.ndarray] | None:
    """A split's name and words, of the folder `data` or of the one the model was trained on; None where `data` is none.

    It is the valid split, or where there is none another: what is compared is two runtimes, not two models.
    """
    from lmdist.training.data import DataFolder

    if data == "none":
        return None
    path = Path(data or origin["recipe"]["data"]["folder"])
    if not path.is_dir():
        raise MissingInputError(
            f"the data folder {path} is not there, and with it the held-out text: say where it is by --data FOLDER, "
            "or do without by --data none"
        )
    folder = DataFolder(path)
    folder.check_vocabulary(origin)
    split = next(name for name in ("valid", "test", "train") if folder.has(name))
    tokens = folder.tokens(split)
    if len(tokens) == 0:
        raise DataError(f"the {split} split of {path} is empty: do without held-out text by --data none")
    return split, tokens


def run_name(checkpoint: Path) -> str:
    """NAME of runs/NAME/checkpoints/STEP, or the folder's own name where it lies elsewhere."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.name


def table(output: Path, manifest: dict[str, Any]) -> str:
    """What was written, in a few lines, and the command that uses it."""
    megabytes = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    held_out = manifest["held_out"]
    lines = {
        "bundle": f"{output}  ({megabytes:,.1f} MB, {manifest['sizes']['precision']}, {manifest['parameters']:,} parameters)",
        "made of": f"{manifest['run']}, step {manifest['step']:,}",
        "differences": ", ".join(f"{name} {value:.1e}" for name, value in manifest["differences"].items())
        + ("" if manifest["tolerance"] is None else f"  (allowed: {manifest['tolerance']:.0e})"),
        "perplexity": "not compared: --data none"
        if held_out is None
        else f"{held_out['onnxruntime']:,.3f} by onnxruntime, {held_out['torch']:,.3f} by torch, "
        f"on {held_out['tokens']:,} words of the {held_out['split']} split ({held_out['loss_percent']:+.2f} %); "
        f"the likeliest word is the same for {held_out['top_1_agreement']:.1%}",
        "next": f'lmdist-generate {output} --prompt "..."',
    }
    return "".join(f"{name:<13}{value}\n" for name, value in lines.items())


def say(line: str) -> None:
    """Say on stderr what is going on."""
    sys.stderr.write(f"lmdist-export: {line}\n")


if __name__ == "__main__":
    main()
