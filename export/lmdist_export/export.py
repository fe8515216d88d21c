"""Export a trained model to a bundle: `lmdist-export RUN_OR_CHECKPOINT -o BUNDLE`.

The command only: flags, their checks, and the table at the end. conversion/exporting.py writes and verifies; bundle.py and
docs/bundle.md describe the files. Imports of torch and onnx wait until the flags are checked, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmdist.bounds import at_least, check
from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import log, shown, table
from lmdist.cpus import limit_threads
from lmdist.errors import EXIT_DEFECT, DataError, MissingInputError, UsageError, require
from lmdist.perplexity import COMPARED
from lmdist.storage.atomic import check_output_file, check_output_folder, refuse_to_replace_link
from lmdist_export import EXPORT_COMMAND, PRECISIONS

if TYPE_CHECKING:
    from lmdist_export.conversion.exporting import TrainedModel


def parser() -> argparse.ArgumentParser:
    """Return the command line of lmdist-export."""
    made = CommandParser(
        prog=EXPORT_COMMAND,
        description="Turn a trained model into an ONNX bundle that onnxruntime samples without torch. "
        "The bundle is compared with torch first and not written if it differs.",
    )
    made.add_argument(
        "checkpoint",
        type=Path,
        help="a run (runs/NAME: its best checkpoint) or a checkpoint; with --register and without -o, a bundle",
    )
    made.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="the folder to write")
    made.add_argument(
        "--layout",
        choices=tuple(LAYOUTS),
        default="bundle",
        help="bundle: for lmdist-generate and any onnxruntime; sherpa-onnx: as the language model of a speech recognizer; web: "
        "a page for any static server, which runs the model in the browser (default: bundle)",
    )
    made.add_argument(
        "--onnxruntime-web",
        type=Path,
        metavar="FOLDER",
        help="with --layout web: npm's package onnxruntime-web, unpacked, whose two files are copied beside the page "
        "(default: the browser loads them from cdn.jsdelivr.net)",
    )
    made.add_argument(
        "--data",
        metavar="FOLDER",
        help="the data folder whose valid split is the held-out text (default: the one the model was trained on); "
        "none: no held-out text",
    )
    made.add_argument(
        "--precision",
        choices=(*PRECISIONS, "auto"),
        default="fp32",
        help="of the weights. fp16: half as large, as fast on a CPU; int8: a quarter, several times as fast, on a CPU only; "
        "int4: int8 with a projection of 4 bits, faster for one text at a time; auto: the fastest here among those that cost "
        "no more than allowed (default: fp32)",
    )
    made.add_argument(
        "--max-perplexity-loss",
        type=float,
        metavar="PERCENT",
        help="the increase of perplexity on the held-out text above which nothing is written (default: int8 1, int4 3)",
    )
    made.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help="write the embeddings of all words in word2vec's text format, beside the bundle or without one",
    )
    made.add_argument("--overwrite", action="store_true", help="replace an output of the same layout")
    made.add_argument(
        "--register",
        metavar="NAME",
        help="upload the bundle to MLflow (MLFLOW_TRACKING_URI, else mlflow.db in this directory) as the next version of the "
        "registered model NAME, so that mlflow models serve -m models:/NAME@ALIAS serves it",
    )
    made.add_argument("--alias", help="the alias of the version (default: champion)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Export, or report in one line why not."""
    with exit_on_error(EXPORT_COMMAND):
        arguments = parser().parse_args(argv)
        check_arguments(arguments)
        if arguments.output or arguments.vectors:
            export(arguments)
        if arguments.register is not None:
            register(arguments.output or arguments.checkpoint, arguments)


def export(arguments: argparse.Namespace) -> None:
    """Write what is asked for of a trained model, and print a table of it."""
    limit_threads()
    from lmdist.training.distributed import full_memory_reported
    from lmdist_export.conversion.exporting import TrainedModel
    from lmdist_export.conversion.verify import MismatchError

    with full_memory_reported("end what else uses it, or export on a machine with more"):
        trained = TrainedModel.load(arguments.checkpoint)
        if arguments.vectors:
            show(write_embeddings(trained, arguments.vectors))
        if not arguments.output:
            return
        try:
            show(LAYOUTS[arguments.layout].write(trained, arguments))
        except MismatchError as error:
            log(f"the graph differs from torch, nothing was written: {error}", EXPORT_COMMAND)
            sys.exit(EXIT_DEFECT)


def show(rows: dict[str, str]) -> None:
    """Print a table of what was written, before anything that follows takes its time."""
    sys.stdout.write(table(rows, width=14))
    sys.stdout.flush()


def write_bundle_layout(trained: TrainedModel, arguments: argparse.Namespace) -> dict[str, str]:
    """Write and verify a bundle; return the rows of the table that describes it."""
    from lmdist_export.conversion import exporting

    return rows_of(arguments.output, write_compared(trained, arguments, exporting.export_bundle))


def write_sherpa_layout(trained: TrainedModel, arguments: argparse.Namespace) -> dict[str, str]:
    """Write and verify a folder for sherpa-onnx; return the rows of the table that describes it."""
    from lmdist_export.conversion import sherpa

    log_start(trained, arguments.output)
    differences = sherpa.write(trained.model, trained.vocabulary, arguments.output, trained.origin, replace=arguments.overwrite)
    return sherpa.rows_of(arguments.output, differences, trained.origin)


def write_web_layout(trained: TrainedModel, arguments: argparse.Namespace) -> dict[str, str]:
    """Write a page that runs the model, verified as a bundle is; return the rows of the table that describes it."""
    from lmdist_export.conversion import web

    write = partial(web.write, onnxruntime_web=arguments.onnxruntime_web)
    return web.rows_of(arguments.output, write_compared(trained, arguments, write))


def write_compared(
    trained: TrainedModel, arguments: argparse.Namespace, write: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Write a layout that is compared with torch on held-out text; return the manifest of the bundle that it is, or was."""
    from lmdist_export.conversion import exporting

    held_out = exporting.held_out_text(trained, arguments.data)
    log_start(trained, arguments.output)
    how = arguments.precision, arguments.max_perplexity_loss
    return write(trained, arguments.output, held_out, *how, replace=arguments.overwrite)


def write_embeddings(trained: TrainedModel, file: Path) -> dict[str, str]:
    """Write the embeddings of a model in word2vec's text format; return the row of the table that describes them."""
    from lmdist.text.vectors import write_vectors

    rows = trained.model.embedding.weight.detach().numpy()
    write_vectors(file, trained.vocabulary, rows)
    return {"vectors": f"{file}  ({len(rows):,} words, {rows.shape[1]} numbers each, of {trained.origin})"}


def log_start(trained: TrainedModel, output: Path) -> None:
    """Log what is exported, and where to."""
    model = trained.model
    log(
        f"{trained.path}: {trained.origin}, {model.vocabulary_size:,} words, layers {model.layer_sizes} -> {output}",
        EXPORT_COMMAND,
    )


def register(bundle: Path, arguments: argparse.Namespace) -> None:
    """Upload a bundle to MLflow, and print how it is served."""
    from lmdist_export.serving import registry

    log(f"registering {bundle} as {arguments.register}", EXPORT_COMMAND)
    sys.stdout.write(registry.register(bundle, arguments.register, arguments.alias or registry.CHAMPION))


# --- mistakes that can be seen before anything is loaded -------------------------------------------------------------


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError for flags that contradict each other or name what cannot be read, written or registered."""
    check_flags(arguments)
    if arguments.max_perplexity_loss is not None:
        check("--max-perplexity-loss", arguments.max_perplexity_loss, at_least(-100, "below 0 an improvement is asked for"))
    check_registration(arguments)
    if arguments.vectors:
        check_output_file(arguments.vectors, "--vectors")
    if arguments.output:
        check_output(arguments.output, arguments.layout, overwrite=arguments.overwrite)
    elif not arguments.vectors:
        check_is_bundle(arguments.checkpoint)


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise UsageError where nothing is asked for, and for a flag that means nothing to what is."""
    if not (arguments.output or arguments.vectors or arguments.register is not None):
        raise UsageError("-o is missing: give the folder to write, as in -o bundles/NAME")
    limits = LAYOUTS[arguments.layout].limits if arguments.output else WITHOUT_OUTPUT
    for flag, taken in limits.taken.items():
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
        if value not in taken:
            raise UsageError(f"{flag if value is True else f'{flag} {value}'}: {limits.reason}; leave it out")


def check_registration(arguments: argparse.Namespace) -> None:
    """Raise UsageError for names that MLflow does not take, and where there is no bundle to register."""
    if arguments.register is None:
        if arguments.alias is not None:
            raise UsageError(f"--alias {arguments.alias} is for a registered model: give --register NAME as well")
        return
    from lmdist.tracking.address import packages_of, store_address
    from lmdist_export.serving import registry

    registry.check_names(arguments.register, arguments.alias or registry.CHAMPION)
    require(*packages_of(store_address()), purpose="--register: ")
    if arguments.vectors and not arguments.output:
        raise UsageError("--vectors is of a checkpoint, and --register without -o of a bundle: give -o too, or one of the two")


def check_is_bundle(folder: Path) -> None:
    """Raise UsageError for what cannot be registered as it is."""
    from lmdist.storage.held import HeldFolder
    from lmdist_export.bundle import EXPECTED, read_manifest

    try:
        read_manifest(HeldFolder(folder, EXPECTED))
    except (DataError, MissingInputError) as error:
        raise UsageError(f"without -o a bundle is registered as it is, and {error}") from None


def check_output(output: Path, layout: str, *, overwrite: bool) -> None:
    """Raise UsageError unless `output` is free, or is of this layout and may be replaced."""
    from lmdist.storage.held import HeldFolder
    from lmdist_export.bundle import EXPECTED, read_manifest

    refuse_to_replace_link(output)
    if not os.path.lexists(output):
        check_output_folder("-o", output)
        return
    if not overwrite:
        raise UsageError(f"{output} exists already: give another name, or --overwrite to replace it")
    if layout == "sherpa-onnx":
        from lmdist_export.conversion import sherpa

        if not sherpa.is_layout(output):
            raise UsageError(
                f"{output} exists already and holds other things than {sherpa.MODEL} and {sherpa.TOKENS}; "
                "--overwrite replaces only a folder of these"
            )
        return
    if layout == "web":
        from lmdist_export.conversion import web

        if not web.is_layout(output):
            raise UsageError(f"{output} exists already and is no page of --layout web; --overwrite replaces only one of these")
        return
    try:
        read_manifest(HeldFolder(output, EXPECTED))
    except (DataError, MissingInputError):
        raise UsageError(f"{output} exists already and is not a bundle; --overwrite replaces only bundles") from None


def rows_of(output: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the table of what was written, and of the command that uses it."""
    megabytes = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    held_out, cache = manifest["held_out"], manifest["cache"]
    differences = ", ".join(f"{name} {value:.1e}" for name, value in manifest["differences"].items())
    allowed = "" if manifest["tolerance"] is None else f"  (allowed: {manifest['tolerance']:.0e})"
    return {
        "bundle": f"{output}  ({megabytes:,.1f} MB, {manifest['sizes']['precision']}, {manifest['parameters']:,} parameters)",
        "created from": f"{manifest['run']}, step {manifest['step']:,}",
        "max error": differences + allowed,
        "perplexity": "not compared: --data none"
        if held_out is None
        else f"{held_out['onnxruntime']:,.3f} by onnxruntime, {held_out['torch']:,.3f} by torch"
        f"{''.join(f', {shown(held_out[name])} {short}' for name, short in COMPARED.items() if name in held_out)}, "
        f"on {held_out['tokens']:,} tokens of the {held_out['split']} split ({held_out['loss_percent']:+.2f} %); "
        f"the same most likely token in {held_out['top_1_agreement']:.1%}",
        **({"cache": "{size:,} tokens, theta {theta}, weight {weight}".format_map(cache)} if cache else {}),
        "next": shlex.join(["lmdist-generate", str(output)]),
    }


class FlagLimits(NamedTuple):
    """Which flags what is written has a meaning for."""

    taken: dict[str, tuple[object, ...]]
    """The values that it takes of some flags, by the flag."""
    reason: str
    """Why it takes no others."""


class Layout(NamedTuple):
    """What can be written."""

    write: Callable[[TrainedModel, argparse.Namespace], dict[str, str]]
    """Writes it, and returns the rows of the table that describes it."""
    limits: FlagLimits


NOT_GIVEN = (None,)
LAYOUTS = {
    "bundle": Layout(
        write_bundle_layout,
        FlagLimits({"--onnxruntime-web": NOT_GIVEN}, "--layout bundle is no page"),
    ),
    "sherpa-onnx": Layout(
        write_sherpa_layout,
        FlagLimits(
            {
                "--data": (None, "none"),
                "--precision": ("fp32",),
                "--max-perplexity-loss": NOT_GIVEN,
                "--register": NOT_GIVEN,
                "--onnxruntime-web": NOT_GIVEN,
            },
            "--layout sherpa-onnx is written in fp32, reads no held-out text and is no model of MLflow",
        ),
    ),
    "web": Layout(
        write_web_layout,
        FlagLimits(
            {"--precision": ("fp32", "int8"), "--register": NOT_GIVEN},
            "--layout web is written in fp32 or int8 and is no model of MLflow",
        ),
    ),
}
WITHOUT_OUTPUT = FlagLimits(
    {
        "--layout": ("bundle",),
        "--onnxruntime-web": NOT_GIVEN,
        "--data": NOT_GIVEN,
        "--precision": ("fp32",),
        "--max-perplexity-loss": NOT_GIVEN,
        "--overwrite": (False,),
    },
    "without -o nothing is written that it could change",
)
"""Of vectors alone, and of a bundle that is registered as it is."""


if __name__ == "__main__":
    main()
