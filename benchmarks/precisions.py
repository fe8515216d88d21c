"""What each precision of a bundle costs: export a trained run in all of them, and read the cost from the manifests.

    python benchmarks/precisions.py runs/demo [--json FILE]

Perplexity on held-out text, how often the most likely token is torch's, the max absolute error of a logit, and megabytes. The
baseline is fp32. `make quickstart` trains runs/demo.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lmdist_export.conversion.exporting import TrainedModel, export_bundle, held_out_text
from origin import Row, add_json_option, collect_rows, command_line

NAMES = ("fp32", "fp16", "int8", "int4")
ANY_LOSS = 1e9


def main() -> None:
    """Export, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with its data folder where the training had it")
    add_json_option(parser)
    arguments = parser.parse_args()
    trained = TrainedModel.load(arguments.run)
    held_out_tokens = held_out_text(trained, None)
    packages, command = ("lmdist", "torch", "onnxruntime"), command_line(parser, arguments)
    baseline: dict[str, float] = {}
    with collect_rows(arguments.json, packages, command) as rows, tempfile.TemporaryDirectory() as folder:
        for precision in NAMES:
            manifest = export_bundle(trained, Path(folder) / precision, held_out_tokens, precision, ANY_LOSS)
            held_out = manifest["held_out"]
            figures = {
                "perplexity": held_out["onnxruntime"],
                "% lost": held_out["loss_percent"],
                "top-1 agreement": held_out["top_1_agreement"],
                "max logit error": held_out["largest_logit_difference"],
                "MB": manifest["files"]["weights.bin"]["bytes"] / 1e6,
            }
            variant = "baseline" if precision == "fp32" else precision
            baseline = baseline or figures
            rows += [row(arguments.run.name, variant, value, unit, baseline) for unit, value in figures.items()]
            print(f"{precision:<6}" + "  ".join(f"{unit} {value:,.4g}" for unit, value in figures.items()))


def row(case: str, variant: str, value: float, unit: str, baseline: dict[str, float]) -> Row:
    """Return a row; perplexity and size have a ratio to the baseline's."""
    ratio = value / baseline[unit] if unit in ("perplexity", "MB") else None
    return {"case": case, "variant": variant, "value": value, "unit": unit, "spread": 0.0, "ratio": ratio, "peak_mib": None}


if __name__ == "__main__":
    main()
