"""benchmarks/pieces.py: the time of a step is running time, and the rows have what the page's table shows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pieces
import quality
import readme


def test_a_step_takes_the_time_that_its_training_ran(tmp_path):
    trial = quality.System("words", [], tmp_path / "metrics.jsonl", tmp_path / "log")
    trial.spans = [(100.0, 110.0), (200.0, 210.0)]
    times = {10: 103.0, 20: 108.0, 30: 201.0, 40: 205.0, 50: 207.0, 60: 209.0}
    rows = [{"step": step, "time": time, "train/loss": 1.0} for step, time in times.items()]
    trial.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert quality.step_seconds(trial) == pytest.approx(8.0 / 30), "from step 30 to step 60"
    trial.spans = [(100.0, 110.0), (200.0, 203.0), (300.0, 306.0)]
    trial.metrics.write_text(
        "".join(f"{json.dumps(row | {'time': 302.0 if row['step'] == 60 else row['time']})}\n" for row in rows)
    )
    assert quality.step_seconds(trial) == pytest.approx(4.0 / 30)


@pytest.mark.slow
def test_words_and_pieces_are_trained_for_the_same_time(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    done = subprocess.run([sys.executable, pieces.__file__, "--quick", "--json", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    words, *others = rows = json.loads(file.read_text())
    assert [row["variant"] for row in rows] == ["baseline", "300 unigram"]
    assert words["ratio"] == 1
    for row in rows:
        assert row["value"] == pytest.approx(row["perplexity"] ** row["tokens_per_word"], rel=1e-3)
    assert all(row["unknown_rate"] == 0 for row in others)
    monkeypatch.setattr(readme, "results", lambda machine, benchmark: [rows])
    assert readme.pieces(readme.Machine("cpu2-amx")).count("\n| ") == 2 + len(rows)
