"""Do the fast paths learn the same? The loss of each on real text, against plain PyTorch in fp32.

    python benchmarks/curves.py [--steps 300] [--json benchmarks/results/curves-MACHINE-DATE.json] [--plot FILE]

The demo's model on the demo's text, without dropout, whose masks plain code draws in another way: the baseline (PlainModel of
training.py: all logits, nn.LSTM, fp32), the same with two other seeds, which is the noise, and each path of lmdist from the
baseline's first weights and in its order of the text. The adaptive head is another model, shown for comparison. The figure is
the mean distance from the baseline over the second half of the steps, in nats per token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmdist.model import precision
from lmdist.model.precision import Precision
from lmdist.settings import DEMO_SETTINGS, DataSettings, ModelSettings, OptimizerSettings
from lmdist.text.prepare import prepare
from lmdist.training.data import DataFolder, training_batches
from origin import add_json_option, collect_rows, command_line
from training import BASELINE, Case, Job, PlainJob

OTHER_SEEDS = ("baseline, seed 2", "baseline, seed 3")
SMOOTH = 20


def main() -> None:
    """Train each, print a table, write rows and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="12 steps")
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="plot the curves here")
    arguments = parser.parse_args()
    steps = 12 if arguments.quick else arguments.steps
    device = torch.device(arguments.device)
    curves: dict[str, list[float]] = {}
    command = command_line(parser, arguments)
    with (
        collect_rows(arguments.json, ("lmdist", "torch"), command, arguments.device) as rows,
        tempfile.TemporaryDirectory() as scratch,
    ):
        data = DataSettings(folder=str(Path(scratch) / "demo"))
        prepare(DEMO_SETTINGS, Path(data.folder))
        folder = DataFolder(Path(data.folder))
        model = ModelSettings(dropout=0.0)
        case = Case("demo", model, folder.vocabulary_size, data.global_batch, data.window, OptimizerSettings())
        for seed, variant in enumerate((BASELINE, *OTHER_SEEDS), start=1):
            torch.manual_seed(seed)
            curves[variant] = train(PlainJob(case), folder, data, steps, seed, device)
            rows.append(row(variant, curves[variant], curves[BASELINE]))
        for variant, name in paths(device).items():
            curves[variant] = train(started(case, name, variant, device), folder, data, steps, 1, device)
            rows.append(row(variant, curves[variant], curves[BASELINE]))
    if arguments.plot:
        plot(curves, arguments.plot)


def paths(device: torch.device) -> dict[str, str]:
    """Return the fast paths of a device, and the precision of each."""
    if device.type == "cuda":
        names = ("fp32", "tf32", "bf16", "fp16")
        return {f"lmdist {name}": name for name in names} | {"lmdist fp32, adaptive head": "fp32"}
    return {
        "lmdist fp32": "fp32",
        "lmdist bf16, oneDNN": "bf16",
        "lmdist bf16, matmul": "bf16",
        "lmdist fp32, adaptive head": "fp32",
    }


def started(case: Case, name: str, variant: str, device: torch.device) -> Job:
    """Return a job of lmdist with the baseline's first weights."""
    precision.LARGE_LAYER = 1 if "matmul" in variant else 1 << 30  # take this kernel, whatever the size
    torch.manual_seed(1)
    plain = PlainJob(case)
    if "adaptive" in variant:
        case = replace(case, model=replace(case.model, tied=False, head="adaptive"))
        return Job(case, Precision(name, ""), device)
    job = Job(case, Precision(name, ""), device)
    with torch.no_grad():
        for ours, theirs in zip(job.model.parameters(), plain.model.parameters(), strict=True):
            ours.copy_(theirs)
    return job


def train(
    job: PlainJob | Job, folder: DataFolder, data: DataSettings, steps: int, seed: int, device: torch.device
) -> list[float]:
    """Return the nats per token of each step."""
    where = device if isinstance(job, Job) else torch.device("cpu")
    batches = training_batches(folder, data, seed)
    everything = slice(0, data.global_batch)
    return torch.stack([job.step(*batches.batch(step, everything).tensors_on(where)) for step in range(steps)]).tolist()


def row(variant: str, curve: list[float], baseline: list[float]) -> dict[str, Any]:
    """Return a row, printed at once: the mean distance from the baseline in the second half, and the loss in the last tenth."""
    half, tail = len(curve) // 2, max(1, len(curve) // 10)
    distances = [ours - theirs for ours, theirs in zip(curve[half:], baseline[half:], strict=True)]
    result = {
        "case": f"demo text, {len(curve)} steps of 20 x 35 tokens",
        "variant": variant,
        "value": round(statistics.mean(distances), 4),
        "unit": "nats per token from the baseline",
        "spread": round(max(distances) - min(distances), 4),
        "ratio": round(statistics.mean(curve[-tail:]) / statistics.mean(baseline[-tail:]), 4),
        "peak_mib": None,
        "loss": round(statistics.mean(curve[-tail:]), 4),
        "curve": [round(value, 4) for value in curve],
    }
    print(f"{variant:<28}loss {result['loss']:>7.4f}{result['value']:>10.4f} {result['unit']}", flush=True)
    return result


def plot(curves: dict[str, list[float]], picture: Path) -> None:
    """Plot the curves, and the distance from the baseline's of those of the same model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for variant, curve in curves.items():
        style: dict[str, Any] = {"color": "0.75", "linewidth": 3} if variant in OTHER_SEEDS else {"linewidth": 1.3}
        style = {"color": "black", "linewidth": 1.3} if variant == BASELINE else style
        left.plot(smooth(curve), label=variant, **style)
        if variant != BASELINE and "adaptive" not in variant:
            difference = [ours - theirs for ours, theirs in zip(curve, curves[BASELINE], strict=True)]
            right.plot(smooth(difference), label=variant, **style)
    left.set_ylabel(f"nats per token, mean of {SMOOTH} steps")
    left.legend(fontsize=8)
    right.axhline(0, color="black", linewidth=1.3)
    right.set_ylabel("nats per token from the baseline (grey: other seeds of it)")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


def smooth(values: list[float]) -> list[float]:
    """Return the mean of the last SMOOTH values, at each step."""
    return [statistics.mean(values[max(0, end - SMOOTH) : end]) for end in range(1, len(values) + 1)]


if __name__ == "__main__":
    main()
