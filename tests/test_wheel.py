"""The wheel has all that a checkout has but the tests: code, pages, and the recipes by their names."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs, without an index or a network."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def test_it_has_every_file_of_the_packages_and_every_recipe(installed: Path) -> None:
    sources = {ROOT: ["lmdist"], ROOT / "export": ["lmdist_export"]}
    for root, packages in sources.items():
        for package in packages:
            files = {path.relative_to(root) for path in (root / package).rglob("*") if path.is_file()}
            missing = {path for path in files if "__pycache__" not in path.parts and not (installed / path).is_file()}
            assert not missing
    recipes = {path.name for path in (ROOT / "launch").glob("*.toml")}
    assert {path.name for path in (installed / "lmdist" / "recipes").iterdir()} == recipes
    assert not (installed / "launch").exists()


def test_its_recipes_are_known_by_their_names(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmdist.train", "--config", "tutorial", "--print_config"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert 'run_folder = "runs/tutorial"' in done.stdout
    done = subprocess.run([*command[:3], "--config", "nothing"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 66
    assert "lmdist has demo, finetune, " in done.stderr
