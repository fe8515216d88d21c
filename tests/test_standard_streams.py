"""Every command ends well, whatever its stdout and stderr are: closed, full, without a reader, not in UTF-8."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.small_bundles import make_run

COMMANDS = (
    "lmdist.text.prepare",
    "lmdist.text.demo",
    "lmdist.tracking.sync",
    "lmdist.training.evaluate",
    "lmdist.job.launcher",
    "lmdist_export.export",
    "lmdist_export.generate",
    "lmdist_export.score",
)
FULL = "error: stdout cannot be written: No space left on device\n"
SCRIPT = """if True:
    import sys
    from lmdist.command_line import exit_on_error
    with exit_on_error("made-up", ends_with_reader={}):
        for number in range(20_000):
            sys.stdout.write(f"\\u4e2d {{number}}\\n")
        with open("worked", "w"):
            pass
"""


def shell(command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash; its exit code is that of the first program that fails in a pipeline."""
    bash = ["bash", "-c", f"set -o pipefail; {command}"]
    environment = {**os.environ, **variables}
    return subprocess.run(bash, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_no_traceback_wherever_it_goes(module, tmp_path):
    shown = f"{sys.executable} -m {module} --help"
    done = shell(f"{shown} | true; echo $?; {shown} >/dev/full; echo $?; {shown} >&-; echo $?", tmp_path)
    assert (done.stdout.split(), done.stderr) == (["0"] * 3, "")


@pytest.mark.parametrize("ends_with_reader", [False, True])
def test_a_reader_that_has_read_enough_ends_what_is_for_it_and_no_other_work(ends_with_reader, tmp_path):
    """20,000 lines are more than a pipe holds."""
    command = shlex.join([sys.executable, "-c", SCRIPT.format(ends_with_reader)])
    done = shell(f"{command} | head -1", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "中 0\n", "")
    assert (tmp_path / "worked").exists() is not ends_with_reader


def test_a_full_disk_under_the_results_is_one_line_after_the_work(tmp_path):
    command = shlex.join([sys.executable, "-c", SCRIPT.format(False)])
    done = shell(f"{command} >/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (65, f"made-up: {FULL}")
    assert (tmp_path / "worked").exists()
    assert shell(f"{command} >/dev/full 2>&1", tmp_path).returncode == 65
    assert shell(f"{command} >&- 2>&- <&-", tmp_path).returncode == 0


def test_results_are_in_utf_8_whatever_the_machine_has(tmp_path):
    command = shlex.join([sys.executable, "-c", SCRIPT.format(True)])
    for variables in ({"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        done = shell(command, tmp_path, **variables)
        assert done.stdout.startswith("中 0\n中 1\n"), done.stderr


@pytest.mark.slow
def test_real_results_on_a_full_disk_are_one_line(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"the cat saw {number} dogs\n" for number in range(20)))
    python = f"{sys.executable} -m"
    prepared = shell(f"{python} lmdist.text.prepare text.txt -o prepared --tokenizer whitespace >/dev/full", tmp_path)
    exported = shell(f"{python} lmdist_export.export {run} -o bundle >/dev/full", tmp_path)
    assert (tmp_path / "prepared/meta.json").exists()
    assert (tmp_path / "bundle/manifest.json").exists()
    generated = shell(f"{python} lmdist_export.generate bundle --seed 1 --prompt the >/dev/full", tmp_path)
    scored = shell(f"{python} lmdist_export.score bundle text.txt >/dev/full", tmp_path)
    measured = shell(f"{python} lmdist.training.evaluate {run} --split valid --json >/dev/full", tmp_path)
    for done in (prepared, exported, generated, scored, measured):
        assert done.returncode == 65, done.stderr
        assert done.stderr.endswith(FULL)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_request_to_stop_is_one_line_and_leaves_nothing_half(number, tmp_path):
    """As lmdist-export in a pod: the file that is being written goes, and the exit code says that it may be run again."""
    script = """if True:
        import time
        from pathlib import Path
        from lmdist.command_line import exit_on_error
        from lmdist.storage.atomic import atomic_folder
        with exit_on_error("made-up"), atomic_folder(Path("out"), replace=False) as folder:
            (folder / "half").touch()
            time.sleep(60)
    """
    job = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out*/half")):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(number)
    _, stderr = job.communicate(timeout=60)
    assert (job.returncode, stderr) == (75, "made-up: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_used_is_one_line_and_a_defect_keeps_its_traceback(tmp_path):
    for raised, code, line in (
        ("open('no/such')", 65, "made-up: error: no/such: No such file or directory"),
        ("open('/dev/full', 'w', buffering=1).write('a line\\n')", 65, "made-up: error: No space left on device"),
        ("raise ConnectionResetError(104, 'reset')", 1, "ConnectionResetError: [Errno 104] reset"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ):
        script = f"from lmdist.command_line import exit_on_error\nwith exit_on_error('made-up'): {raised}"
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (code, line)
        assert ("Traceback" in done.stderr) is (code == 1)
