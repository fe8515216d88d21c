"""The picture of a run's losses, plotted from metrics.jsonl. It knows nothing of training."""

from __future__ import annotations

import math
from pathlib import Path

from lmdist.storage.atomic import atomic_path
from lmdist.tracking.run_folder import read_metrics


def plot_losses(metrics: Path, picture: Path) -> None:
    """Plot training and validation loss over the steps, with perplexity on the right-hand axis, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("train/loss", "training", "-"), ("valid/loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.3)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_title(f"Loss of {metrics.parent.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    low, high = axes.get_ylim()
    right = axes.twinx()
    right.set_ylim(low, high)
    ticks = [p for p in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if low <= math.log(p) <= high]
    right.set_yticks([math.log(p) for p in ticks], [f"{p:,}" for p in ticks])
    right.set_ylabel("perplexity")
    try:
        with atomic_path(picture) as temporary:  # which replaces a link and does not follow it
            figure.savefig(temporary, dpi=110, format="png")
    finally:
        pyplot.close(figure)  # also where the disk is full, or each try would leave one in memory
