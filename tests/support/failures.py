"""How a command fails in this process: its exit code and what it writes to stderr."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Main = Callable[[list[str]], None]


def only_line(main: Main, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int | str | None, str]:
    """Run a failing command; return its exit code and the only line that it writes."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    return stop.value.code, output.err


def last_line(main: Main, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a failing command; return its exit code and the last line of stderr, which holds no traceback."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stop.value.code, error.splitlines()[-1]
