"""The Python examples of the README and of the page on scoring run as they stand. (Those of other pages run in their wings.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.small_bundles import PLAIN_WORDS, UNTIED, make_bundle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    bundle = make_bundle(folder, UNTIED, "whitespace", PLAIN_WORDS)
    (folder / "bundles").mkdir()
    for name in ("news", "demo"):
        (folder / "bundles" / name).symlink_to(bundle)
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/scoring.md"])
def test_an_example_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, page, "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "a line for each sentence"
    for line in lines:
        log_probability, words, unknown = line.split()
        assert float(log_probability) < 0
        assert 0 < int(unknown) <= int(words)
