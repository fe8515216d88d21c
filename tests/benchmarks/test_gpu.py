"""benchmarks/gpu.py rehearsed on the CPU: every stage runs, and none keeps the next one from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
import gpu_stages

FAILING = "import sys; print('no GPU here', flush=True); sys.exit(3)"
HANGING = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('begun', flush=True); time.sleep(600)"


def run(out: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    """Run the command; return it and the results by stage."""
    command = [sys.executable, gpu.__file__, "--device=cpu", "--quick", "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.slow
def test_the_stages_run_on_a_cpu(tmp_path):
    one_test = "test_gradients_are_those_of_fp64_in_every_precision and adaptive and fp32"
    done, found = run(tmp_path, "--stages", "facts", "right", "fast", "good", "--only", one_test, "--minutes=90")
    assert done.returncode == 0, [done.stderr, found]
    assert {name: result["state"] for name, result in found.items()} == dict.fromkeys(
        ("facts", "right", "fast", "good"), "done"
    )
    rates = {row["case"]: row["value"] for row in found["facts"]["rows"] if row["unit"] == "TFLOP/s"}
    assert all(rate > 0 for rate in rates.values())
    assert len(rates) == 2
    assert found["right"]["summary"] == "1 passed"
    assert all(row["value"] > 0 and row["kernels"] for row in found["fast"]["rows"])
    valid, test = found["good"]["rows"]
    assert [seconds for seconds, _ in valid["curve"]] == sorted(seconds for seconds, _ in valid["curve"])
    assert valid["curve"][-1][1] < valid["curve"][0][1] < 1000  # a vocabulary of 1,000
    assert test["value"] < 1000


def test_a_stage_that_fails_hangs_or_lacks_a_package_leaves_the_next_its_time(tmp_path, monkeypatch, capsys):
    scripts = {"facts": FAILING, "fast": HANGING, "good": "print('fine')"}
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", scripts[json.loads(command[-1])["stage"]]], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    monkeypatch.setitem(gpu.PACKAGES, "sampling", ("torch", "no_such_package"))
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    stages = {"facts": 60, "fast": 1.5, "sampling": 60, "good": 60}
    monkeypatch.setattr(gpu, "SECONDS", stages)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: found[name]["state"] for name in stages} == {
        "facts": "failed",
        "fast": "out of time",
        "sampling": "left out",
        "good": "done",
    }
    assert found["facts"]["summary"] == "no GPU here"
    assert "not installed here: no_such_package" in found["sampling"]["summary"]
    assert capsys.readouterr().out.count("\n") == 4


@pytest.mark.parametrize(
    "line",
    [
        "tests/gpu/test_steps.py::test_a[weight drop-fp32] PASSED                 [ 12%]",
        "[gw3] [ 12%] PASSED tests/gpu/test_steps.py::test_a[weight drop-fp32] ",
        "tests/gpu/test_steps.py::test_a[weight drop-fp32] FAILED  [ 12%]",
    ],
)
def test_the_name_of_a_test_is_found_in_pytests_lines(line):
    assert gpu_stages.test_name(line) == "tests/gpu/test_steps.py::test_a[weight drop-fp32]"
