"""A trained model becomes a bundle: `lmdist-export RUN_OR_CHECKPOINT -o BUNDLE`.

The graph is written, opened by onnxruntime and compared with torch (verify.py) before the bundle appears under its name; a
graph that differs leaves nothing behind. What the bundle is made of is said in bundle.py and docs/bundle.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.errors import CommandParser, DataError, MissingInputError, UsageError, report

if TYPE_CHECKING:
    import numpy as np

DEFECT = 1
LAYOUTS = ("bundle", "sherpa-onnx")


def parser() -> argparse.ArgumentParser:
    """The command line of lmdist-export."""
    made = CommandParser(
        prog="lmdist-export",
        description="Turn a trained model into an ONNX bundle that onnxruntime samples without torch. "
        "It is compared with torch first: one that differs is not written.",
    )
    made.add_argument("checkpoint", type=Path, help="a run (runs/NAME: its best checkpoint is taken) or a checkpoint")
    made.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="the folder to write")
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
    made.add_argument("--overwrite", action="store_true", help="replace what lies there, if it is of the same layout")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Export, or say in one line why not."""
    arguments = parser().parse_args(argv)
    with report("lmdist-export"):
        check_output(arguments.output, arguments.layout, overwrite=arguments.overwrite)
        from lmdist_export.verify import MismatchError

        try:
            if arguments.layout == "bundle":
                lines = table(arguments.output, export(arguments.checkpoint, arguments.output, arguments.data))
            else:
                lines = export_sherpa(arguments.checkpoint, arguments.output, arguments.data)
        except MismatchError as error:
            sys.stderr.write(f"lmdist-export: the graph does not answer as torch does, and nothing was written: {error}\n")
            sys.exit(DEFECT)
        sys.stdout.write(lines)


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
        from lmdist_export import sherpa

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


def export(run_or_checkpoint: Path, output: Path, data: str | None) -> dict[str, Any]:
    """Write and verify the bundle; give its manifest."""
    from importlib.metadata import version

    import torch

    from lmdist import __version__, checkpoint
    from lmdist.files import sums, whole_folder, write_json
    from lmdist_export.bundle import FORMAT, GENERATION_CONFIG, MODEL, VERSION, GenerationConfig
    from lmdist_export.convert import write_step_graph
    from lmdist_export.sampler import StepGraph, runtime_version
    from lmdist_export.tokenizer_json import TOKENIZER, write_tokenizer
    from lmdist_export.verify import TOLERANCE, check_perplexity, check_values

    path = checkpoint.find(run_or_checkpoint)
    model, origin = checkpoint.load_model(path)
    held_out = held_out_text(origin, data)
    run, step = run_name(path), origin["progress"]["step"]
    say(f"{path}: step {step:,}, {model.vocabulary_size:,} words, layers {model.layer_sizes} -> {output}")
    with whole_folder(output) as folder:
        write_step_graph(model, folder / MODEL, run)
        for name in ("vocab.txt", "text.json"):
            shutil.copyfile(path / name, folder / name)
        if reason := write_tokenizer(folder):
            say(f"without {TOKENIZER}: {reason}")
        files = sums(folder)
        say("comparing with torch" + ("" if held_out is None else ", on held-out text too"))
        graph = StepGraph(folder / MODEL)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "precision": "fp32",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocabulary_size": model.vocabulary_size,
            "embedding_size": model.settings.embedding_size,
            "layer_sizes": model.layer_sizes,
            "tied": model.settings.tied,
            "run": run,
            "step": step,
            "tolerance": TOLERANCE,
            "differences": check_values(graph, model),
            "held_out": None if held_out is None else check_perplexity(graph, model, *held_out),
            "versions": {
                "lmdist": __version__,
                "torch": torch.__version__,
                "onnx": version("onnx"),
                "onnxruntime": runtime_version(),
            },
            # generation_config.json is not among them: it is the user's to edit.
            "files": files,
        }
        write_json(folder / GENERATION_CONFIG, dataclasses.asdict(GenerationConfig()))
        write_json(folder / "manifest.json", manifest)
    return manifest


def export_sherpa(run_or_checkpoint: Path, output: Path, data: str | None) -> str:
    """Write and verify the model as sherpa-onnx takes it; give the lines that say so."""
    from lmdist import checkpoint
    from lmdist.vocabulary import Vocabulary
    from lmdist_export import sherpa

    if data not in (None, "none"):
        raise UsageError(f"--data {data}: with --layout sherpa-onnx no held-out text is read; leave it out")
    path = checkpoint.find(run_or_checkpoint)
    model, origin = checkpoint.load_model(path)
    made_of = f"{run_name(path)}, step {origin['progress']['step']:,}"
    say(f"{path}: {made_of}, {model.vocabulary_size:,} words, layers {model.layer_sizes} -> {output}")
    differences = sherpa.write(model, Vocabulary.load(path / "vocab.txt"), output, made_of)
    return sherpa.table(output, differences, made_of)


def held_out_text(origin: dict[str, Any], data: str | None) -> tuple[str, np.ndarray] | None:
    """A split's name and words, of the folder `data` or of the one the model was trained on; None where `data` is none.

    It is the valid split, or where there is none another: what is compared is two runtimes, not two models.
    """
    from lmdist.data import Folder

    if data == "none":
        return None
    path = Path(data or origin["recipe"]["data"]["folder"])
    if not path.is_dir():
        raise MissingInputError(
            f"the data folder {path} is not there, and with it the held-out text: say where it is by --data FOLDER, "
            "or do without by --data none"
        )
    folder = Folder(path)
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
        "bundle": f"{output}  ({megabytes:,.1f} MB, {manifest['precision']}, {manifest['parameters']:,} parameters)",
        "made of": f"{manifest['run']}, step {manifest['step']:,}",
        "differences": ", ".join(f"{name} {value:.1e}" for name, value in manifest["differences"].items())
        + f"  (allowed: {manifest['tolerance']:.0e})",
        "perplexity": "not compared: --data none"
        if held_out is None
        else f"{held_out['onnxruntime']:,.3f} by onnxruntime, {held_out['torch']:,.3f} by torch, "
        f"on {held_out['tokens']:,} words of the {held_out['split']} split",
        "next": f'lmdist-generate {output} --prompt "..."',
    }
    return "".join(f"{name:<13}{value}\n" for name, value in lines.items())


def say(line: str) -> None:
    """Say on stderr what is going on."""
    sys.stderr.write(f"lmdist-export: {line}\n")


if __name__ == "__main__":
    main()
