"""What the pages say is so: the README's table, its links, its flags."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/multi-node.md", "benchmarks/results/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_the_readme_has_the_committed_figures():
    before = (ROOT / "README.md").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "README.md").stat().st_mtime_ns == before, "--check has written the page"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


def test_the_readme_names_every_command_and_only_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    # torchrun's, mlflow's and pip's
    helps = {"--standalone", "--backend-store-uri", "--env-manager", "--port", "--no-deps", "--index-url"}
    modules = re.findall(r'^lmdist-\w+ = "([\w.]+):main"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(modules) == 8
    for module in modules:
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        helps.update(re.findall(r"--[\w.-]+", done.stdout))
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w.-]*\w)", text):
        assert flag in helps, flag


def test_commands_of_the_package_are_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for command in re.findall(r"^(lmdist-\w+) =", (ROOT / "pyproject.toml").read_text(), re.MULTILINE):
        assert command in text
