"""Graphs agree with torch in every precision; verification finds what does not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from lmdist.errors import DataError, UsageError
from lmdist.model import lstm
from lmdist.model.language_model import LanguageModel
from lmdist.perplexity import TextSize
from lmdist.settings import ModelSettings
from lmdist.storage.held import HeldFolder
from lmdist_export import PRECISIONS
from lmdist_export.bundle import WEIGHTS, Bundle
from lmdist_export.conversion import verify
from lmdist_export.conversion.verify import torch_step
from lmdist_export.conversion.weights import quantize_int4, quantize_int8, write_graphs
from lmdist_export.graph import cell
from lmdist_export.graph.sizes import NBITS_BLOCK, Sizes, weights
from lmdist_export.sampling.sampler import Sampler
from support.small_bundles import (
    ADAPTIVE,
    SINGLE,
    TIED,
    UNTIED,
    bare_bundle,
    make_model,
)

VOCABULARY_SIZE = 23


def bare(settings: ModelSettings, folder: Path, precision: str = "fp32") -> Bundle:
    """A small bundle that has not been verified."""
    return bare_bundle(folder / "bare", settings, precision, VOCABULARY_SIZE)


# --- what the graphs answer ----------------------------------------------------------------------------------------


def rounded(model: LanguageModel, precision: str) -> LanguageModel:
    """The model with its weights as they are stored."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.numpy()
            if precision == "fp16" and values.ndim == 2:
                values = values.astype(np.float16)
            elif precision == "int4" and name == "projection.weight":
                values = dequantize_int4(*quantize_int4(values), values.shape[1])
            elif precision in ("int8", "int4") and values.ndim == 2:
                integers, scale = quantize_int8(values)
                values = integers * scale[:, None]
            parameter.copy_(torch.from_numpy(values))
    return model


def dequantize_int4(integers: NDArray[np.uint8], scale: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
    """The values of `quantize_int4`, as the documentation of MatMulNBits has them: the low half byte first."""
    numbers = np.stack([integers & 15, integers >> 4], axis=-1).reshape(*integers.shape[:2], -1).astype(np.float32) - 8
    return (numbers * scale.reshape(*integers.shape[:2], 1)).reshape(len(integers), -1)[:, :inputs]


# Rows of more than one block of 4-bit numbers.
WIDE = ModelSettings(embedding_size=6, hidden_size=150, num_layers=1, dropout=0.0, tied=False)
# What is left beside the weights: of fp32 the order of sums, of the others that outputs of layers are rounded too.
ANSWERS = [
    *((settings, "fp32", 1e-5) for settings in (TIED, UNTIED, SINGLE, ADAPTIVE)),
    *((settings, "fp16", 1e-5) for settings in (TIED, UNTIED, ADAPTIVE)),
    *((settings, "int8", 0.02) for settings in (TIED, UNTIED, ADAPTIVE, WIDE)),
    *((settings, "int4", 0.02) for settings in (UNTIED, WIDE)),
]
NAMES = {id(TIED): "tied", id(UNTIED): "untied", id(SINGLE): "single", id(ADAPTIVE): "adaptive", id(WIDE): "wide"}


def test_the_graphs_have_the_parts_of_torchs_state_in_its_order() -> None:
    assert cell.STATE == lstm.STATE_PARTS


@pytest.mark.parametrize(("settings", "precision", "allowed"), ANSWERS, ids=lambda value: NAMES.get(id(value), str(value)))
def test_the_graph_answers_as_torch_does(settings: ModelSettings, precision: str, allowed: float, tmp_path: Path) -> None:
    sampler = Sampler(bare(settings, tmp_path, precision), threads=1)
    model = rounded(make_model(settings, VOCABULARY_SIZE), precision)
    random = np.random.default_rng(1)
    # Over many words an LSTM makes much of little.
    for rows, length in [(1, 1), (9, 1), (50, 1)] if sampler.sizes.is_quantized else [(1, 1), (2, 3), (7, 11), (1, 40), (9, 1)]:
        tokens = random.integers(0, VOCABULARY_SIZE, (rows, length))
        state = tuple(random.uniform(-1, 1, (2, rows, sum(model.layer_sizes))).astype(np.float32))
        logits, after = sampler.step(tokens, state)
        expected, expected_after = torch_step(model, tokens, state)
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=allowed * max(1, np.abs(expected).max()))
        np.testing.assert_allclose(after, expected_after, atol=2 * allowed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_verification_passes_what_is_right(precision: str, tmp_path: Path) -> None:
    differences = verify.check_values(Sampler(bare(TIED, tmp_path, precision), threads=1), make_model(TIED, VOCABULARY_SIZE))
    allowed = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.05, "int4": 0.3}[precision]
    assert set(differences) == {"logits", "next_h", "next_c", "step_by_step"}
    assert all(0 <= value < allowed for value in differences.values())
    assert differences["step_by_step"] < 1e-5
    assert (differences["logits"] > 1e-5) == (precision != "fp32")  # it is measured


@given(rows=st.integers(1, 5), inputs=st.integers(1, 200), seed=st.integers(0, 2**32), digits=st.integers(-3, 3))
def test_few_bits_are_half_a_unit_off_at_most(rows: int, inputs: int, seed: int, digits: int) -> None:
    random = np.random.default_rng(seed)
    values = (random.normal(size=(rows, inputs)) * 10.0**digits).astype(np.float32)
    values[random.random((rows, inputs)) < 0.1] = 0
    integers, scale = quantize_int8(values)
    assert np.abs(integers).max() <= 127
    assert (np.abs(integers * scale[:, None] - values) <= 0.5001 * scale[:, None]).all()
    integers, scale = quantize_int4(values)
    assert integers.shape == (rows, -(-inputs // NBITS_BLOCK), NBITS_BLOCK // 2)
    units = np.repeat(scale.reshape(rows, -1), NBITS_BLOCK, axis=1)[:, :inputs]  # with the sign of what is -8 of them
    off = np.abs(dequantize_int4(integers, scale, inputs) - values)
    # There is one more below zero than above: what is as large as the largest on the other side is a whole unit off.
    assert (off <= 1.0001 * np.abs(units)).all()
    assert (off <= 0.5001 * np.abs(units))[values / units <= 7.5].all()


def test_rows_of_zeros_stay_zeros() -> None:
    nothing = np.zeros((2, 70), np.float32)
    integers, scale = quantize_int8(nothing)
    assert not (integers * scale[:, None]).any()
    assert not dequantize_int4(*quantize_int4(nothing), 70).any()


# --- what verification finds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", weights(Sizes([10, 10], VOCABULARY_SIZE, 6, tied=False)))
def test_one_wrong_number_is_found(name: str, tmp_path: Path) -> None:
    bundle = bare(UNTIED, tmp_path)
    model = make_model(UNTIED, VOCABULARY_SIZE)
    weight = weights(bundle.sizes)[name]
    count = int(np.prod((VOCABULARY_SIZE, *weight.shape[1:]) if name.startswith("projection") else weight.shape))
    content = (bundle.folder / WEIGHTS).read_bytes()
    for place in (0, count // 2, count - 1):
        numbers = np.frombuffer(content, np.float32).copy()
        numbers[weight.offset // 4 + place] += 0.3
        (bundle.folder / WEIGHTS).write_bytes(numbers.tobytes())
        with pytest.raises(verify.MismatchError):
            verify.check_values(Sampler(opened_again(bundle), threads=1), model)
    (bundle.folder / WEIGHTS).write_bytes(content)
    verify.check_values(Sampler(opened_again(bundle), threads=1), model)


def opened_again(bundle: Bundle) -> Bundle:
    """Return a bundle with what its files hold now."""
    return dataclasses.replace(bundle, files=HeldFolder(bundle.folder))


def test_a_difference_that_is_no_number_is_a_mismatch() -> None:
    with pytest.raises(verify.MismatchError, match="nan"):
        verify.max_error("logits", np.array([np.nan]), np.array([1.0]), 1e-4)


def test_a_model_whose_logits_are_not_finite_is_rejected(tmp_path: Path) -> None:
    bundle, model = bare(SINGLE, tmp_path), make_model(SINGLE, VOCABULARY_SIZE)
    with torch.no_grad():
        model.get_parameter("projection.weight").fill_(3e38)
    with pytest.raises(DataError, match="the logits of the model are not finite"):
        verify.check_values(Sampler(dataclasses.replace(bundle, sizes=write_graphs(model, bundle.folder, "small"))), model)


def test_a_model_whose_perplexity_is_not_finite_is_rejected(tmp_path: Path) -> None:
    bundle, model = bare(SINGLE, tmp_path), make_model(SINGLE, VOCABULARY_SIZE)
    with torch.no_grad():
        model.get_parameter("projection.bias")[0] = 2000.0  # nats of each token but the first, finite
    sampler = Sampler(dataclasses.replace(bundle, sizes=write_graphs(model, bundle.folder, "small")))
    with pytest.raises(DataError, match="the perplexity of the model on the valid split is not finite"):
        verify.check_perplexity(sampler, model, "valid", np.full(40, 5), 0.0)


def test_perplexity_is_that_of_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TIED, VOCABULARY_SIZE)
    monkeypatch.setattr(verify, "HELD_OUT_STREAMS", 1)
    monkeypatch.setattr(verify, "HELD_OUT_TOKENS", 150)  # more than one piece of 64
    tokens = np.random.default_rng(2).integers(0, VOCABULARY_SIZE, 400)
    size = TextSize(200, 1500)  # of 400 tokens
    measured = verify.check_perplexity(Sampler(bare(TIED, tmp_path)), model, "valid", tokens, 0.0, size)
    inputs = torch.tensor([[1, *tokens[:149]]])
    with torch.no_grad():
        hidden, _ = model(inputs, model.initial_state(1))
        logits = model.logits(hidden)
        expected = functional.cross_entropy(logits[0], torch.from_numpy(tokens[:150])).exp().item()
    assert measured["tokens"] == 150
    assert measured["torch"] == pytest.approx(expected, rel=1e-5)
    assert measured["onnxruntime"] == pytest.approx(expected, rel=1e-5)
    assert measured["perplexity_per_word"] == pytest.approx(expected**2, rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(math.log2(expected) * 400 / 1500, rel=1e-4)
    assert measured["loss_percent"] == pytest.approx(0, abs=1e-3)
    assert measured["top_1_agreement"] == 1
    assert 0 < measured["largest_logit_difference"] < 1e-4


def test_what_a_precision_costs_is_measured(tmp_path: Path) -> None:
    model, sampler = make_model(TIED, VOCABULARY_SIZE), Sampler(bare(TIED, tmp_path, "int4"), threads=1)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY_SIZE, 500)
    measured = verify.check_perplexity(sampler, model, "valid", tokens, 10.0)
    logits, expected = [], []
    ours = theirs = sampler.initial_state(16)
    for inputs, targets in verify.stream_batches(tokens, 16, 64):
        (of_ours, ours), (of_torch, theirs) = sampler.step(inputs, ours), torch_step(model, inputs, theirs)
        there = targets >= 0
        logits.append(of_ours[there])
        expected.append(of_torch[there])
    found, right = np.concatenate(logits), np.concatenate(expected)
    assert len(found) == 500
    assert measured["largest_logit_difference"] == pytest.approx(np.abs(found - right).max(), rel=1e-4)
    assert measured["top_1_agreement"] == (found.argmax(axis=1) == right.argmax(axis=1)).mean()
    assert measured["loss_percent"] == pytest.approx(100 * (measured["onnxruntime"] / measured["torch"] - 1))
    with pytest.raises(UsageError, match=rf"precision int4 costs {measured['loss_percent']:.2f} % .* allowed is -20 %"):
        verify.check_perplexity(sampler, model, "valid", tokens, -20.0)


def test_perplexity_of_uneven_streams_counts_each_word_once(tmp_path: Path) -> None:
    counted = [targets[targets >= 0] for _, targets in verify.stream_batches(np.arange(101), rows=16, window=3)]
    assert sorted(np.concatenate(counted)) == list(range(101))
