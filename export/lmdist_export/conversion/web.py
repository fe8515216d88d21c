"""`lmdist-export --layout web`: a static folder with the page of lmdist-serve, which needs no server: onnxruntime-web computes.

    index.html, page.js, ...    the page, from serving/page
    engine.js, engine/          what runs the model in a browser, from browser/: tokenizer, random numbers, generation
    model/                      model.json, the weights, the vocabulary, the tokenizer, and a graph for each choice of filters
    onnxruntime-web/            its two files, unless a public CDN has them

A bundle is written and compared with torch first, and these are its weights. The graphs that generate are those that lmdist's
own sampler builds: random numbers are their input, so a seed gives one text wherever it is. All of them have the nodes of
penalties, which change no bit where there are none. docs/browser.md is for users. This module knows no JavaScript.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from lmdist.errors import MissingInputError, UsageError
from lmdist.settings import LEARNED
from lmdist.storage.atomic import atomic_folder
from lmdist.storage.reading import as_json
from lmdist.text.data_folder import TEXT, VOCABULARY
from lmdist_export.bundle import STEP_GRAPH, WEIGHTS
from lmdist_export.conversion.exporting import HeldOutText, TrainedModel, check_held_out, write_bundle
from lmdist_export.graph.graphs import generation_graph
from lmdist_export.graph.network import Target
from lmdist_export.graph.sizes import Sizes
from lmdist_export.options import ATTEMPTS, EXPORTED, FILTERS, PARAMS, Features, Row, row_facts
from lmdist_export.serving.page_files import SERVER_ENGINE, page_files

FORMAT = "lmdist web"
VERSION = 1
ENGINE = Path(__file__).parent / "browser"
"""The file of the page that another takes the place of here: engine.js."""
MODEL_FOLDER, RUNTIME_FOLDER = "model", "onnxruntime-web"
ABOUT = "model.json"
STEP = "step.onnx"

TOKENIZERS = ("word_tokenize", "wordpunct", "whitespace", "characters", *LEARNED)
"""Those that engine/tokenizer.js and engine/pieces.js know: no pieces of a file, which may have any form."""
LEFT_OUT = {"cache_weight", "num_beams", "length_penalty", "n", "logprobs", "echo"}
"""Options that the engine does not have: the cache, beam search, and what shapes a list of results."""


class RuntimeFile(TypedDict):
    """A file of onnxruntime-web: where the page finds it, and what it must be."""

    address: str
    integrity: str
    bytes: int


class Runtime(NamedTuple):
    """The files of onnxruntime-web that a page needs: a module, and WebAssembly for CPUs."""

    script: RuntimeFile
    wasm: RuntimeFile


SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
CDN = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist"
ON_CDN = Runtime(
    RuntimeFile(
        address=f"{CDN}/{SCRIPT}",
        integrity="sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
        bytes=73_054,
    ),
    RuntimeFile(
        address=f"{CDN}/{WASM}",
        integrity="sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
        bytes=14_239_897,
    ),
)
"""onnxruntime-web on a CDN; the sums are those of the package's files in npm."""


def is_layout(folder: Path) -> bool:
    """Return whether a folder holds what this layout writes and nothing else, so that it can be replaced."""
    try:
        about = json.loads((folder / MODEL_FOLDER / ABOUT).read_bytes())
        names = set(os.listdir(folder))
    except (OSError, ValueError):
        return False
    is_ours = isinstance(about, dict) and about.get("format") == FORMAT
    return is_ours and names <= {*(file.name for file in copied()), *os.listdir(ENGINE), MODEL_FOLDER, RUNTIME_FOLDER}


def write(
    trained: TrainedModel,
    output: Path,
    held_out: HeldOutText | None,
    precision: str,
    max_loss_percent: float | None,
    onnxruntime_web: Path | None,
    *,
    replace: bool = False,
) -> dict[str, Any]:
    """Write the folder, atomically, if its model agrees with torch; return the manifest of the bundle that it was.

    Raises UsageError for a tokenizer that JavaScript does not have, and for a folder that is not onnxruntime-web's package.
    """
    if trained.tokenizer.settings.tokenizer not in TOKENIZERS:
        raise UsageError(
            f"--layout web: the text of this model was split by {trained.tokenizer.settings.tokenizer}, and the page knows "
            f"{', '.join(TOKENIZERS)} only"
        )
    check_held_out(held_out, precision)
    package = None if onnxruntime_web is None else package_files(onnxruntime_web)
    with atomic_folder(output, replace=replace) as folder:
        for file in copied():
            shutil.copyfile(file, folder / file.name)
        shutil.copytree(ENGINE, folder, dirs_exist_ok=True)
        if package is not None:
            (folder / RUNTIME_FOLDER).mkdir()
            for file in package:
                shutil.copyfile(file, folder / RUNTIME_FOLDER / file.name)
        model = folder / MODEL_FOLDER
        model.mkdir()
        manifest = write_bundle(trained, model, held_out, precision, max_loss_percent)
        (model / STEP_GRAPH).rename(model / STEP)
        for file in model.iterdir():
            if file.name not in (STEP, WEIGHTS, VOCABULARY, TEXT):
                file.unlink()
        sizes = Sizes(**manifest["sizes"])
        for name, features in feature_sets():
            graph = generation_graph(sizes, features, Target(WEIGHTS), trained.run).content
            (model / f"{name}.onnx").write_bytes(graph)
        runtime = ON_CDN if package is None else Runtime(*(described_file(file, f"{RUNTIME_FOLDER}/") for file in package))
        about = {
            "format": FORMAT,
            "version": VERSION,
            "name": trained.run,
            "step": trained.step,
            "sizes": manifest["sizes"],
            "padded": sizes.padded,
            "attempts": ATTEMPTS,
            "options": [described(row) for row in PARAMS.values() if row.name not in LEFT_OUT],
            "generation": dataclasses.asdict(EXPORTED),
            "files": {file.name: described_file(file) for file in sorted(model.iterdir())},
            "runtime": runtime._asdict(),
        }
        (model / ABOUT).write_text(as_json(about), encoding="utf-8", newline="\n")
        return manifest


def copied() -> list[Path]:
    """Return the files of the page that it has without a server too."""
    return [file for file in page_files() if file.name != SERVER_ENGINE]


def feature_sets() -> Iterator[tuple[str, Features]]:
    """Yield the name of each graph that generates and what it can do: greedy, or any choice of filters."""
    yield "generate-greedy", Features(greedy=True, adjusted=True)
    for count in range(len(FILTERS) + 1):
        for names in combinations(FILTERS, count):
            yield "-".join(["generate", *names]), Features(adjusted=True, **dict.fromkeys(names, True))


def described(row: Row) -> dict[str, Any]:
    """Return a row of the table of options as JSON, and what its bounds are in words."""
    if row.bounds is None:
        return row_facts(row)
    return row_facts(row) | {
        "bounds": str(row.bounds),
        "includes_minimum": row.bounds.includes_low,
        "includes_maximum": row.bounds.includes_high,
    }


def described_file(path: Path, folder: str = "") -> RuntimeFile:
    """Return the address of a file in a folder of the page, its length, and its sum as a browser checks it."""
    content = path.read_bytes()
    digest = base64.b64encode(hashlib.sha384(content).digest()).decode()
    return RuntimeFile(address=f"{folder}{path.name}", integrity=f"sha384-{digest}", bytes=len(content))


def package_files(package: Path) -> list[Path]:
    """Return the two files of onnxruntime-web's package; raises MissingInputError, or UsageError for another folder."""
    if not package.is_dir():
        raise MissingInputError(f"--onnxruntime-web {package} is no folder; npm install onnxruntime-web makes one")
    files = [package / "dist" / name for name in (SCRIPT, WASM)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UsageError(
            f"--onnxruntime-web {package} has no dist/{missing[0]}: the folder of npm's package is expected, as "
            "node_modules/onnxruntime-web"
        )
    return files


def rows_of(output: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the table of what was written, and of how it is looked at."""
    weights = manifest["files"][WEIGHTS]["bytes"] / 1e6
    runtime = f"in {RUNTIME_FOLDER}/" if (output / RUNTIME_FOLDER).is_dir() else f"from {CDN}"
    return {
        "page": f"{output}  (weights of {weights:,.1f} MB, {manifest['sizes']['precision']})",
        "created from": f"{manifest['run']}, step {manifest['step']:,}",
        "onnxruntime": runtime,
        "next": f"python -m http.server -d {output} 8000, then http://localhost:8000",
    }
