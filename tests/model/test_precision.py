"""Layers in bf16 against fp32, what an incorrect kernel leads to, and training by each fast path against the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from corpora import chain, write_data_folder
from lmdist.errors import UsageError
from lmdist.model import lstm, precision
from lmdist.model.language_model import LanguageModel, cutoffs
from lmdist.model.lstm import KERNELS, Layer
from lmdist.model.precision import Precision, choose, choose_kernels, gradient_error, unmet_persistent_conditions
from lmdist.settings import ModelSettings
from lmdist.training.checkpoints.read import open_checkpoint
from lmdist.training.checkpoints.retain import find_checkpoint
from lmdist.training.evaluate import main as evaluate
from support.jobs import losses, train_here

CPU = torch.device("cpu")
SETTINGS = ModelSettings(embedding_size=16, hidden_size=24, tied=False)


# --- a layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("input_size", "hidden_size", "batch_size", "length"), [(16, 24, 3, 5), (40, 32, 1, 1), (8, 100, 7, 2), (64, 64, 8, 9)]
)
def test_gradients_in_bf16_are_those_of_fp32(kernel, input_size, hidden_size, batch_size, length):
    torch.manual_seed(0)
    assert gradient_error(Layer(input_size, hidden_size), kernel, batch_size, length) < 0.02


def test_the_state_is_carried_on_by_matmul_as_by_onednn():
    torch.manual_seed(0)
    layer = Layer(12, 20)
    layer.kernel = "matmul"
    inputs, state = torch.randn(4, 10, 12), (torch.randn(4, 20), torch.randn(4, 20))
    expected, expected_state = layer(inputs, state)
    leaves = [part.clone().requires_grad_() for part in state]
    with torch.autocast("cpu", torch.bfloat16):
        first, between = layer(inputs[:, :6], (leaves[0], leaves[1]))
        second, after = layer(inputs[:, 6:], between)
    torch.testing.assert_close(torch.cat([first, second], 1).float(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(after, expected_state, atol=0.03, rtol=0.02)
    # Backward through the state into the batch before.
    by_h, by_c = torch.autograd.grad(after[0].sum() + after[1].sum(), leaves)
    leaves = [part.clone().requires_grad_() for part in state]
    _, (h, c) = layer(inputs, (leaves[0], leaves[1]))
    for found, expected in zip((by_h, by_c), torch.autograd.grad(h.sum() + c.sum(), leaves), strict=True):
        assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("kernel", [*KERNELS, "fp32"])
def test_recurrent_weights_are_replaced_for_a_call_and_have_the_gradient(kernel):
    layer, plain = Layer(12, 20), nn.LSTM(12, 20, batch_first=True)
    layer.kernel = kernel
    inputs, state = torch.randn(4, 10, 12), (torch.zeros(4, 20), torch.zeros(4, 20))
    plain.load_state_dict(layer.state_dict())
    recurrent = torch.rand(80, 20).sub_(0.5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = layer(inputs, state, recurrent)
    found.float().sum().backward()
    weights = plain.get_parameter("weight_hh_l0")
    with torch.no_grad():
        weights.copy_(recurrent)
    expected, _ = plain(inputs)
    expected.sum().backward()
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    assert recurrent.grad is not None
    assert weights.grad is not None
    assert (recurrent.grad - weights.grad).norm() / weights.grad.norm() < 0.03
    assert layer.get_parameter("weight_hh_l0").grad is None


def test_a_kernel_with_an_incorrect_backward_is_found_and_not_used(monkeypatch):
    model = LanguageModel(SETTINGS, 30)
    correct = lstm.GatedLSTM.backward

    def incorrect(ctx, *gradients):  # as oneDNN's for sizes of 1024 and more on AMX
        return tuple(gradient if gradient is None else torch.rand_like(gradient) for gradient in correct(ctx, *gradients))

    monkeypatch.setattr(precision, "LARGE_LAYER", 1)
    assert choose_kernels(model, 4, 5) == []
    assert [layer.kernel for layer in model.layers] == ["matmul", "matmul"]
    monkeypatch.setattr(lstm.GatedLSTM, "backward", staticmethod(incorrect))
    assert choose_kernels(model, 4, 5) == []
    assert [layer.kernel for layer in model.layers] == ["onednn", "onednn"]


def test_a_layer_without_a_correct_kernel_stays_in_fp32_with_a_warning(monkeypatch):
    model = LanguageModel(SETTINGS, 30)
    monkeypatch.setattr(precision, "gradient_error", lambda layer, *_: 1.0 if layer.input_size == 16 else 0.004)
    warnings = choose_kernels(model, 4, 5)
    assert len(warnings) == 1
    assert (
        "LSTM layer 16 -> 24 are incorrect on this processor (relative error: onednn 1, matmul 1); the layer stays"
        in warnings[0]
    )
    assert [layer.kernel for layer in model.layers] == ["fp32", "onednn"]
    inputs, state = torch.randn(4, 10, 16), (torch.zeros(4, 24), torch.zeros(4, 24))
    expected, _ = model.layers[0](inputs, state)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model.layers[0](inputs, state)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_is_given_is_of_one_type_and_one_block(dtype, monkeypatch):
    torch.manual_seed(0)
    layer, given = Layer(12, 20), []
    inputs, state = torch.randn(4, 10, 12), (torch.randn(4, 20), torch.randn(4, 20))
    recurrent = torch.rand(80, 20).sub_(0.5).requires_grad_()
    expected = layer(inputs, state, recurrent)[0].detach()
    (by_plain,) = torch.autograd.grad(layer(inputs, state, recurrent)[0].sum(), [recurrent])
    compute = Layer.compute
    monkeypatch.setattr(Layer, "compute", lambda *arguments: given.append(arguments) or compute(*arguments))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, _ = layer.cast_and_compute(inputs, state, recurrent)
    ((_, values, parts, weights),) = given
    assert {value.dtype for value in (values, *parts, *weights, found)} == {dtype}
    places = [weights[0].data_ptr()]
    for weight in weights:
        places.append(places[-1] + weight.numel() * weight.element_size())
    assert [weight.data_ptr() for weight in weights] == places[:-1]
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    (by_block,) = torch.autograd.grad(found.float().sum(), [recurrent])
    assert (by_block - by_plain).norm() / by_plain.norm() < tolerance


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "name"), [(5.0, "bf16"), (1.5, "fp32"), (0.3, "fp32")])
def test_auto_takes_bf16_on_a_cpu_that_is_much_faster_by_it(monkeypatch, gain, name):
    monkeypatch.setattr(precision, "bf16_speedup", lambda settings: gain)
    assert choose("auto", "", CPU, SETTINGS, 8) == Precision(name, f"bf16 runs at {gain} times the speed of fp32 here")
    assert choose("auto", "bf16", CPU, SETTINGS, 8).name == "bf16"  # as the run was begun
    assert choose("auto", "fp16", CPU, SETTINGS, 8).name == name  # begun on a GPU
    assert choose("bf16", "fp32", CPU, SETTINGS, 8).name == "bf16"


def test_the_gain_is_measured():
    assert 0.01 < precision.bf16_speedup(SETTINGS) < 100


@pytest.mark.parametrize("name", ["fp16", "tf32"])
def test_what_a_cpu_has_not_is_rejected(name):
    with pytest.raises(UsageError, match="auto, fp32 or bf16"):
        choose(name, "", CPU, SETTINGS, 8)


def test_what_misses_the_persistent_kernel_is_named():
    fast = ModelSettings(embedding_size=256, hidden_size=1024)
    assert unmet_persistent_conditions(fast, 64, "fp16") == []
    assert unmet_persistent_conditions(fast, 20, "bf16") == [
        "precision bf16 (fp16)",
        "batch size 20 per GPU (a multiple of 8, at most 128)",
    ]
    assert unmet_persistent_conditions(ModelSettings(embedding_size=400, hidden_size=1152), 80, "fp16") == [
        "embedding_size 400 (a multiple of 128)",
        "a layer of 1152 (at most 1024)",
    ]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    splits = {"train": chain(4000, 300), "valid": chain(300, 300, seed=1), "test": chain(300, 300, seed=2)}
    return write_data_folder(tmp_path / "data", splits, 300)


def curve(data, name, *flags):
    run = data.parent / name
    train_here(f"--data.folder={data}", f"--run_folder={run}", "--model.dropout=0", "--training.epochs=2", *flags)
    return np.array(losses(run))


@pytest.mark.parametrize("large_layer", [1, 10_000], ids=["matmul", "onednn"])
def test_training_in_bf16_follows_fp32(data, monkeypatch, large_layer):
    monkeypatch.setattr(precision, "LARGE_LAYER", large_layer)
    plain = curve(data, "plain")
    assert plain[-10:].mean() < plain[:10].mean() - 0.5
    bf16 = curve(data, "bf16", "--training.precision=bf16")
    assert np.abs(bf16 - plain).max() < 0.1  # another seed changes the last losses by 0.3
    parts = curve(data, "parts", "--training.precision=bf16", "--training.accumulation=2")
    assert np.abs(parts - plain).max() < 0.1


def test_auto_is_resolved_once_for_a_run(data, monkeypatch, capfd):
    monkeypatch.setattr(precision, "bf16_speedup", lambda settings: 7.0)
    curve(data, "run", "--training.precision=auto", "--training.steps=3")
    assert "speed  bf16 (bf16 runs at 7.0 times the speed of fp32 here)" in capfd.readouterr().err
    monkeypatch.setattr(precision, "bf16_speedup", lambda settings: 0.5)
    curve(data, "run", "--training.precision=auto", "--training.steps=5", "--resume=auto")
    assert "speed  bf16 (as the run was started)" in capfd.readouterr().err
    assert 'precision = "bf16"' in (data.parent / "run" / "recipe.toml").read_text()


def test_an_adaptive_model_trains_resumes_and_is_evaluated_exactly(data, capsys):
    flags = ("--model.head=adaptive", "--model.tied=false")
    whole = curve(data, "whole", *flags)
    assert whole[-10:].mean() < whole[:10].mean() - 0.5
    curve(data, "parts", *flags, "--training.steps=30", "--schedule.name=constant")
    curve(data, "parts", *flags, "--training.steps=60", "--schedule.name=constant", "--resume=auto")
    unstopped = curve(data, "unstopped", *flags, "--training.steps=60", "--schedule.name=constant")
    np.testing.assert_array_equal(losses(data.parent / "parts"), unstopped)

    run = data.parent / "whole"
    capsys.readouterr()
    evaluate([str(run), "--device=cpu"])
    found = capsys.readouterr().out
    model = open_checkpoint(find_checkpoint(run)).model()
    tokens = torch.from_numpy(np.fromfile(data / "test.bin", "<u2").astype(np.int64))
    inputs = torch.cat([torch.tensor([1]), tokens[:-1]])
    with torch.no_grad():
        hidden, _ = model(inputs[None], model.initial_state(1))
        log_p = model.logits(hidden)[0]
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(tokens)))
    perplexity = log_p.gather(1, tokens[:, None]).mean().neg().exp().item()
    assert f"{perplexity:,.2f}" in found


@pytest.mark.parametrize("vocabulary_size", [2, 3, 4, 10, 100, 33_278, 300_000])
def test_clusters_fit_every_vocabulary(vocabulary_size):
    cuts = cutoffs(vocabulary_size)
    assert cuts == sorted(set(cuts))
    assert cuts[0] > 0
    assert cuts[-1] < vocabulary_size


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"head": "adaptive"}, "give model.tied false as well"),
        ({"head": "adaptive", "tied": False, "hidden_size": 8}, "it must be at least 16"),
        ({"weight_dropout": 1.0}, "model.weight_dropout is 1.0"),
    ],
)
def test_settings_that_make_no_model(settings, reason):
    with pytest.raises(UsageError, match=reason):
        ModelSettings(**settings)
