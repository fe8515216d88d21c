"""A run that starts from another model: word by word, by what it says, resumed without its base; and word vectors."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdist import config
from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.model.language_model import LanguageModel
from lmdist.settings import MODEL_SIZES, InitSettings, ModelSettings, Recipe
from lmdist.storage.held import HeldFolder
from lmdist.text.vectors import read_vectors
from lmdist.text.vocabulary import Vocabulary
from lmdist.tracking.metadata import LONGEST_TAG, provenance, run_id_of
from lmdist.training.checkpoints.read import open_checkpoint, read_manifest, read_tensors
from lmdist.training.checkpoints.retain import find_checkpoint, newest_checkpoint
from lmdist.training.data import DataFolder
from lmdist.training.starting_point import lines_of, start
from lmdist_export import export
from support.jobs import losses, train, train_here
from support.small_bundles import ADAPTIVE, PLAIN_WORDS, TIED, UNTIED, make_bundle, make_data, make_run

MODELS = {"tied": TIED, "untied": UNTIED, "adaptive": ADAPTIVE}
NEW_WORDS = ["lion", *PLAIN_WORDS[::-2], "tiger", "Bear", *PLAIN_WORDS[1::4]]


def model_flags(settings: ModelSettings) -> list[str]:
    """Return the flags of a recipe with this model."""
    return [f"--model.{name}={str(getattr(settings, name)).lower()}" for name in MODEL_SIZES]


def started(base: Path, data: Path, settings: ModelSettings, seed: int = 1, embeddings: str = "") -> LanguageModel:
    """Return the model of a run before its first step."""
    folder = DataFolder(data)
    torch.manual_seed(seed)
    model = LanguageModel(settings, folder.vocabulary_size)
    init_from = str(base) if base.name else ""
    start(model, Recipe(init_from=init_from, model=settings, seed=seed, init=InitSettings(embeddings=embeddings)), folder)
    return model


def rows_of_words(model: LanguageModel, words: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the rows of each word, by the matrix that they are in, and all else under the word ""."""
    found: dict[str, dict[str, torch.Tensor]] = {word: {} for word in ["", *words]}
    cuts = [0, *getattr(model.projection, "cutoffs", [len(words)])]
    for name, value in model.named_parameters():
        cluster = re.fullmatch(r"projection\.(head|tail\.(\d)\.1)\.\w+", name)
        if name == "embedding.weight" or (cluster is None and name.startswith("projection.") and ".tail" not in name):
            first, last = 0, len(words)
        elif cluster:
            number = int(cluster[2]) + 1 if cluster[2] else 0
            first, last = cuts[number], cuts[number + 1]
        else:
            first = last = 0
        for place, word in enumerate(words[first:last]):
            found[word][name] = value[place].detach()
        found[""][name] = value[last - first :].detach()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_each_word_has_the_base_s_rows_and_a_new_word_their_mean(tmp_path, name):
    settings = MODELS[name]
    base = make_run(tmp_path / "base", settings, "whitespace", PLAIN_WORDS)
    data = make_data(tmp_path / "data", "whitespace", NEW_WORDS)
    model = started(base, data, settings)
    theirs = rows_of_words(open_checkpoint(find_checkpoint(base)).model(), ["<unk>", "<eos>", *PLAIN_WORDS])
    ours = rows_of_words(model, ["<unk>", "<eos>", *NEW_WORDS])
    compared = new = 0
    for word, rows in ours.items():
        for matrix, row in rows.items():
            if word in theirs and matrix in theirs[word]:
                assert torch.equal(row, theirs[word][matrix]), (word, matrix)
                compared += 1
            elif shared := [one for one in ours if one and matrix in ours[one] and matrix in theirs.get(one, {})]:
                taken = torch.stack([theirs[one][matrix] for one in shared])
                assert ((row - taken.mean(0)).abs() <= 0.5 * taken.std(0, correction=0) + 1e-6).all(), (word, matrix)
                new += 1
    assert compared > len(NEW_WORDS)
    assert new >= 3
    again, other = started(base, data, settings), started(base, data, settings, seed=2)
    lion = 2
    assert torch.equal(again.embedding.weight, model.embedding.weight)
    assert not torch.equal(other.embedding.weight[lion], model.embedding.weight[lion])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("fp16", 1e-3), ("int8", 0.05), ("int4", 0.3)])
def test_a_bundle_is_a_base_as_well(tmp_path, name, precision, error):
    settings = MODELS[name]
    if precision == "int4" and settings.head == "adaptive":
        pytest.skip("there are no int4 bundles with an adaptive head")
    bundle = make_bundle(tmp_path, settings, "whitespace", PLAIN_WORDS, precision)
    expected = open_checkpoint(find_checkpoint(tmp_path / "runs" / "small")).model()
    model = started(bundle, tmp_path / "data", settings).eval()
    tokens = torch.arange(2, 18)[None]
    with torch.no_grad():
        found, reference = (one.logits(one(tokens, one.initial_state(1))[0]) for one in (model, expected))
    largest = float(reference.abs().max())
    assert float((found - reference).abs().max()) < largest * error


def flags(tmp_path: Path, run: str, *more: str) -> list[str]:
    """Return the flags of a run in an untied model with new words, validated at its end."""
    places = [
        f"--data.folder={tmp_path / 'data'}",
        f"--run_folder={tmp_path / run}",
        f"--init_from={tmp_path / 'base/runs/small'}",
    ]
    return [*places, *model_flags(UNTIED), "--model.dropout=0.3", "--training.steps=6", "--checkpoint.every_steps=1", *more]


@pytest.fixture
def base(tmp_path) -> Path:
    """A base beside a data folder with other words."""
    make_data(tmp_path / "data", "whitespace", NEW_WORDS)
    return make_run(tmp_path / "base", UNTIED, "whitespace", PLAIN_WORDS)


def parameters(run: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    return read_tensors(HeldFolder(newest), "model.safetensors")


def test_a_run_says_what_it_took_and_resumes_without_it_bit_for_bit(base, tmp_path, capsys):
    more = ["--checkpoint.keep=9", "--init.freeze=layers.0", "--init.freeze_steps=4", "--optimizer.layer_decay=0.5"]
    train_here(*flags(tmp_path, "whole", *more))
    shared = len({*NEW_WORDS} & {*PLAIN_WORDS}) + 2
    new, left = len(NEW_WORDS) + 2 - shared, len(PLAIN_WORDS) + 2 - shared
    said = f"from {base} (small, step 7): {shared} words keep their rows, {new} are new, {left} of its words are left out"
    shown = capsys.readouterr().err
    assert said in shown
    assert "layers.0 not trained until step 4" in shown
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step-{step:09d}")
    base.rename(tmp_path / "gone")
    train_here(*flags(tmp_path, "stopped", *more, "--resume=auto"))
    assert said in capsys.readouterr().err
    for key, value in parameters(tmp_path / "whole").items():
        assert torch.equal(parameters(tmp_path / "stopped")[key], value), key
    with pytest.raises(UsageError, match=r"another recipe: init_from: the run has .*, the recipe other"):
        train_here(*flags(tmp_path, "stopped", *more, "--resume=auto", "--init_from=other"))

    facts = read_manifest(find_checkpoint(tmp_path / "stopped"))["progress"]["started_from"]
    assert (facts["base"], facts["run"], facts["step"], facts["words_new"]) == (str(base), "small", 7, new)
    export.main([str(tmp_path / "stopped"), "-o", str(tmp_path / "bundle"), "--data=none"])
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["started_from"] == facts
    tags = provenance("", {**facts, "run_id": "ab" * 16})
    assert (tags["lmdist.init.base"], tags["mlflow.parentRunId"]) == (str(base), "ab" * 16)
    assert "lmdist.init.vectors" not in tags


@pytest.mark.parametrize("run_id", ["", "abc", "AB" * 16, "ab" * 17, 7, None, ["ab" * 16]])
def test_a_strangers_base_places_no_run_in_mlflow(run_id):
    tags = provenance("", {"run": "x" * 10_000, "run_id": run_id})
    assert "mlflow.parentRunId" not in tags
    assert run_id_of({"run_id": run_id}) == ""
    assert max(map(len, tags.values())) == LONGEST_TAG


def test_the_number_of_ranks_changes_nothing(base, tmp_path):
    small = "--data.global_batch=8 --data.window=7 --training.log_every=1 --training.device=cpu --training.precision=fp32 "
    for ranks in (1, 2):
        train(ranks, *f"{small}--tracking.mlflow=false --sample.words=0".split(), *flags(tmp_path, str(ranks)), cwd=tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=0, atol=1e-5)
    for key, value in parameters(tmp_path / "1").items():
        torch.testing.assert_close(parameters(tmp_path / "2")[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (
            ["--model.hidden_size=12"],
            UsageError,
            "hidden_size 12.: give --model.hidden_size 10",
        ),
        (["--model.num_layers=3"], UsageError, "--model.num_layers 2"),
        (["--model.tied=true"], UsageError, "--model.tied false"),
        (["--model.hidden_size=20", "--model.head=adaptive"], UsageError, "--model.hidden_size 10 --model.head full"),
        (["--init_from=none"], MissingInputError, "none does not exist"),
        (["--init_from=data"], MissingInputError, "holds no checkpoint"),
        (["--data.folder=lowercase"], UsageError, "read text with lowercase False, and lowercase was prepared with True"),
        (["--data.folder=foreign"], UsageError, "has none of the words of foreign"),
        (["--init_from=cut"], DataError, "cut.model.safetensors is damaged: it has"),
        (["--init_from=cut-bundle"], DataError, "weights.bin is damaged"),
        (["--init.embeddings=none.vec"], MissingInputError, "none.vec does not exist"),
        (["--init.freeze=layers.2"], UsageError, "init.freeze has layers.2; the parts of this model are embedding, layers.0"),
        (["--init.freeze=embedding,layers.0,layers.1,projection"], UsageError, "nothing is left to train"),
        (["--init.freeze_steps=3"], UsageError, "give init.freeze as well"),
        (["--optimizer.layer_decay=0"], UsageError, "optimizer.layer_decay is 0"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(base, tmp_path, monkeypatch, more, error, message):
    monkeypatch.chdir(tmp_path)
    if "foreign" in more[0]:
        make_data(tmp_path / "foreign", "whitespace", ["un", "deux"])
    if "lowercase" in more[0]:
        text = json.loads((make_data(tmp_path / "lowercase", "whitespace", NEW_WORDS) / "text.json").read_text())
        text["settings"]["lowercase"] = True
        write_again(tmp_path / "lowercase", "text.json", json.dumps(text))
    if "=cut" in more[0]:
        copied = shutil.copytree(find_checkpoint(base), tmp_path / "cut")
        (copied / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes()[:-100])
    if "cut-bundle" in more[0]:
        export.main([str(base), "-o", "cut-bundle", "--data=none"])
        weights = tmp_path / "cut-bundle" / "weights.bin"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(error, match=message) as found:
        train_here(*flags(tmp_path, "run", *more))
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def write_again(folder: Path, name: str, content: str) -> None:
    """Replace a file of a data folder, and its checksum."""
    (folder / name).write_text(content)
    meta = json.loads((folder / "meta.json").read_text())
    import hashlib

    meta["files"][name] = {"bytes": len(content.encode()), "sha256": hashlib.sha256(content.encode()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


# --- parts that are not trained, rates of layers ---------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_parts_stay_as_they_were_and_move_later(base, tmp_path, ranks):
    """Weight decay and the average leave them alone, too."""
    more = "--init.freeze=embedding,layers.0 --init.freeze_steps=3 --optimizer.weight_decay=0.5 --averaging.name=ema".split()
    small = "--data.global_batch=8 --data.window=7 --training.device=cpu --training.precision=fp32 --tracking.mlflow=false"
    train(ranks, *small.split(), *flags(tmp_path, "run", *more, "--checkpoint.keep=9"), cwd=tmp_path)
    at = {step: tmp_path / f"run/checkpoints/step-{step:09d}" for step in (1, 3, 4)}
    first, third, fourth = (read_tensors(HeldFolder(folder), "model.safetensors") for folder in at.values())
    average = read_tensors(HeldFolder(at[3]), "averaged.safetensors")
    for key in first:
        is_frozen = key.startswith(("embedding", "layers.0"))
        assert torch.equal(first[key], third[key]) == is_frozen, key
        assert torch.equal(average[key], third[key]) == is_frozen, key
        assert not torch.equal(third[key], fourth[key]), key
    model = started(base, tmp_path / "data", UNTIED)
    assert torch.equal(first["embedding.weight"], model.embedding.weight)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_layer_decay_scales_the_steps_of_lower_layers(tmp_path, name):
    settings = dataclasses.replace(MODELS[name], num_layers=2)
    data = make_data(tmp_path / "data", "whitespace", PLAIN_WORDS)
    plain = f"--data.folder={data} --optimizer.name=sgd --optimizer.clip=0 --optimizer.weight_decay=0 --training.steps=1 "
    plain += "--schedule.name=constant --optimizer.learning_rate=1 --sample.words=0 --model.dropout=0"
    moved = []
    for decay in (1.0, 0.5):
        run = tmp_path / str(decay)
        train_here(*plain.split(), *model_flags(settings), f"--run_folder={run}", f"--optimizer.layer_decay={decay}")
        torch.manual_seed(1)
        before = dict(LanguageModel(settings, len(PLAIN_WORDS) + 2).named_parameters())
        moved.append({key: value - before[key].detach() for key, value in parameters(run).items()})
    shares = {"layers.1": 0.5, "layers.0": 0.25, "embedding": 1.0 if name == "tied" else 0.125, "projection": 1.0}
    for key, whole in moved[0].items():
        share = next(value for part, value in shares.items() if key.startswith(part))
        torch.testing.assert_close(moved[1][key], share * whole, rtol=1e-3, atol=1e-6, msg=key)
        assert whole.any(), key


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_weight_decay_may_leave_out_biases_and_the_embedding(tmp_path, name):
    data = make_data(tmp_path / "data", "whitespace", PLAIN_WORDS)
    plain = f"--data.folder={data} --optimizer.name=sgd --optimizer.clip=0 --optimizer.weight_decay=0.25 --training.steps=1 "
    plain += "--schedule.name=constant --optimizer.learning_rate=1 --sample.words=0 --model.dropout=0"
    after = {}
    for of in ("all", "matrices"):
        run = tmp_path / of
        train_here(*plain.split(), *model_flags(MODELS[name]), f"--run_folder={run}", f"--optimizer.weight_decay_of={of}")
        after[of] = parameters(run)
    torch.manual_seed(1)
    before = dict(LanguageModel(MODELS[name], len(PLAIN_WORDS) + 2).named_parameters())
    for key, value in after["all"].items():
        share = 0.25 if value.ndim == 1 or key == "embedding.weight" else 0
        torch.testing.assert_close(after["matrices"][key], value + share * before[key].detach(), rtol=1e-3, atol=1e-6, msg=key)


# --- the layers' first parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_begins_with_the_parameters_that_init_names(tmp_path, ranks):
    data = make_data(tmp_path / "data", "whitespace", PLAIN_WORDS)
    flags = f"--data.folder={data} --optimizer.name=sgd --optimizer.learning_rate=1e-12 --training.steps=1 --sample.words=0 "
    flags += "--data.global_batch=8 --data.window=7 --training.precision=fp32 --tracking.mlflow=false"
    for run, more in {"plain": "", "own": " --init.recurrent=orthogonal --init.forget_gate_bias=1.5"}.items():
        train(ranks, *f"{flags}{more}".split(), *model_flags(TIED), f"--run_folder={tmp_path / run}", cwd=tmp_path)
    plain, own = parameters(tmp_path / "plain"), parameters(tmp_path / "own")
    for key, value in own.items():
        expected = plain[key].clone()
        if key.endswith("weight_hh_l0"):
            value = torch.stack([gate @ gate.t() for gate in value.chunk(4)])
            expected = torch.eye(value.shape[1]).expand_as(value)
        elif "bias" in key and key.startswith("layers."):
            expected.chunk(4)[1].fill_(1.5 if "_ih_" in key else 0.0)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=key)


# --- word vectors ----------------------------------------------------------------------------------------------------


def test_vectors_are_the_embeddings_of_their_words_and_come_out_the_same(base, tmp_path, capsys):
    words = Vocabulary.load(tmp_path / "data" / "vocab.txt")
    (tmp_path / "in.vec").write_text("4 6\nlion 1 2 3 4 5 6\nbear 2 2 2 2 2 2\nthe 9 9 9 9 9 9\nzebra 1 1 1 1 1 1\n")
    given = f"--init.embeddings={tmp_path / 'in.vec'}"
    train_here(*flags(tmp_path, "run", given, "--init.freeze=embedding"))
    assert "of 2 of 3 words that are new (66.7%), 1 in another spelling" in capsys.readouterr().err
    embedding = parameters(tmp_path / "run")["embedding.weight"]
    assert embedding[words.ids["lion"]].tolist() == [1, 2, 3, 4, 5, 6]
    assert embedding[words.ids["Bear"]].tolist() == [2] * 6
    of_base = open_checkpoint(find_checkpoint(base)).model().embedding.weight[2 + PLAIN_WORDS.index("dog")]
    assert torch.equal(embedding[words.ids["dog"]], of_base), "a word of the base has its own row"

    export.main([str(tmp_path / "run"), "--vectors", str(tmp_path / "out.vec")])
    assert "out.vec" in capsys.readouterr().out
    assert read_vectors(tmp_path / "out.vec", words, 6).rows.tobytes() == embedding.numpy().tobytes()
    facts = read_manifest(find_checkpoint(tmp_path / "run"))["progress"]["started_from"]
    assert (facts["vectors_words"], facts["vectors_taken"], facts["vectors_by_lowercase"]) == (3, 2, 1)

    alone = started(Path(), tmp_path / "data", UNTIED, embeddings=str(tmp_path / "in.vec"))
    assert alone.embedding.weight[words.ids["lion"]].tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match=r"vectors of 6 numbers, and the model's have 8: give --model.embedding_size 6"):
        started(Path(), tmp_path / "data", TIED, embeddings=str(tmp_path / "in.vec"))


def test_a_run_from_nothing_says_nothing():
    assert lines_of(None) == []
    assert config.load([]).init == InitSettings()
    assert config.load(["--init.freeze=embedding, layers.0"]).init.freeze == ["embedding", "layers.0"]
    assert config.load(['--init.freeze=["embedding"]']).init.freeze == ["embedding"]
