"""The JavaScript of `--layout web` in Node, and the npm packages that it runs with, where this machine has them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "export" / "lmdist_export" / "conversion" / "browser"
NODE = shutil.which("node")
MODULES = Path(os.environ.get("LMDIST_NODE_MODULES", ROOT / "node_modules")).resolve()
"""Where npm has put packages: `npm install onnxruntime-web onnxruntime-node`, anywhere."""

needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def needs_package(name: str) -> pytest.MarkDecorator:
    """Skip where Node or an npm package is missing."""
    return pytest.mark.skipif(
        NODE is None or not (MODULES / name).is_dir(), reason=f"node, or {name} in LMDIST_NODE_MODULES, is not installed"
    )


class Engine:
    """A process of Node that calls functions of the engine."""

    def __init__(self) -> None:
        command = [str(NODE), str(Path(__file__).with_suffix(".mjs")), str(ENGINE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate(timeout=30)

    def call(self, name: str, *given: Any) -> Any:
        """What a function returns; a JavaScript error is a RuntimeError."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{json.dumps([name, *given])}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]
