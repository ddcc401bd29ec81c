"""Masks that are cheap to draw are still masks: the right share, unbiased, and replayed by torch's generator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import launch.dropout
from launch.dropout import Dropout, attention, drop_cheaply, dropped, softmax
from tests.worlds import write_bert, write_gpt2, write_llama


@pytest.fixture(autouse=True)
def attention_as_it_was() -> Iterator[None]:
    yield
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_and_the_scale(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.ones(1001, 333, dtype=dtype)
    found = dropped(values, probability)
    assert found.dtype == dtype
    share = float((found == 0).double().mean())
    assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / values.numel()) ** 0.5)
    assert float(found.max()) == pytest.approx(1 / (1 - probability), rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert float(found.double().mean()) == pytest.approx(1.0, abs=0.02)
    flat = (found == 0).flatten().double()
    neighbours = torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.01, "elements of one word are as independent as others"


def test_the_ends() -> None:
    values = torch.randn(50)
    assert torch.equal(dropped(values, 0.0), values)
    assert not dropped(values, 1.0).any()
    layer = Dropout(0.5).eval()
    assert layer(values) is values


def test_the_gradient_is_dropped_alike() -> None:
    values = torch.randn(64, 64, requires_grad=True)
    found = dropped(values, 0.3)
    found.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad * values.detach(), found.detach())


def test_torchs_generator_rules() -> None:
    """The same state, the same mask; recomputed activations see the first pass's masks."""
    values = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropped(values, 0.5), dropped(values, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropped(values, 0.5), first)
    assert not torch.equal(first, second)
    block = nn.Sequential(nn.Linear(16, 16), Dropout(0.5), nn.Linear(16, 4))
    inputs = torch.randn(8, 16)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(4)
        loss = (checkpoint(block, inputs, use_reentrant=False) if recompute else block(inputs)).sum()
        gradients.append(torch.autograd.grad(loss, list(block.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_sdpas_where_nothing_falls(
    tmp_path: Path, kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks that keep everything, and the scale taken back, a model in training gives what sdpa does."""
    writer = {"bert": write_bert, "gpt2": write_gpt2, "llama": write_llama}[kind]
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    options = {"attention_dropout": 0.5} if kind == "llama" else {}
    model = auto.from_pretrained(writer(tmp_path / "m"), attn_implementation="sdpa", **options)
    ids = torch.randint(4, 40, (3, 12))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 7:] = mask[2, 3:] = 0
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        calls = []
        monkeypatch.setattr(launch.dropout, "dropped", lambda values, p: calls.append(p) or values)
        drop_cheaply(model)
        found = model.train()(input_ids=ids, attention_mask=mask).logits
    there = mask.bool()
    torch.testing.assert_close(*((found, expected) if kind == "bert" else (found[there], expected[there])))
    assert sum(p > 0 for p in calls) >= 2, "each layer's attention drops"
    assert not [m for m in model.modules() if type(m) is nn.Dropout]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 31, 32, 45])
def test_softmax_is_torchs(length: int, dtype: torch.dtype) -> None:
    """And so is its gradient; rows in which nothing is to be looked at are even, as there."""
    torch.manual_seed(0)
    scores = (3 * torch.randn(2, 3, 5, length)).to(dtype)
    scores[0, 0, 0, length // 2 :] = torch.finfo(dtype).min
    scores[1, 1, 1] = torch.finfo(dtype).min
    towards = torch.randn(2, 3, 5, length)
    exact, ours = scores.double().requires_grad_(), scores.clone().requires_grad_()
    expected, found = exact.softmax(dim=-1), softmax(ours)
    assert found.shape == scores.shape
    (expected * towards).sum().backward()
    (found * towards).sum().backward()
    assert exact.grad is not None
    assert ours.grad is not None
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-3}
    torch.testing.assert_close(found.double(), expected, **close)
    torch.testing.assert_close(ours.grad.double(), exact.grad, **close)


def test_what_it_does_not_know_it_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launch.dropout, "sdpa_attention_forward", lambda *a, **k: seen.append((a, k)))
    query = torch.randn(1, 2, 3, 4)
    attention(nn.Module(), query, query, query, None, dropout=0.0)
    attention(nn.Module(), query, query, query, None, dropout=0.5, position_bias=torch.zeros(1, 2, 3, 3))
    assert len(seen) == 2
