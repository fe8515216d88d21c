"""The model of benchmarks/scaling.py: its formulas by hand, and its fits on measurements that it made up itself."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("scaling_model")


def test_a_ring_sends_each_part_twice_round(model):
    ring = model.Ring(bandwidth=1e9, latency=1e-3)
    assert ring.seconds(1, 8e9) == 0
    assert ring.seconds(2, 8e9) == pytest.approx(2 * (4 + 1e-3))
    assert ring.seconds(4, 8e9) == pytest.approx(6 * (2 + 1e-3))


def test_the_embeddings_gradient_hides_behind_nothing(model):
    ring = model.Ring(bandwidth=1e9, latency=0)
    step = model.Step(compute=10, backward=6, early=4e9, late=1e9)
    assert step.seconds(1, ring, 0) == 10
    assert step.seconds(2, ring, 0) == pytest.approx(10 + 4 + 1)
    assert step.seconds(2, ring, 0.5) == pytest.approx(10 + 1 + 1)
    assert step.seconds(2, ring, 1) == pytest.approx(10 + 1)


@pytest.mark.parametrize("latency", [0.0, 3e-4])
def test_the_fits_find_what_the_measurements_were_made_of(model, latency):
    ring = model.Ring(bandwidth=6e8, latency=latency)
    sizes = [(ranks, size) for ranks in (2, 4) for size in (1e7, 1e6, 1e5, 1e4)]
    found = model.fit_ring((ranks, size, ring.seconds(ranks, size)) for ranks, size in sizes)
    assert found.bandwidth == pytest.approx(ring.bandwidth)
    assert found.latency == pytest.approx(ring.latency, abs=1e-9)
    steps = [model.Step(0.3, 0.1, early, 1e7) for early in (1e8, 2e8)]
    assert model.fit_overlap([(step, 4, step.seconds(4, ring, 0.37)) for step in steps], ring) == 0.37


def test_large_messages_alone_never_show_a_negative_latency(model):
    found = model.fit_ring([(2, 1e8, 1.0), (2, 2e8, 2.1)])
    assert found.latency == 0
    assert found.bandwidth == pytest.approx(1e8, rel=0.06)


def test_rows_are_fitted_predicted_and_drawn(model, tmp_path):
    ring, step = model.Ring(1e9, 1e-4), model.Step(0.1, 0.04, 3e7, 1e7)
    rows = [
        {
            **model.bare("step", "some model", f"{ranks} ranks", 1e3 * step.seconds(ranks, ring, 0.5), "ms a step"),
            **{"ranks": ranks, "compute_ms": 100.0, "backward_ms": 40.0, "reduced_mb": 40.0, "late_mb": 10.0},
        }
        for ranks in (1, 2, 4)
    ]
    for size in (40_000_000, 40_000):
        made = model.bare("all-reduce", "some model", f"{size} bytes", 1e3 * ring.seconds(2, size), "ms")
        rows.append({**made, "ranks": 2, "bytes": size})
    fitted = {row["variant"]: row["value"] for row in model.fit(rows)}
    assert fitted == {
        **{"bandwidth": 1.0, "latency": 100.0, "overlap": 0.5},
        **{"all-reduces: largest error": 0.0, "steps: largest error": 0.0},
    }
    predictions = model.predict(rows, {"slow": (1.0, 100.0)}, step_ms=None)
    (curve,) = [row for row in predictions if row["kind"] == "prediction"]
    none, whole = curve["curves"]
    assert none[0] == whole[0] == 1
    assert none[2] == pytest.approx(0.1 / step.seconds(4, ring, 0), abs=1e-4)
    assert all(less <= more for less, more in zip(none, whole, strict=True))
    model.draw(predictions, tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    for row in predictions:
        if row["kind"] == "assumption":
            assert row["variant"] in text


@pytest.mark.slow
def test_two_ranks_measure_themselves(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / "scaling.py", "--quick", "--rounds=1", "--ranks=1,2", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())
    assert [row["variant"] for row in rows if row["kind"] == "step"] == ["baseline: 1 rank", "2 ranks, weak", "2 ranks, strong"]
    assert {row["kind"] for row in rows} == {"step", "all-reduce", "gradients", "fit", "assumption", "prediction"}
