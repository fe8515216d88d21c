"""The chunked head against plain logits, in fp64, in bf16 and in memory; the adaptive softmax against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lmdist.model import loss
from lmdist.model.loss import IGNORED, activation_penalty, linear_nats, summed_nats


def plain_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight, bias), targets, ignore_index=IGNORED, reduction="sum")


def parameters(num_tokens: int, size: int, vocabulary_size: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + size + vocabulary_size)
    shapes = [(num_tokens, size), (vocabulary_size, size), (vocabulary_size,)]
    return [(torch.randn(shape, generator=generator, dtype=dtype) * scale).requires_grad_() for shape in shapes]


@pytest.fixture(params=[loss.BlockedLinearNats, loss.LinearNats], ids=["CPU", "GPU"])
def each_function(request, monkeypatch):
    """Both ways to compute it, on the CPU."""
    monkeypatch.setattr(loss, "BlockedLinearNats", request.param)


@pytest.mark.usefixtures("each_function")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(2, 50),
    st.integers(1, 20),
    st.integers(1, 2000),
    st.sampled_from([1.0, 30.0]),
    st.booleans(),
    st.integers(0, 100),
)
def test_nats_and_gradients_are_those_of_plain_logits(
    num_tokens, size, vocabulary_size, chunk_size, block_bytes, logit_scale, has_bias, padding
):
    hidden, weight, bias = parameters(num_tokens, size, vocabulary_size, torch.float64, logit_scale)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(vocabulary_size, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < padding / 100] = IGNORED
    given_bias = bias if has_bias else None
    leaves = [hidden, weight, bias] if has_bias else [hidden, weight]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_SIZE", chunk_size)
        patch.setattr(loss, "BLOCK_BYTES", block_bytes)
        found = linear_nats(hidden, weight, given_bias, targets)
    expected = plain_nats(hidden, weight, given_bias, targets)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("each_function")
def test_logits_that_no_exponential_holds():
    hidden, weight, bias = parameters(50, 8, 30, torch.float32, scale=30)
    targets = torch.arange(50) % 30
    found, expected = linear_nats(hidden, weight, bias, targets), plain_nats(hidden, weight, bias, targets)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(nats, [hidden, weight, bias]) for nats in (found, expected)), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("each_function")
def test_in_bf16_the_loss_is_correct_and_the_gradients_nearly():
    hidden, weight, bias = parameters(1500, 64, 2000, torch.float32, scale=0.5)
    targets = torch.arange(1500)
    expected = plain_nats(hidden, weight, bias, targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_nats(hidden, weight, bias, targets)
    assert found.dtype == torch.float32
    assert abs(found - expected).item() / 1500 < 0.002  # nats per token
    for ours, theirs in zip(*(torch.autograd.grad(nats, [hidden, weight, bias]) for nats in (found, expected)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.01


@pytest.mark.usefixtures("each_function")
def test_an_expected_gradient_changes_nothing_whether_it_comes_or_not():
    hidden, weight, bias = leaves = parameters(30, 8, 20, torch.float64)
    targets = torch.arange(30) % 20
    plain = torch.autograd.grad(0.25 * linear_nats(hidden, weight, bias, targets), leaves)
    for expected in (0.25, 4.0):
        nats = linear_nats(hidden, weight, bias, targets, torch.tensor(expected, dtype=torch.float64))
        for ours, theirs in zip(torch.autograd.grad(0.25 * nats, leaves), plain, strict=True):
            torch.testing.assert_close(ours, theirs)


class LargestMatrix(TorchDispatchMode):
    """Sees every tensor that is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_tokens_never_exist_at_once(dtype):
    num_tokens, vocabulary_size = 5600, 700  # a step of AWD-LSTM: 80 x 70
    hidden, weight, bias = parameters(num_tokens, 16, vocabulary_size, torch.float32)
    targets = torch.arange(num_tokens) % vocabulary_size
    with LargestMatrix() as seen, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        linear_nats(hidden, weight, bias, targets).backward()
    assert seen.largest <= 0.2 * num_tokens * vocabulary_size
    with LargestMatrix() as seen:
        plain_nats(hidden, weight, bias, targets).backward()
    assert seen.largest == num_tokens * vocabulary_size


@pytest.mark.usefixtures("each_function")
def test_without_gradients_none_are_computed():
    hidden, weight, bias = parameters(20, 4, 9, torch.float32)
    with torch.no_grad():
        nats = linear_nats(hidden, weight, bias, torch.arange(20) % 9)
    assert not nats.requires_grad
    torch.testing.assert_close(nats, plain_nats(hidden, weight, bias, torch.arange(20) % 9).detach())


# --- adaptive --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adaptive() -> nn.AdaptiveLogSoftmaxWithLoss:
    torch.manual_seed(0)
    return nn.AdaptiveLogSoftmaxWithLoss(32, 100, [10, 40], head_bias=True)


@pytest.mark.parametrize("largest", [100, 10], ids=["all tokens", "frequent tokens only"])
def test_the_adaptive_head_is_torchs_own(adaptive, largest):
    hidden = torch.randn(3, 20, 32, requires_grad=True)
    targets = torch.randint(largest, (3, 20))
    found = summed_nats(hidden, adaptive, targets)
    expected = -adaptive(hidden.flatten(0, 1), targets.flatten()).output.sum()
    torch.testing.assert_close(found, expected)
    leaves = [hidden, *adaptive.parameters()]
    ours = torch.autograd.grad(found, leaves)  # every parameter has a gradient: DDP waits for all of them
    theirs = torch.autograd.grad(expected, leaves, allow_unused=True)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, torch.zeros_like(our) if their is None else their, atol=1e-5, rtol=1e-4)


def test_the_adaptive_head_is_normalized_and_ignores_padding(adaptive):
    hidden = torch.randn(1, 1, 32)
    nats = [summed_nats(hidden, adaptive, torch.tensor([[word]])) for word in range(100)]
    assert torch.stack(nats).neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert summed_nats(hidden, adaptive, torch.tensor([[IGNORED]])).item() == 0


# --- penalties -------------------------------------------------------------------------------------------------------


def test_the_penalties_are_those_of_awd_lstm():
    raw, dropped = torch.randn(4, 7, 5), torch.randn(4, 7, 5)
    counted = torch.ones(4, 7, dtype=torch.bool)
    found = activation_penalty(raw, dropped, counted, 2, 1) / 28
    expected = 2 * dropped.pow(2).mean() + (raw.transpose(0, 1)[1:] - raw.transpose(0, 1)[:-1]).pow(2).mean()
    torch.testing.assert_close(found, expected)
    parts = [activation_penalty(*part, 2, 1) for part in zip(raw.chunk(2), dropped.chunk(2), counted.chunk(2), strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum() / 28, expected)
    assert activation_penalty(raw[:, :1], dropped[:, :1], counted[:, :1], 0, 1).item() == 0  # no change in one word


def test_the_penalties_do_not_depend_on_padding():
    raw, dropped = torch.randn(4, 7, 5), torch.randn(4, 7, 5)
    counted = torch.ones(4, 7, dtype=torch.bool)
    counted[2:] = False
    found = activation_penalty(raw, dropped, counted, 2, 1)
    torch.testing.assert_close(found, activation_penalty(raw[:2], dropped[:2], counted[:2], 2, 1))
    counted[1, 6] = False  # the end of a shorter stream
    found = activation_penalty(raw, dropped, counted, 2, 1)
    assert torch.equal(found, activation_penalty(padded(raw, counted), padded(dropped, counted), counted, 2, 1))


def padded(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return other values where nothing is counted."""
    return torch.where(counted[..., None], values, 100)
