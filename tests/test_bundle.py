"""Reading a bundle, and docs/bundle.md against the files that lmdist-export writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from lmdist.errors import DataError, MissingInputError
from lmdist_export.bundle import GENERATION_GRAPH, STEP_GRAPH, WEIGHTS, Bundle
from support.onnx_models import described, metadata_of
from support.small_bundles import (
    WORDS,
    edit_json,
    make_bundle,
)

PADDED = 256  # of the vocabulary


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_a_changed_file_is_rejected(bundle: Path, tmp_path: Path) -> None:
    for name in (STEP_GRAPH, GENERATION_GRAPH, WEIGHTS, "vocab.txt", "text.json"):
        copy = shutil.copytree(bundle, tmp_path / name)
        with (copy / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(DataError, match=f"{name} is damaged"):
            Bundle.load(copy)
        (copy / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing"):
            Bundle.load(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 1}, "version 1; this lmdist reads 'lmdist bundle', version 2"),
        ({"format": "a cake"}, "'a cake'"),
        ({"format": "lmdist checkpoint"}, "lmdist-export"),
        ({"files": {}}, "names no sha256 for its model.onnx"),
        ({"files": None}, "files is None; an object is expected"),
        ({"files": {"model.onnx": {}}}, r"files\.'model\.onnx'\.bytes is missing"),
    ],
)
def test_a_changed_manifest_is_rejected(bundle: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_json(copy / "manifest.json", **values)
    with pytest.raises(DataError, match=message):
        Bundle.load(copy)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        Bundle.load(tmp_path / "none")
    with pytest.raises(MissingInputError, match="is not a bundle"):
        Bundle.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        Bundle.load(tmp_path)


def test_generation_config_may_be_edited(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    values: dict[str, Any] = {"temperature": 1, "top_k": 5, "suppress_tokens": [], "bad_words_ids": [[3, 4], [5]]}
    edit_json(copy / "generation_config.json", **values, sequence_bias=[[[5], 1.5], [[6], -2]])
    found = Bundle.load(copy).generation
    assert (found.temperature, found.top_k, found.suppress_tokens) == (1, 5, ())
    assert (list(found.bad_words_ids), [tuple(pair) for pair in found.sequence_bias]) == (
        [[3, 4], [5]],
        [([5], 1.5), ([6], -2)],
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatur": 1.0}, "'temperatur' is not known here; known are .*temperature"),
        ({"temperature": "hot"}, "temperature is 'hot'; a number"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be"),
        ({"top_k": 1.5}, "top_k is 1.5; an integer"),
        ({"top_p": 0}, "top_p is 0; it must be"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 10**9}, "max_new_tokens is 1000000000; it must be at most 1,000,000"),
        ({"suppress_tokens": 0}, "suppress_tokens is 0; a list"),
        ({"suppress_tokens": [99]}, "99 is not the id of a token"),
        ({"suppress_tokens": ["<unk>"]}, r"suppress_tokens\[0\] is '<unk>'; an integer"),
        ({"suppress_tokens": list(range(len(WORDS) + 2))}, "leaves no token"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0"),
        ({"typical_p": 0.0}, "typical_p is 0.0; it must be above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be from 1e-06"),
        ({"repetition_penalty": 1e-7}, "repetition_penalty is 1e-07; it must be from 1e-06 to 1,000,000"),
        ({"presence_penalty": 1e7}, "presence_penalty is 10000000.0; it must be from -1,000,000 to 1,000,000"),
        ({"frequency_penalty": -1e18}, "it must be from -1,000,000 to 1,000,000"),
        ({"sequence_bias": [[[5], 1e7]]}, "it must be tokens and numbers, at most 1,000,000"),
        ({"min_new_tokens": 201}, "min_new_tokens is 201; it must be from 0 to max_new_tokens, 200"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 10**9}, "num_beams is 1000000000; it must be from 1"),
        ({"bad_words_ids": [[5], []]}, "sequences of at least one token"),
        ({"bad_words_ids": [5]}, r"bad_words_ids\[0\] is 5; a list"),
        ({"bad_words_ids": [[5, 99]]}, "99 is not the id of a token"),
        ({"sequence_bias": [[[5, 6], 1.0]]}, "tokens one by one"),
        ({"sequence_bias": [[[5], "much"]]}, r"sequence_bias\[0\]\[1\] is 'much'; a number"),
        ({"sequence_bias": [[[5]]]}, r"sequence_bias\[0\] is \[\[5\]\]; a list of 2 is expected"),
        ({"sequence_bias": [[[99], 1.0]]}, "99 is not the id of a token"),
        ({"eos_token_id": -1}, "-1 is not the id of a token"),
    ],
)
def test_generation_config_with_a_wrong_value(bundle: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_json(copy / "generation_config.json", **values)
    with pytest.raises(DataError, match=message):
        Bundle.load(copy)


def documents_examples() -> list[str]:
    """The programs in docs/bundle.md."""
    document = (Path(__file__).parents[1] / "docs/bundle.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", document, re.DOTALL)


@pytest.mark.parametrize("example", documents_examples(), ids=lambda example: re.findall(r"\w+\.onnx", example)[0])
def test_the_documents_examples_run(example: str, bundle: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=bundle.parent, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    written = result.stdout.split()
    assert len(written) == 50
    assert set(written) <= {*WORDS, "<eos>"}


def documents_tables(title: str) -> list[list[str]]:
    """The rows of the first table under a title of docs/bundle.md, of each its cells."""
    document = (Path(__file__).parents[1] / "docs/bundle.md").read_text(encoding="utf-8")
    table = document.split(f"\n## {title}")[1].split("\n|", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("file", [STEP_GRAPH, GENERATION_GRAPH])
def test_the_documents_tables_are_right(file: str, bundle: Path) -> None:
    """Each name, its type and its axes."""
    model = onnx.load(bundle / file, load_external_data=False)
    sizes = {"V": len(WORDS) + 2, "V'": PADDED, "S": 12 + 12 + 8, "1": 1}
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
    documented: dict[str, dict[str, tuple[int, list[object]]]] = {"in": {}, "out": {}}
    title = {STEP_GRAPH: "The step graph", GENERATION_GRAPH: "The generation graph"}[file]
    for place, names, kind, axes, *_ in documents_tables(title):
        cells = [cell.strip() for cell in axes.split(",") if cell.strip()]
        shape: list[object] = [cell.strip("`") if cell.startswith("`") else sizes[cell] for cell in cells]
        for name in re.findall(r"`(\w+)`", names):
            documented[place][name] = kinds[kind], shape
    assert documented == {"in": described(model.graph.input), "out": described(model.graph.output)}


def test_the_document_names_all_metadata_and_all_fields(bundle: Path) -> None:
    for file in (STEP_GRAPH, GENERATION_GRAPH):
        keys = {key for row in documents_tables("Metadata") for key in re.findall(r"`(\w+)`", row[0])}
        assert keys - ({"features"} if file == STEP_GRAPH else set()) == set(metadata_of(onnx.load(bundle / file)))
    fields = [row for row in documents_tables("generation_config.json") for _ in re.findall(r"`(\w+)`", row[0])]
    names = [name for row in documents_tables("generation_config.json") for name in re.findall(r"`(\w+)`", row[0])]
    written = json.loads((bundle / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: json.loads(row[1]) for name, row in zip(names, fields, strict=True)} == written
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert {key for row in documents_tables("manifest.json") for key in re.findall(r"`(\w+)`", row[0])} == set(manifest)
