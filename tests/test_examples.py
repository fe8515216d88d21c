"""The Python examples of README.md, docs/python.md and docs/scoring.md run as they stand; those of others, in their wings."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

from lmdist_export.serving import registry
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


def examples(page: str) -> list[str]:
    """The programs of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run(page: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the only program of a page prints."""
    (example,) = examples(page)
    exec(compile(example, page, "exec"), {})
    return capsys.readouterr().out.splitlines()


def test_the_readmes_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    text, figures = run("README.md", capsys)
    assert text.startswith("The president said")
    log_probability, _, next_words = figures.partition(" ")
    assert float(log_probability) < 0
    assert [0 < probability < 1 for _, probability in ast.literal_eval(next_words)] == [True] * 3


def test_the_example_on_scoring_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    lines = run("docs/scoring.md", capsys)
    assert len(lines) == 2, "a line for each sentence"
    for line in lines:
        log_probability, words, unknown = line.split()
        assert float(log_probability) < 0
        assert 0 < int(unknown) <= int(words)


@pytest.mark.slow
def test_the_page_on_python_runs_from_top_to_bottom(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], empty_store: Path
) -> None:
    monkeypatch.chdir(folder)
    # MLflow remembers a store by its address, and `mlflow.db` is another one in another folder.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, folder / 'mlflow.db')}")
    registry.register(folder / "bundle", "news", "champion")
    names: dict[str, object] = {}
    programs = examples("docs/python.md")
    assert len(programs) == 9
    printed = []
    for number, program in enumerate(programs):
        exec(compile(program, f"docs/python.md, program {number}", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith("The president said")
    assert printed[1].startswith("<lmdist model models:/news@champion: ")
    assert printed[3].startswith("The president said")
    assert len(printed[4].splitlines()) == 3
    assert printed[-1] == "temprature is no option of generation; did you mean temperature?\n"
