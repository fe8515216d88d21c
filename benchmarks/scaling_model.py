"""A model of a data-parallel step, fitted to the rows that scaling.py measures, and its predictions for more ranks.

    step(W)       = compute + exposed(W)
    exposed(W)    = max(0, all_reduce(W, early) - overlap * backward) + all_reduce(W, late)
    all_reduce(W) = 2 (W - 1) / W * bytes / bandwidth + 2 (W - 1) * latency         a ring: Patarasuk and Yuan 2009

DDP sends a gradient as soon as the backward pass has computed it. The embedding's is complete at the end of the backward pass
(`late`), and with tied weights the projection's, which is the same; all others (`early`) can be sent during the backward pass.
Without ties only the rows that some rank has read are reduced. Their number grows with the ranks, and is computed for tokens
by Zipf's law.
This module uses no torch and starts no ranks: it reads rows. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

NETWORKS = {"10 Gbit/s": (1.25, 50.0), "25 Gbit/s": (3.125, 30.0), "100 Gbit/s": (12.5, 10.0)}
"""GB/s each way and us per message."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
OVERLAPS = (0.0, 1.0)


@dataclass(frozen=True)
class Ring:
    """A network over which ranks all-reduce their gradients."""

    bandwidth: float
    """Bytes per second."""
    latency: float
    """Seconds per message."""

    def seconds(self, ranks: int, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes: 2 (W - 1) messages of a W-th of it, one after the other."""
        return 2 * (ranks - 1) * (size / ranks / self.bandwidth + self.latency)


@dataclass(frozen=True)
class Step:
    """What determines the time of a step."""

    compute: float
    backward: float
    early: float
    late: float

    def seconds(self, ranks: int, ring: Ring, overlap: float) -> float:
        """Return the seconds of a step; `overlap` is the share of the backward pass in which gradients are sent."""
        early = max(0.0, ring.seconds(ranks, self.early) - overlap * self.backward)
        return self.compute + early + ring.seconds(ranks, self.late)


def fit_ring(samples: Iterable[tuple[int, float, float]]) -> Ring:
    """Return the ring that fits all-reduces of (ranks, bytes, seconds) by least squares of the relative errors."""
    ranks, size, seconds = np.array(list(samples), dtype=float).T
    parts = np.stack([size / ranks, np.ones_like(size)], axis=1) * (2 * (ranks - 1) / seconds)[:, None]
    per_byte, latency = np.linalg.lstsq(parts, np.ones_like(size))[0]
    if latency < 0:  # all messages are large, and show only the bandwidth
        per_byte, latency = np.linalg.lstsq(parts[:, :1], np.ones_like(size))[0][0], 0.0
    return Ring(1 / float(per_byte), float(latency))


def fit_overlap(samples: Sequence[tuple[Step, int, float]], ring: Ring) -> float:
    """Return the overlap, in hundredths, that fits (step, ranks, seconds) by least squares of the relative errors."""

    def error(overlap: float) -> float:
        return sum((step.seconds(ranks, ring, overlap) / seconds - 1) ** 2 for step, ranks, seconds in samples)

    return min((hundredth / 100 for hundredth in range(101)), key=error)


def frequencies(vocabulary_size: int) -> np.ndarray:
    """Return the probability of each token by Zipf's law, (V)."""
    weights = 1 / np.arange(1, vocabulary_size + 1)
    return weights / weights.sum()


def rows_read(vocabulary_size: int, num_tokens: int) -> float:
    """Return how many different tokens are expected among `num_tokens` that are sampled by Zipf's law."""
    return float((1 - (1 - frequencies(vocabulary_size)) ** num_tokens).sum())


def step_of(row: Row, ranks: int, compute_ms: float | None = None, *, all_rows: bool = False) -> Step:
    """Return the step of a measured row if so many `ranks` read its batch each; `all_rows` reduces an untied embedding's too.

    With another compute time the backward pass keeps its share of it.
    """
    factor = compute_ms / row["compute_ms"] if compute_ms else 1.0
    vocabulary_size = row["vocabulary_size"]
    rows = vocabulary_size if row["tied"] or all_rows else rows_read(vocabulary_size, ranks * row["tokens"])
    early, late = row["early_mb"] * 1e6, rows * row["row_bytes"]
    return Step(factor * row["compute_ms"] / 1e3, factor * row["backward_ms"] / 1e3, early, late)


def fit(measured: Sequence[Row]) -> list[Row]:
    """Return the rows of the fit and its errors; add the prediction to each measured row of several ranks."""
    messages = [row for row in measured if row["kind"] == "all-reduce"]
    steps = [row for row in measured if row["kind"] == "step" and row["ranks"] > 1]
    if not steps:
        return []
    ring = fit_ring((row["ranks"], row["bytes"], row["value"] / 1e3) for row in messages)
    overlap = fit_overlap([(step_of(row, row["ranks"]), row["ranks"], row["value"] / 1e3) for row in steps], ring)
    for row in messages:
        row["predicted_ms"] = round(1e3 * ring.seconds(row["ranks"], row["bytes"]), 4)
    for row in steps:
        row["predicted_ms"] = round(1e3 * step_of(row, row["ranks"]).seconds(row["ranks"], ring, overlap), 2)
    return [
        bare("fit", "fit", "bandwidth", round(ring.bandwidth / 1e9, 3), "GB/s"),
        bare("fit", "fit", "latency", round(ring.latency * 1e6, 1), "us"),
        bare("fit", "fit", "overlap", overlap, "of the backward"),
        bare("fit", "fit", "all-reduces: largest error", largest_error(messages), "of the measured time"),
        bare("fit", "fit", "steps: largest error", largest_error(steps), "of the measured time"),
    ]


def largest_error(rows: Sequence[Row]) -> float:
    """Return the largest error of a prediction of measured rows, relative to the measurement."""
    return round(max(abs(row["predicted_ms"] / row["value"] - 1) for row in rows), 3)


def predict(measured: Sequence[Row], networks: dict[str, tuple[float, float]], step_ms: float | None) -> list[Row]:
    """Return the rows of the assumptions, and of the efficiency of weak scaling on each network for each measured model.

    `networks` are in GB/s and us; the compute time of a step is the one measured on one rank, or `step_ms`.
    """
    alone = [row for row in measured if row["kind"] == "step" and row["ranks"] == 1]
    compute = f"{step_ms:g} ms, a guess" if step_ms else "as measured on one rank of this machine"
    assumed = {
        "compute time of a step": f"{compute}; the same on all ranks, and on any number of them",
        "backward": "has the share of the compute time that it had on one rank of this machine",
        "overlap": "not known before it is measured on the machine: a line for none, and one for gradients that travel during "
        "all of the backward",
        **{name: f"{bandwidth:g} GB/s each way, {latency:g} us a message" for name, (bandwidth, latency) in networks.items()},
        "tokens": "by Zipf's law; they decide how many rows of an untied embedding are reduced",
        "all-reduce": "one flat ring with links of one kind between all GPUs, two all-reduces a step (early and late "
        "gradients); NCCL has other ways too and takes the fastest",
        "not in it": "input, validation, checkpoints, logging, ranks slower than others, other traffic on the network",
    }
    rows = [{**bare("assumption", "assumption", name, None, ""), "note": note} for name, note in assumed.items()]
    for row in alone:
        for (name, (bandwidth, latency)), all_rows in product(networks.items(), [False] if row["tied"] else [False, True]):
            ring = Ring(bandwidth * 1e9, latency / 1e6)
            steps = [step_of(row, ranks, step_ms, all_rows=all_rows) for ranks in RANKS]
            curves = [
                [round(step.compute / step.seconds(ranks, ring, overlap), 4) for step, ranks in zip(steps, RANKS, strict=True)]
                for overlap in OVERLAPS
            ]
            variant = f"{name}, {RANKS[-1]} ranks{', all rows' if all_rows else ''}"
            efficiency = bare("prediction", row["case"], variant, curves[0][-1], "weak-scaling efficiency")
            found = {"network": name, "all_rows": all_rows, "compute_ms": step_ms or row["compute_ms"]}
            rows.append({**efficiency, **found, "ranks": RANKS, "curves": curves})
    return rows


def bare(kind: str, case: str, variant: str, value: float | None, unit: str) -> Row:
    """Return a row without the columns of a measurement."""
    return {
        **{"kind": kind, "case": case, "variant": variant, "value": value, "unit": unit},
        **{"spread": None, "ratio": None, "peak_mib": None},
    }


def plot(rows: Sequence[Row], picture: Path) -> None:
    """Plot the predictions, one panel per model and one band per network, above the assumptions."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scaling"  # the same rows give the same file
    from matplotlib import pyplot

    predictions = [row for row in rows if row["kind"] == "prediction" and not row["all_rows"]]
    assumed = [f"{row['variant']}: {row['note']}" for row in rows if row["kind"] == "assumption"]
    cases = list(dict.fromkeys(row["case"] for row in predictions))
    figure, panels = pyplot.subplots(1, len(cases), figsize=(12, 5.4), sharey=True, squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        here = [row for row in predictions if row["case"] == case]
        for number, row in enumerate(here):
            without, full = row["curves"]
            axes.fill_between(row["ranks"], without, full, color=f"C{number}", alpha=0.2, linewidth=0)
            axes.plot(row["ranks"], without, color=f"C{number}", label=row["network"])
            axes.plot(row["ranks"], full, color=f"C{number}", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(here[0]["ranks"], [str(ranks) for ranks in here[0]["ranks"]])
        axes.set_ylim(0, 1.02)
        axes.set_title(f"{case}\n{here[0]['compute_ms']:,.4g} ms of computation a step", fontsize=9)
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("efficiency")
    panels[0][0].legend(loc="lower left", fontsize=8)
    figure.suptitle(
        "Predicted, not measured: weak scaling (solid: nothing overlaps; dotted: all of the backward does)", fontsize=11
    )
    figure.text(0.01, 0.01, "Assumed\n" + "\n".join(assumed), fontsize=7.5, va="bottom")
    figure.tight_layout(rect=(0, 0.025 * (len(assumed) + 2), 1, 1))
    figure.savefig(picture, dpi=110, metadata={"Date": None} if picture.suffix == ".svg" else None)
    pyplot.close(figure)
