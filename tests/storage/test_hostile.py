"""Checkpoints, bundles, data folders and CSVs that are damaged or malicious.

Reading returns the correct result or fails with one line that names the file: no traceback, no hang, no memory beyond the
file's own. The first part mutates files at random, 1,000 times each, half of them with valid checksums; the second has cases
written by hand.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from corpora import chain, write_data_folder
from lmdist import config
from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import DataSettings, ModelSettings, PrepareSettings, Recipe
from lmdist.storage.checksums import sha256
from lmdist.storage.reading import MAX_JSON_BYTES, read_json
from lmdist.text.documents import Documents
from lmdist.text.prepare import main as prepare_main
from lmdist.text.prepare import prepare
from lmdist.text.sources import ReadOptions
from lmdist.text.tokenizer import WordTokenizer
from lmdist.training import evaluate
from lmdist.training.checkpoints.format import Progress
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import best_checkpoint, find_checkpoint, newest_checkpoint
from lmdist.training.checkpoints.write import take_snapshot, write_checkpoint
from lmdist.training.data import DataFolder, training_batches
from lmdist_export import export, generate
from lmdist_export.bundle import GENERATION_GRAPH, STEP_GRAPH, WEIGHTS, Bundle
from lmdist_export.graph.onnx_file import FLOAT, INT64, Graph, OnnxModel, model_of
from lmdist_export.graph.sizes import weights
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.beam_search import beam_search
from lmdist_export.sampling.generation import continuations
from lmdist_export.sampling.runtime import Runtime
from lmdist_export.sampling.sampler import Sampler
from support.jobs import SMALL, train
from support.mutations import Random, damaged, mutated, one, other_lines, other_tensors, other_weights, with_correct_checksums
from support.small_bundles import ADAPTIVE, SINGLE, edit_json, make_bundle

TIMES = 1_000
SETTINGS = ModelSettings(embedding_size=6, hidden_size=8)
WORDS = 20
ROWS = 3


@contextlib.contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """Limit the memory of this process to so much more than it has: a larger allocation fails at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (mebibytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """At most 3 GiB more."""
    with at_most(3 << 10):
        yield


def make_checkpoint(folder: Path) -> Path:
    """A checkpoint after one step, beside its data folder, as training leaves it."""
    splits = {"train": chain(200, WORDS), "valid": chain(60, WORDS, seed=1), "test": chain(60, WORDS, seed=2)}
    data = write_data_folder(folder / "data", splits, WORDS)
    torch.manual_seed(0)
    model = LanguageModel(SETTINGS, WORDS)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = step(model, optimizer, model.initial_state(ROWS))
    taken = take_snapshot(Progress(1, valid_nats=2.0), model, optimizer, state)
    recipe = Recipe(model=SETTINGS, data=DataSettings(folder=str(data), global_batch=ROWS, window=7))
    return write_checkpoint(folder / "run" / "checkpoints", taken, config.as_dict(recipe), DataFolder(data))


def step(model: LanguageModel, optimizer: torch.optim.Optimizer, state: Any) -> Any:
    """One step of training."""
    hidden, state = model(torch.arange(ROWS * 4).reshape(ROWS, 4) % WORDS, state)
    model.projection(hidden).logsumexp(-1).sum().backward()
    optimizer.step()
    return state[0].detach(), state[1].detach()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(saved: Path) -> Path:
    return saved.parents[2] / "data"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), SINGLE, "wordpunct")


@pytest.fixture(scope="module")
def bundle_of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "cat", "said", *(f"word{number}" for number in range(300))]
    return make_bundle(tmp_path_factory.mktemp("bundle_of_bytes"), ADAPTIVE, "whitespace", words, "int8")


# --- random mutations ----------------------------------------------------------------------------------------------


def use_checkpoint(folder: Path) -> None:
    """Load for evaluation and for export, and continue the training."""
    model = open_checkpoint(folder).model()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    hidden, _ = model(torch.zeros(2, 3, dtype=torch.int64), model.initial_state(2))
    assert hidden.shape == (2, 3, SETTINGS.embedding_size)
    checkpoint = open_checkpoint(folder)
    manifest = checkpoint.manifest
    assert {"vocab.txt", "text.json"} <= manifest["files"].keys()
    assert manifest["data"]["files"]["train.bin"].keys() >= {"bytes", "sha256"}
    assert isinstance(manifest["recipe"]["seed"], int)
    assert isinstance(manifest["recipe"]["optimizer"]["name"], str)
    assert manifest["recipe"]["model"].keys() == dataclasses.asdict(SETTINGS).keys()
    assert manifest["recipe"]["data"].keys() == dataclasses.asdict(DataSettings()).keys()
    model = LanguageModel(SETTINGS, WORDS)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.load_parameters(model)
    progress, state = checkpoint.load_training(optimizer)
    assert progress.step >= 0
    step(model, optimizer, model.initial_state(ROWS) if state is None else state)


def use_bundle(folder: Path, every_option: bool = True) -> None:
    """Generate a few tokens, sampled and greedy, with the bundle's options and with all options; score some."""
    bundle = Bundle.load(folder)
    sampler = Sampler(bundle, threads=1)
    words = bundle.vocabulary.encode(bundle.tokenizer.tokenize("the cat said"))
    generation = dataclasses.replace(
        bundle.generation, max_new_tokens=5, min_new_tokens=min(5, bundle.generation.min_new_tokens)
    )
    options = {"temperature": 0.9, "top_k": 10, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2}
    every = dataclasses.replace(GenerationConfig(**options), max_new_tokens=5)
    for way in (generation, dataclasses.replace(generation, do_sample=False), *([every] if every_option else [])):
        if way.num_beams > 1:
            texts = beam_search(sampler, words, way, 1)
        else:
            texts = [text for text, _ in continuations(sampler, [words], way, seed=1, n=2) if text.finish_reason]
        for text in texts:
            assert len(text.tokens) <= 5
            assert bundle.tokenizer.detokenize(bundle.vocabulary.decode(text.tokens)) is not None
    tokens = np.array([[bundle.generation.bos_token_id, *words]])
    scores, _ = sampler.score(tokens[:, :-1], tokens[:, 1:])
    assert scores.shape == (1, len(words))


def use_data(folder: Path) -> None:
    """Read batches of both kinds, the first and the last, and a validation split."""
    opened = DataFolder(folder)
    for batching in ("streams", "windows"):
        batches = training_batches(opened, DataSettings(batching=batching, global_batch=ROWS, window=7), seed=1)
        for number in (0, batches.steps_per_epoch - 1, batches.steps_per_epoch):
            batch = batches.batch(number, slice(0, ROWS))
            assert batch.num_tokens > 0
            assert len(batch.inputs) == ROWS
            assert (
                0 <= int(batch.inputs.min()) <= max(int(batch.inputs.max()), int(batch.targets.max())) < opened.vocabulary_size
            )
    if opened.has("valid"):
        assert int(opened.tokens("valid")[:].max()) < opened.vocabulary_size


def use_table(folder: Path, every: int = 1) -> None:
    """Read the table in the folder; make and open a data folder of it, which takes ten times as long, one time in `every`."""
    [file] = folder.iterdir()
    for document in Documents([file], ReadOptions(group_by="title")):
        document.text.encode()
    if file.stat().st_size % every:
        return
    settings = PrepareSettings(inputs=[str(file)], tokenizer="wordpunct", workers=1, group_by="title")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(settings, folder / "out")
    for split in ("train", "valid", "test"):
        assert len(DataFolder(folder / "out").tokens(split)) > 0


def change_checkpoint(folder: Path, random: Random) -> str:
    return mutated(folder, "manifest.json", {".safetensors": other_tensors, ".txt": other_lines}, random)


def change_bundle(folder: Path, random: Random) -> str:
    return mutated(folder, "manifest.json", {".bin": other_weights, ".txt": other_lines}, random)


def change_data(folder: Path, random: Random) -> str:
    return mutated(folder, "meta.json", {".txt": other_lines}, random)


SNIPPETS = [
    b'"',
    b'""',
    b"\n",
    b"\r",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b",",
    b"\t",
    b'"' * 50,
    b"," * 5_000,
    b"content",
    b"{",
]
SNIPPETS += [b"\xed\xa0\x80", b"\\ud800", b"[" * 3_000, b"x" * 300_000, b"\x1a", "\u2028".encode(), b"id,title,content\n"]


def change_table(folder: Path, random: Random) -> str:
    [file] = folder.iterdir()
    content = file.read_bytes()
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(len(content) + 1))
        content = one([damaged(content, random), other_lines(content, random)], random)
        if random.random() < 0.5:
            content = content[:place] + one(SNIPPETS, random) + content[place:]
    if random.random() < 0.2:
        content = damaged(gzip.compress(content), random) if random.random() < 0.5 else gzip.compress(content)
        file.rename(file.with_suffix(".csv.gz"))
        file = file.with_suffix(".csv.gz")
    file.write_bytes(content)
    return file.name


def write_table(folder: Path) -> Path:
    """A folder with a CSV of news: cells with commas, quotes, line breaks and letters of all kinds."""
    folder.mkdir()
    words = ["the", "cat,", "said", '"no"', "é", "“quoted”", "中文", "Mr.", "didn't", "went\nhome", "&", "back\n\nagain"]
    random = np.random.default_rng(5)
    with (folder / "news.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "content"])
        for number in range(30):
            writer.writerow([number, f"title {number % 9}", " ".join(random.choice(words, 20))])
    return folder


KINDS: dict[str, tuple[Callable[[Path, Random], str], Callable[[Path], None]]] = {
    "saved": (change_checkpoint, use_checkpoint),
    "bundle": (change_bundle, use_bundle),
    "bundle_of_bytes": (change_bundle, partial(use_bundle, every_option=False)),
    "data": (change_data, use_data),
    "table": (change_table, partial(use_table, every=5)),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "news")


@pytest.fixture
def remembered_sessions(monkeypatch: pytest.MonkeyPatch) -> dict[object, Any]:
    """Sessions are opened once for the same graph over the same weights: to open them is most of what a mutation costs.

    They take nothing else of a bundle, which test_a_foreign_graph_never_runs shows.
    """
    sessions: dict[object, Any] = {}
    open_new = Runtime.open

    def open_once(runtime: Runtime, graph: Callable[..., OnnxModel]) -> Any:
        key = repr((graph, runtime.sizes, runtime.target)), sha256(runtime.bundle.folder / WEIGHTS)
        if key not in sessions:
            sessions[key] = open_new(runtime, graph)
        return sessions[key]

    monkeypatch.setattr(Runtime, "open", open_once)
    return sessions


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("remembered_sessions")
def test_a_thousand_mutations_give_a_result_or_one_line(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    original: Path = request.getfixturevalue(kind)
    change, use = KINDS[kind]
    use(Path(shutil.copytree(original, tmp_path / "whole")))
    rejected = 0
    for seed in range(TIMES):
        folder = Path(shutil.copytree(original, tmp_path / "case"))
        done = change(folder, np.random.default_rng(seed))
        try:
            use(folder)
        except (DataError, MissingInputError, UsageError) as error:
            rejected += 1
            message = str(error)
            assert "\n" not in message, f"seed {seed} ({done}): {message}"
            # What is wrong with a table may be how little there is in it, and with options that they leave no word.
            named = kind == "table" or "no token is left to sample" in message or str(folder) in message
            assert named, f"seed {seed} ({done}): {message}"
            assert len(message) < 2_000, f"seed {seed} ({done}): {message}"
        except BaseException as error:
            raise AssertionError(f"seed {seed} ({done})") from error
        shutil.rmtree(folder)
    assert TIMES // 20 < rejected < TIMES - TIMES // 20  # some mutations matter and some do not


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage, alone in its run."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints" / saved.name))


def edit_model(folder: Path, **values: object) -> None:
    """Change the model's settings in a manifest, in both places."""
    manifest = read_json(folder / "manifest.json")
    recipe = manifest["recipe"] | {"model": manifest["recipe"]["model"] | values}
    edit_json(folder / "manifest.json", model=manifest["model"] | values, recipe=recipe)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "manifest.json", "text.json"])
@pytest.mark.parametrize("packed", [False, True], ids=["pickle", "torch.save"])
def test_a_pickle_is_not_unpickled(copied: Path, tmp_path: Path, name: str, packed: bool) -> None:
    if packed:
        torch.save(Trap(tmp_path / "sprung"), copied / name)
    else:
        (copied / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with_correct_checksums(copied, "manifest.json")
    with pytest.raises(DataError, match=name):
        use_checkpoint(copied)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10**12}, "model.hidden_size is 1000000000000; it must be from 1 to"),
        ({"embedding_size": 10**12}, "model.embedding_size is 1000000000000; it must be from 1 to"),
        ({"num_layers": 10**9}, "model.num_layers is 1000000000; it must be from 1 to"),
        ({"hidden_size": 10**6}, "'layers.0.bias_hh_l0' is"),
        ({"num_layers": 3}, "the shape of 'layers.1"),
        ({"tied": False}, "the shape of 'layers.1"),
        ({"hidden_size": -1}, "model.hidden_size is -1"),
        ({"hidden_size": 2**63}, "an integer is expected"),
        ({"dropout": 7}, "model.dropout is 7"),
        ({"color": "red"}, "'color' is not known in model"),
    ],
)
@pytest.mark.timeout(20)
def test_a_model_of_another_size_is_rejected_before_it_is_built(copied: Path, values: dict[str, object], message: str) -> None:
    edit_model(copied, **values)
    with pytest.raises(DataError, match=message):
        use_checkpoint(copied)


def test_tensors_larger_than_their_file(copied: Path) -> None:
    header = json.dumps({"embedding.weight": {"dtype": "F32", "shape": [10**12, 6], "data_offsets": [0, 24 * 10**12]}})
    (copied / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with_correct_checksums(copied, "manifest.json")
    with pytest.raises(DataError, match="is not a file of safetensors"):
        use_checkpoint(copied)
    (copied / "model.safetensors").write_bytes(struct.pack("<Q", 10**15))
    with_correct_checksums(copied, "manifest.json")
    with pytest.raises(DataError, match="is not a file of safetensors"):
        use_checkpoint(copied)


@pytest.mark.parametrize(("file", "name"), [("model", "layers.0.weight_hh_l0"), ("training", "optimizer.1.exp_avg")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(copied: Path, file: str, name: str, value: float) -> None:
    tensors = safetensors.numpy.load_file(copied / f"{file}.safetensors")
    tensors[name][0] = value
    safetensors.numpy.save_file(tensors, copied / f"{file}.safetensors")
    with_correct_checksums(copied, "manifest.json")
    with pytest.raises(DataError, match=rf"{file}.safetensors: '{name}' holds numbers that are not finite"):
        use_checkpoint(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "vocab.txt", "text.json"])
def test_a_file_without_a_checksum_is_rejected(copied: Path, name: str) -> None:
    files = read_json(copied / "manifest.json")["files"]
    del files[name]
    edit_json(copied / "manifest.json", files=files)
    with pytest.raises(DataError, match=f"names no sha256 for its {name}"):
        use_checkpoint(copied)


@pytest.mark.parametrize("name", ["../vocab.txt", "/etc/passwd", "..", "", "deep/../vocab.txt", "a\nb", "x" * 300, "\0"])
def test_names_of_files_outside_the_folder(copied: Path, bundle: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    for folder, use in ((copied, use_checkpoint), (copy, use_bundle)):
        files = read_json(folder / "manifest.json")["files"]
        edit_json(folder / "manifest.json", files=files | {name: files["vocab.txt"]})
        with pytest.raises(DataError, match=r"outside itself|cannot be read|is not a file"):
            use(folder)


def test_links_and_pipes_are_rejected(copied: Path, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    for folder, use in ((copied, use_checkpoint), (copy, use_bundle)):
        shutil.move(folder / "vocab.txt", tmp_path / "secret")
        (folder / "vocab.txt").symlink_to(tmp_path / "secret")
        with pytest.raises(DataError, match=r"vocab\.txt is a link"):
            use(folder)
        (folder / "vocab.txt").unlink()
        os.mkfifo(folder / "vocab.txt")
        with pytest.raises(DataError, match=r"vocab\.txt is not a file"):
            use(folder)
        (folder / "manifest.json").unlink()
        os.mkfifo(folder / "manifest.json")
        with pytest.raises(DataError, match=r"manifest\.json is not a file"):
            use(folder)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[]", "1", '{"format": ' + "9" * 5_000 + "}", '{"format": NaN}', "", "\ud800", "\0"],
)
def test_invalid_json(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_checkpoint(copied)


def test_json_larger_than_any(copied: Path, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    for file, use in ((copied / "manifest.json", use_checkpoint), (copy / "generation_config.json", use_bundle)):
        os.truncate(file, MAX_JSON_BYTES + 1)
        with pytest.raises(DataError, match="at most 67,108,864 are expected"):
            use(file.parent)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": None}, "progress.step is None"),
        ({"step": -1}, "must not be negative"),
        ({"step": 10**400}, "progress.step is 1000"),
        ({"valid_nats": float("nan")}, "progress.valid_nats is nan"),
        ({"loss_scale": {"scale": 1.0}}, "expected are scale"),
        ({"mood": "good"}, "'mood' is not known in progress"),
    ],
)
def test_invalid_progress(copied: Path, values: dict[str, object], message: str) -> None:
    progress = read_json(copied / "manifest.json")["progress"]
    edit_json(copied / "manifest.json", progress=progress | values)
    with pytest.raises(DataError, match=message):
        use_checkpoint(copied)


def test_a_setting_younger_than_the_checkpoint_has_its_default(copied: Path) -> None:
    recipe = read_json(copied / "manifest.json")["recipe"]
    del recipe["data"]["stride"]
    edit_json(copied / "manifest.json", recipe=recipe)
    assert open_checkpoint(copied).manifest["recipe"]["data"]["stride"] == DataSettings.stride
    use_checkpoint(copied)


def test_states_of_other_streams(copied: Path) -> None:
    tensors = safetensors.numpy.load_file(copied / "training.safetensors")
    for name, value in (("streams.h", tensors["streams.h"][:2]), ("optimizer.0.exp_avg", np.zeros((2, 2), np.float32))):
        safetensors.numpy.save_file(tensors | {name: value}, copied / "training.safetensors")
        with_correct_checksums(copied, "manifest.json")
        with pytest.raises(DataError, match=f"the shape of '{name}'"):
            use_checkpoint(copied)


def test_other_files_among_the_checkpoints(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = copied.parent
    shutil.copytree(copied, checkpoints / "step-xyz")
    (checkpoints / "step-000000009").write_text("a file")
    (checkpoints / "step-000000008").mkdir()
    (checkpoints / "newest").write_text("x" * 300)
    (checkpoints / "step-000000007").symlink_to("nowhere")
    shutil.copytree(copied, checkpoints / "step-000000006")
    edit_json(checkpoints / "step-000000006" / "manifest.json", progress={"step": "six"})
    assert newest_checkpoint(checkpoints) == copied
    assert best_checkpoint(checkpoints) == copied
    assert find_checkpoint(checkpoints.parent) == copied
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 + 3 * 2  # what is no folder is none of ours
    assert "is missing" in warnings[0]
    assert all(line.startswith("warning: skipping a damaged checkpoint: ") for line in warnings[1:])


def test_unreadable_files(copied: Path) -> None:
    for name in ("vocab.txt", "manifest.json"):
        (copied / name).chmod(0)
        if os.access(copied / name, os.R_OK):
            pytest.skip("root may read everything")
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            use_checkpoint(copied)
    copied.chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        use_checkpoint(copied)
    copied.parent.chmod(0)
    with pytest.raises(MissingInputError):
        find_checkpoint(copied)
    copied.parent.chmod(0o700)
    copied.chmod(0o700)


# --- bundles -------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def edit_sizes(folder: Path, **values: object) -> None:
    """Change the sizes in a manifest."""
    edit_json(folder / "manifest.json", sizes=read_json(folder / "manifest.json")["sizes"] | values)


def edit_weights(folder: Path, value: float, *names: str, beyond: int = 0) -> None:
    """Make weights of a bundle all `value`, from row `beyond` on, and update its checksums."""
    table = weights(Bundle.load(folder).sizes)
    with (folder / WEIGHTS).open("r+b") as file:
        for name in names:
            assert table[name].kind == FLOAT
            file.seek(table[name].offset + 4 * int(np.prod((beyond, *table[name].shape[1:]))))
            file.write(np.full((table[name].shape[0] - beyond, *table[name].shape[1:]), value, np.float32).tobytes())
    with_correct_checksums(folder, "manifest.json")


SIZES_OF_NOTHING: list[dict[str, object]] = [
    *({"layer_sizes": sizes} for sizes in ([], [0], [-7], [8], [7, 7], [10**12], [2**62, 2**62], [7] * 11)),
    *({"layer_sizes": sizes} for sizes in ([7] * 1_000_000, [7] * 20, [10**12] * 100_000)),
    *({"vocabulary_size": size} for size in (0, -1, 10**12, 2**63 - 1, 18, 257)),
    *({"embedding_size": size} for size in (0, -7, 8, 10**12)),
    *({"precision": precision} for precision in ("fp16", "int8", "int4", "fp64", "", "x" * 100_000)),
    *({"cutoffs": cutoffs} for cutoffs in ([5], [0], [-1], [5, 5], [9, 5], [19], [10**12], list(range(1, 100_000)))),
    {"tied": False},
    {"tied": False, "cutoffs": list(range(1, 40_000)), "vocabulary_size": 40_000},
    {"layer_sizes": [10**9], "embedding_size": 10**9, "vocabulary_size": 10**9},
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("values", SIZES_OF_NOTHING, ids=lambda values: repr(values)[:40])
def test_sizes_that_no_weights_have(broken: Path, values: dict[str, object]) -> None:
    edit_sizes(broken, **values)
    refuse_within_little_memory(broken, r"names sizes that no model with [\d,]+ bytes of weights\.bin has|words, the model")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "values",
    [
        {"layer_sizes": [20, 20], "cutoffs": list(range(1, 12))},  # clusters without any numbers in their rows
        {"cutoffs": list(range(1, 300))},
        {"cutoffs": [1], "layer_sizes": [1]},
        {"cutoffs": [152, 215, 300]},
        {"cutoffs": [152, 152]},
        {"cutoffs": []},
        {"cutoffs": [151]},
        {"tied": True},
        {"tied": True, "embedding_size": 20},
        {"precision": "int4"},
        {"precision": "fp32"},
    ],
    ids=lambda values: repr(values)[:40],
)
def test_clusters_that_no_weights_have(bundle_of_bytes: Path, tmp_path: Path, values: dict[str, object]) -> None:
    folder = Path(shutil.copytree(bundle_of_bytes, tmp_path / "bundle"))
    edit_sizes(folder, **values)
    refuse_within_little_memory(folder, "names sizes that no model with")


def test_a_vocabulary_of_millions_of_lines(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (folder / "vocab.txt").write_bytes(b"<unk>\n<eos>\n" + b"a\n" * 30_000_000)
    with_correct_checksums(folder, "manifest.json")
    refuse_within_little_memory(folder, "vocab.txt has 30000002 words, the model")


def refuse_within_little_memory(folder: Path, message: str) -> None:
    """The bundle is rejected in one line, before memory is allocated for its sizes, but for the list that names them."""
    with at_most(250), pytest.raises(DataError, match=message) as raised:
        Bundle.load(folder)
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_sizes": None}, r"sizes\.layer_sizes is None; a list is expected"),
        ({"layer_sizes": "7"}, "a list is expected"),
        ({"layer_sizes": [7.0]}, r"layer_sizes\[0\] is 7\.0; an integer is expected"),
        ({"layer_sizes": [10**30]}, "an integer is expected"),
        ({"layer_sizes": [[7]]}, "an integer is expected"),
        ({"layer_sizes": [True]}, "an integer is expected"),
        ({"vocabulary_size": "many"}, "an integer is expected"),
        ({"vocabulary_size": 10**400}, "an integer is expected"),
        ({"tied": 1}, "tied is 1; true or false is expected"),
        ({"precision": 32}, "precision is 32; a string is expected"),
        ({"cutoffs": {}}, "cutoffs is {}; a list is expected"),
    ],
)
def test_invalid_sizes(broken: Path, values: dict[str, object], message: str) -> None:
    edit_sizes(broken, **values)
    with pytest.raises(DataError, match=message):
        Bundle.load(broken)


@pytest.mark.parametrize("name", ["layer_sizes", "vocabulary_size", "embedding_size", "tied", "precision", "cutoffs"])
def test_sizes_that_are_missing_or_too_many(broken: Path, name: str) -> None:
    sizes = read_json(broken / "manifest.json")["sizes"]
    edit_sizes(broken, **{f"{name}_too": 1, "location": "/etc/passwd"})
    use_bundle(broken)
    del sizes[name]
    edit_json(broken / "manifest.json", sizes=sizes)
    with pytest.raises(DataError, match=f"sizes.{name} is missing"):
        Bundle.load(broken)


@pytest.mark.parametrize("length", [0, 1, -1, -4096, 4096, 10**7])
def test_weights_of_another_length(broken: Path, length: int) -> None:
    """Negative: so many bytes less; otherwise up to there, or so many more."""
    size = (broken / WEIGHTS).stat().st_size
    os.truncate(broken / WEIGHTS, size + length if length else 0)
    with_correct_checksums(broken, "manifest.json")
    with pytest.raises(DataError, match=r"names sizes that no model with [\d,]+ bytes of weights\.bin has"):
        use_bundle(broken)


def other_words() -> bytes:
    """A graph with the names of the generation graph that always returns the same token."""
    g = Graph("other")
    g.input("prompt", INT64, ["batch", "prompt_words"])
    g.output(g.constant(np.full((5, 2), 3)), "words", INT64, ["made_words", "batch"])
    for name in ("mass", "next_h", "next_c"):
        g.output(g.constant(np.zeros((2, 7), np.float32)), name, FLOAT, ["batch", 7])
    return model_of(g, {}).content


def bomb() -> bytes:
    """A graph that asks for a terabyte."""
    g = Graph("bomb")
    g.output(g("ConstantOfShape", g.constant(np.array([10**6, 10**6]))), "logits", FLOAT, ["huge", "huger"])
    return model_of(g, {}).content


@pytest.mark.parametrize("content", [other_words(), bomb(), b"", b"\x3a\x00" * 5_000_000, b"no graph"], ids=range(5))
def test_a_foreign_graph_never_runs(bundle: Path, broken: Path, content: bytes) -> None:
    """The generated tokens do not depend on the files of the graphs, if their checksums are valid."""
    for name in (STEP_GRAPH, GENERATION_GRAPH):
        (broken / name).write_bytes(content)
    with_correct_checksums(broken, "manifest.json")
    found = []
    for folder in (bundle, broken):
        sampler = Sampler(Bundle.load(folder), threads=1)
        words, _ = sampler.generate(sampler.start([[1, 5], [1]]).seeded(1), GenerationConfig(), 20)
        tokens = np.arange(8).reshape(2, 4)
        found.append((words, sampler.step(tokens, sampler.initial_state(2))[0], sampler.score(tokens, tokens)[0]))
    for ours, theirs in zip(*found, strict=True):
        assert np.array_equal(ours, theirs)


WAYS = [[], ["--temperature", "0"], ["--stream"], ["--top-k", "3"], ["--top-p", "0.5"], ["--num-beams", "2"]]
WAYS += [["--repetition-penalty", "1.2"], ["--min-p", "0.1", "--n", "3"], ["--typical-p", "0.5", "--json", "--logprobs", "2"]]


@pytest.mark.parametrize("arguments", WAYS, ids=" ".join)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_weights_that_are_not_finite(
    broken: Path, value: float, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_weights(broken, value, "projection", "projection.bias")
    seed = [] if "--num-beams" in arguments else ["--seed", 1]
    assert "the logits are not finite" in failure(generate.main, capsys, 65, broken, *seed, *arguments)


@pytest.mark.parametrize("arguments", WAYS, ids=" ".join)
@pytest.mark.parametrize("value", [5.0, 3e38, np.inf, np.nan])
def test_weights_of_words_that_no_vocabulary_has(
    broken: Path, value: float, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights between the last token and the end of its block: the command generates text, or fails with one line."""
    edit_weights(broken, value, "projection.bias", beyond=19)
    seed = [] if "--num-beams" in arguments else ["--seed", "1"]
    try:
        generate.main([str(broken), *seed, "--max-new-tokens", "9", "--ignore-eos", *arguments])
        assert " tokens in " in capsys.readouterr().err
    except SystemExit as stop:
        assert stop.code == 65  # noqa: PT017
        assert "the logits are not finite" in capsys.readouterr().err.splitlines()[-1]


def test_words_that_no_vocabulary_has(broken: Path) -> None:
    words = (broken / "vocab.txt").read_bytes()
    for content in (
        words + b"the\n",
        words + b"\n",
        b"\xff" + words,
        words[6:],
        b"",
        words.replace(b"\n", b"\r\n"),
        words[:-4],
    ):
        (broken / "vocab.txt").write_bytes(content)
        with_correct_checksums(broken, "manifest.json")
        with pytest.raises(DataError, match=r"vocab\.txt"):
            use_bundle(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"settings": {"tokenizer": "magic"}}, "tokenizer is 'magic'"),
        ({"settings": {"tokenizer": "word_tokenize"}, "punkt": None}, "needs the parameters of Punkt"),
        ({"settings": []}, "settings is \\[\\]; an object is expected"),
        ({"punkt": {"contexts": {}}}, "punkt.abbreviations is missing"),
        ({"punkt": 7}, "punkt is 7; an object is expected"),
        ({"nltk": 3}, "nltk is 3; a string is expected"),
    ],
)
def test_invalid_text_settings(broken: Path, values: dict[str, object], message: str) -> None:
    edit_json(broken / "text.json", **values)
    with pytest.raises(DataError, match=rf"text\.json.*{message}"):
        WordTokenizer.load(broken / "text.json")


# --- data folders and tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabulary_size": 10**12}, "vocab.txt has 20 words, meta.json 1000000000000"),
        ({"dtype": "object"}, "dtype is 'object'; 'uint16' or 'uint32' is expected"),
        ({"splits": {"../../x": {"tokens": 1}}}, "its splits are not its files"),
        ({"splits": {"train": {}}}, "tokens is missing"),
        ({"splits": {"train": {"tokens": 10**15}}}, "1000000000000000 tokens of 2 are expected"),
        ({"splits": {}}, "has no train split"),
        ({"files": {}}, "its splits are not its files"),
        ({"version": 2}, "version 2"),
    ],
)
def test_an_invalid_data_folder(data: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    edit_json(folder / "meta.json", **values)
    with pytest.raises((DataError, MissingInputError), match=message):
        use_data(folder)


def test_words_beyond_the_vocabulary(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[-1] = WORDS
    tokens.tofile(folder / "train.bin")
    with_correct_checksums(folder, "meta.json")
    with pytest.raises(
        DataError, match=r"train\.bin is damaged in its block 1 of 1, .*: it has a token 20, and the vocabulary ends at 19"
    ):
        use_data(folder)
    edit_json(folder / "meta.json", splits={"train": {"tokens": 0}})
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin is empty"):
        use_data(folder)


def texts(path: Path, **settings: Any) -> list[str]:
    """The documents of a file."""
    return [document.text for document in Documents([path], ReadOptions(**settings))]


def test_a_line_or_a_row_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("decoding", "tables", "readers"):
        monkeypatch.setattr(f"lmdist.text.{module}.LONGEST_ROW", 1 << 16)
    for name in ("a.csv", "a.jsonl", "a.txt"):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(b"content" * (1 << 19)))
        with pytest.raises(DataError, match=rf"{name}\.gz has a line of more than 65,536 characters"):
            texts(path)
    (tmp_path / "b.csv").write_text("content\n" + '"\n",' * (1 << 16))
    assert texts(tmp_path / "b.csv") == ['"', ","]
    (tmp_path / "c.txt").write_text("a line\n" * (1 << 14))
    with pytest.raises(DataError, match="no blank line in"):
        texts(tmp_path / "c.txt")
    assert len(texts(tmp_path / "c.txt", lines=True)) == 1 << 14


def test_halves_of_surrogate_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b", "title": "\\udfff"}\n')
    (tmp_path / "a.csv").write_bytes(b"text\na +2AA- b\n")
    assert texts(tmp_path / "a.csv", encoding="utf-7") == texts(tmp_path / "a.jsonl") == ["a \ufffd b"]
    [document] = Documents([tmp_path / "a.jsonl"], ReadOptions(group_by="title"))
    assert document.group == "\ufffd"


def test_codecs_that_are_not_text_encodings(tmp_path: Path) -> None:
    for name in ("rot13", "zlib", "undefined"):
        with pytest.raises(UsageError, match=f"encoding is '{name}'"):
            Documents([], ReadOptions(encoding=name))


def test_columns_with_odd_names_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"a\nb",c\n1,2\n')
    with pytest.raises(DataError, match=r"it has: 'a\\nb', c"):
        texts(tmp_path / "a.csv")


# --- the commands --------------------------------------------------------------------------------------------------


def failure(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The only line that a command writes when it fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert len(error.splitlines()) == 1, error
    return error


def test_files_in_place_of_folders(saved: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": torch.zeros(3)}, tmp_path / "model.pt")
    for main, rest in ((evaluate.main, []), (export.main, ["-o", tmp_path / "bundle"]), (generate.main, [])):
        assert "model.pt is not a folder" in failure(main, capsys, 65, tmp_path / "model.pt", *rest)
        assert "none does not exist" in failure(main, capsys, 66, tmp_path / "none", *rest)
    assert "not a folder" in failure(evaluate.main, capsys, 65, saved, "--data", tmp_path / "model.pt")
    assert "not a folder" in failure(generate.main, capsys, 65, bundle / "model.onnx")
    assert "does not exist" in failure(prepare_main, capsys, 66, "x" * 5_000, "-o", tmp_path / "data")
    assert "does not exist" in failure(evaluate.main, capsys, 66, saved, "--file", "x" * 5_000)


def test_every_command_refuses_a_malicious_checkpoint(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_model(copied, hidden_size=10**12)
    for main, rest in ((evaluate.main, []), (export.main, ["-o", tmp_path / "bundle"])):
        assert "model.hidden_size is 1000000000000; it must be" in failure(main, capsys, 65, copied, *rest)
    assert not (tmp_path / "bundle").exists()


def test_weights_too_large_to_be_trained(copied: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = safetensors.numpy.load_file(copied / "model.safetensors")
    for name in ("embedding.weight", "projection.bias"):
        tensors[name][:] = 3e38
    safetensors.numpy.save_file(tensors, copied / "model.safetensors")
    with_correct_checksums(copied, "manifest.json")
    assert "weights are too large" in failure(evaluate.main, capsys, 65, copied)
    with pytest.raises(SystemExit) as stop:
        export.main([str(copied), "-o", str(tmp_path / "bundle")])
    assert stop.value.code == 65
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_training_refuses_a_malicious_checkpoint(data: Path, tmp_path: Path) -> None:
    flags = [*SMALL, f"--data.folder={data}", "--run_folder=run", "--resume=auto", "--training.steps=2"]
    train(1, *flags, cwd=tmp_path)
    folder = find_checkpoint(tmp_path / "run")
    tensors = safetensors.numpy.load_file(folder / "training.safetensors")
    safetensors.numpy.save_file({**tensors, "streams.h": tensors["streams.h"][:1]}, folder / "training.safetensors")
    with_correct_checksums(folder, "manifest.json")
    done = train(1, *flags, cwd=tmp_path, code=65)
    assert "the shape of 'streams.h'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_secret_in_the_environment_gets_into_no_file(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-and-long-enough"
    for name in ("LMDIST_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, secret)
    monkeypatch.chdir(tmp_path)
    train(1, *SMALL, f"--data.folder={data}", "--run_folder=run", "--training.steps=2", cwd=tmp_path)
    export.main(["run", "-o", "bundle"])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.toml", "model.safetensors", "model.onnx", "weights.bin", "metrics.jsonl"} <= {path.name for path in written}
    for path in written:
        assert secret.encode() not in path.read_bytes(), path
