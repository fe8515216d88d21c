"""Dropout: its masks by their statistics, and a model with all of them against one that is computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmdist.model.dropout import Masks, drop, rounded
from lmdist.model.language_model import LanguageModel
from lmdist.settings import ModelSettings

ALL = ModelSettings(
    embedding_size=60,
    hidden_size=90,
    num_layers=3,
    dropout=0.0,
    dropout_input=0.4,
    dropout_hidden=0.2,
    dropout_output=0.3,
    dropout_embedding=0.1,
    weight_dropout=0.5,
)
VOCABULARY_SIZE = 2_000


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LanguageModel(ALL, VOCABULARY_SIZE)


def draw(model: LanguageModel, seed: int = 1, step: int = 7, part: slice = slice(None)) -> Masks:
    return model.dropout.draw(seed, step, 48, part)


def test_each_place_has_its_probability(model):
    masks = draw(model)
    kept = [*masks.rows.split([60, 90, 90, 60], dim=1), masks.words, masks.weights]
    for mask, rate in zip(kept, [0.4, 0.2, 0.2, 0.3, 0.1, 0.5], strict=True):
        assert set(mask.unique().tolist()) == {0, 1}
        deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
        assert mask.float().mean().item() == pytest.approx(1 - rate, abs=4 * deviation)


def test_a_mask_is_a_function_of_seed_step_and_row(model):
    masks = draw(model)
    for again, drawn in zip(draw(model), masks, strict=True):
        assert torch.equal(again, drawn)
    for other in (draw(model, seed=2), draw(model, step=8), draw(model, seed=-1)):
        for another, drawn in zip(other, masks, strict=True):
            # Independent masks of 0.5 agree in half of their numbers, of 0.1 in 82 %.
            assert (another == drawn).float().mean() < 0.9
    agreement = (masks.rows[:, None] == masks.rows).float().mean(2)  # of each pair of rows
    assert agreement.fill_diagonal_(0).max() < 0.8
    for ranks in (1, 2, 4):
        parts = [draw(model, part=slice(48 // ranks * rank, 48 // ranks * (rank + 1))) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.rows for part in parts]), masks.rows)
        for part in parts:
            assert torch.equal(part.words, masks.words)
            assert torch.equal(part.weights, masks.weights)


def test_a_model_with_all_of_them_is_the_one_computed_by_hand(model):
    masks, tokens = draw(model), torch.randint(VOCABULARY_SIZE, (48, 5))
    state = tuple(torch.randn(48, 240) for _ in range(2))
    found, new_state = model(tokens, state, masks)
    found = model.dropout.drop_vectors(found, -1, masks)

    embedding = model.embedding.weight * masks.words[:, None] / 0.9
    inputs, between, after, outputs = (part[:, None] for part in masks.rows.split([60, 90, 90, 60], dim=1))
    weights = masks.weights.split([4 * 90 * 90, 4 * 90 * 90, 4 * 60 * 60])
    hidden, begin = embedding[tokens] * inputs / 0.6, 0
    for number, layer in enumerate(model.layers):
        plain = nn.LSTM(layer.input_size, layer.hidden_size, batch_first=True)
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():
            plain.weight_hh_l0.mul_(weights[number].view_as(plain.weight_hh_l0) / 0.5)
        end = begin + layer.hidden_size
        hidden, (h, _) = plain(hidden, tuple(part[None, :, begin:end].contiguous() for part in state))
        torch.testing.assert_close(new_state[0][:, begin:end], h[0])
        hidden, begin = hidden * (between / 0.8, after / 0.8, outputs / 0.7)[number], end
    torch.testing.assert_close(found, hidden, atol=1e-4, rtol=1e-4)  # probabilities are multiples of 1 / 65536


def test_without_masks_nothing_is_dropped(model):
    assert model.training
    tokens, state = torch.randint(VOCABULARY_SIZE, (4, 5)), model.initial_state(4)
    torch.testing.assert_close(model(tokens, state), model.eval()(tokens, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_scale_is_exact_in_every_precision(dtype, rate):
    values = torch.rand(400, 500).to(dtype).requires_grad_()
    dropped = drop(values, torch.ones(500, dtype=torch.uint8), rounded(rate))
    assert dropped.dtype == dtype
    ratio = (dropped.double().sum() / values.double().sum()).item()
    assert ratio == pytest.approx(1 / (1 - rounded(rate)), rel=5e-4)
    dropped.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.full_like(values, 1 / (1 - rounded(rate))))


def test_probabilities_at_the_ends(model):
    assert rounded(0.0) == 0
    assert rounded(0.15) == pytest.approx(0.15, abs=1e-5)
    assert rounded(1 - 1e-12) < 1
    nothing = LanguageModel(ModelSettings(embedding_size=6, hidden_size=8, dropout=0.0), 30)
    assert [mask.numel() for mask in nothing.dropout.draw(1, 0, 4, slice(0, 2))] == [0, 0, 0]


def test_one_setting_is_the_default_of_three():
    assert ModelSettings(dropout=0.3, num_layers=3).vector_dropouts == [0.3, 0.3, 0.3, 0.3]
    assert ModelSettings(dropout=0.3, num_layers=3, dropout_hidden=0.0).vector_dropouts == [0.3, 0.0, 0.0, 0.3]
    assert ModelSettings(dropout=0.3, num_layers=1, dropout_input=0.4, dropout_output=0.2).vector_dropouts == [0.4, 0.2]
