"""Log lines, tables and progress, with a terminal and without."""

import subprocess
import sys

from lmdist.console import ProgressBar, duration, log, table


def test_a_table_is_aligned_after_its_longest_name():
    assert table({"run": "runs/a", "perplexity": 1.5}) == "run         runs/a\nperplexity  1.5\n"
    assert table({"run": 1}, width=10) == "run       1\n"


def test_log_lines_go_to_stderr(capsys):
    log("reading", "lmdist-score")
    log("reading")
    assert capsys.readouterr() == ("", "lmdist-score: reading\nreading\n")


def test_without_a_terminal_progress_is_lines_and_some_of_them_only(capsys):
    with ProgressBar(10, "step") as progress, ProgressBar(10, "step", silent=True) as silent:
        for step in (1, 2):
            progress.update(step)
            progress.show("loss 3", f"step {step}/10  loss 3")
            silent.show("loss 3", f"step {step}/10  loss 3")
    with ProgressBar(10, "step", seconds_between_lines=60) as seldom:
        seldom.show("", "too early")
        seldom.log("but this")
    assert capsys.readouterr().err.splitlines() == ["step 1/10  loss 3", "step 2/10  loss 3", "but this"]


def test_a_terminal_gets_a_bar_with_the_figures(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with ProgressBar(10, "step", done=2) as progress:
        progress.show("loss 3", "never a line of its own")
        progress.update(7)
        progress.log("a line")
    shown = capsys.readouterr().err
    assert "7/10" in shown
    assert "loss 3" in shown
    assert "a line\n" in shown
    assert "never" not in shown


def test_a_terminal_without_tqdm_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with ProgressBar(10, "step") as progress:
        progress.update(1)
        progress.show("loss 3", "step 1/10  loss 3")
    assert capsys.readouterr().err == "step 1/10  loss 3\n"


def test_importing_the_console_imports_no_tqdm():
    code = "import sys, lmdist.console; assert 'tqdm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_durations():
    assert [duration(seconds) for seconds in (59.4, 125, 11_220)] == ["59s", "2m05s", "3h07m"]
