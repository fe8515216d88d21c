"""The picture of a run's losses, plotted from metrics.jsonl. It knows nothing of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.storage.atomic import atomic_path
from lmdist.tracking.run_folder import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKED = [step * 10**power for power in range(7) for step in (1, 2, 5)]
"""The perplexities that an axis may name."""
BESIDE = 1.2
"""Where the second axis of perplexity stands, in widths of the picture: right of the numbers of the first."""
NO_DIFFERENCE = 0.005
"""Between tokens and words of a text, below which their perplexities need no axis each."""


def plot_losses(metrics: Path, picture: Path) -> None:
    """Plot training and validation loss over the steps as a PNG, with perplexity per token on the right-hand axis.

    Where words and tokens of the text are not the same, a second one has the perplexity per word of the original text, of the
    validation, which compares between tokenizers.
    """
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
    tokens = tokens_per_word(rows)
    compares = abs(tokens - 1) > NO_DIFFERENCE
    add_perplexity(axes, "perplexity per token" if compares else "perplexity", 1.0)
    if compares:
        add_perplexity(axes, "perplexity per word (validation)", tokens, BESIDE)
    try:
        with atomic_path(picture) as temporary:  # which replaces a link and does not follow it
            figure.savefig(temporary, dpi=110, format="png")
    finally:
        pyplot.close(figure)  # also where the disk is full, or each try would leave one in memory


def tokens_per_word(rows: Sequence[dict[str, Any]]) -> float:
    """Return how many tokens the validation's text has for each word, as its figures tell it; 1 where they do not."""
    for row in reversed(rows):
        loss, per_word = row.get("valid/loss", 0), row.get("valid/perplexity_per_word", 0)
        if loss > 0 and per_word > 1:
            return math.log(per_word) / loss
    return 1.0


def add_perplexity(axes: Axes, label: str, tokens: float, place: float = 1.0) -> None:
    """Add an axis on the right with the perplexity of so many tokens together."""
    low, high = axes.get_ylim()
    right = axes.twinx()
    right.set_ylim(low, high)
    right.spines["right"].set_position(("axes", place))
    shown = [perplexity for perplexity in MARKED if low <= math.log(perplexity) / tokens <= high]
    right.set_yticks([math.log(perplexity) / tokens for perplexity in shown], [f"{perplexity:,}" for perplexity in shown])
    right.set_ylabel(label)
