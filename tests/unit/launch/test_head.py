"""The output layer and the loss in one, against logits of every position and torch's own loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

import launch.head
from launch.data import IGNORED, Batch, predicting
from launch.head import LinearCrossEntropy, OutputLayer, linear_losses
from tests.references import answer_loss
from tests.worlds import write_gpt2, write_llama


def random_batch(rows: int, longest: int, vocabulary: int, seed: int = 0) -> Batch:
    """Ragged rows of which some tokens are targets."""
    draw = np.random.default_rng(seed)
    ids = torch.from_numpy(draw.integers(3, vocabulary, (rows, longest)))
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORED)
    for row in range(rows):
        length = int(draw.integers(4, longest + 1))
        mask[row, :length] = 1
        learned = torch.from_numpy(draw.random(length) < 0.6)
        learned[0], learned[length - 1] = False, True
        targets[row, :length] = torch.where(learned, ids[row, :length], IGNORED)
    return Batch(ids, mask, targets, predicting=predicting(targets))


def losses(model: PreTrainedModel, layer: OutputLayer, batch: Batch) -> torch.Tensor:
    assert batch.predicting is not None
    layer.at(batch.predicting, batch.targets.flatten()[batch.predicting + 1])
    return layer.losses(model(**batch.inputs()).logits)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_loss_is_torchs_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, bias: bool
) -> None:
    monkeypatch.setattr(launch.head, "CHUNK_BYTES", 4 * 50 * 3)  # three rows at a time, and a rest of two
    torch.manual_seed(0)
    hidden = torch.randn(11, 7, requires_grad=True)
    weight = torch.randn(50, 7, requires_grad=True)
    offset = torch.randn(50, requires_grad=True) if bias else None
    targets = torch.randint(0, 50, (11,))
    inputs = [hidden, weight] + ([offset] if offset is not None else [])

    plain = nn.functional.cross_entropy(
        nn.functional.linear(hidden, weight, offset), targets, reduction="sum", label_smoothing=smoothing
    )
    expected = torch.autograd.grad(plain * 0.3, inputs)
    fused = LinearCrossEntropy.apply(hidden, weight, offset, targets, smoothing)
    found = torch.autograd.grad(fused * 0.3, inputs)
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        by_token = linear_losses(hidden, weight, offset, targets)
        logits = nn.functional.linear(hidden, weight, offset)
        torch.testing.assert_close(by_token, nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3)
    LinearCrossEntropy.apply(hidden, weight, None, torch.tensor([1, 2, 3, 4]), 0.0).backward()
    assert hidden.grad is not None
    assert weight.grad is None


class Capped(GPT2LMHeadModel):
    """Does something to its logits, as Gemma and Cohere do; out of place, then in place."""

    in_place = False

    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.div_(0.5) if self.in_place else torch.tanh(output.logits / 3) * 3
        return output


@pytest.mark.parametrize("kind", ["llama", "gpt2", "capped", "capped-in-place"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_trains_as_with_the_logits_of_every_position(tmp_path: Path, kind: str, autocast: bool) -> None:
    """The first pass finds out what the model does with its logits; the second is fused where that is nothing."""
    folder = write_llama(tmp_path / "m") if kind == "llama" else write_gpt2(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    if kind.startswith("capped"):
        model.__class__ = Capped
        Capped.in_place = kind == "capped-in-place"
    model.eval()  # no dropout
    batches = [random_batch(3, 12, 300, seed) for seed in range(3)]
    expected = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for batch in batches:
            loss = answer_loss(model(**batch.inputs()).logits.float(), batch, smoothing=0.1)
            loss.backward()
            expected.append((loss.detach(), gradients(model)))
        with torch.no_grad():
            whole = model(**batches[0].inputs()).logits.float()
            plain = answer_loss(whole, batches[0])

        layer = OutputLayer(model, smoothing=0.1)
        for batch, (loss, theirs) in zip(batches, expected, strict=True):
            ours = losses(model, layer, batch).sum()
            ours.backward()
            torch.testing.assert_close(ours.detach(), loss, rtol=1e-2 if autocast else 1e-5, atol=1e-5)
            for name, gradient in gradients(model).items():
                apart = (gradient - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-3)
                assert apart <= (3e-2 if autocast else 1e-5), name
        assert layer._fused == (not kind.startswith("capped"))
        with torch.no_grad():
            by_token = losses(model, layer, batches[0])
            assert by_token.shape == batches[0].predicting.shape  # type: ignore[union-attr]
            torch.testing.assert_close(by_token.sum(), plain, rtol=1e-2 if autocast else 1e-5, atol=1e-5)
            torch.testing.assert_close(model(**batches[0].inputs()).logits.float(), whole)


def test_the_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that forward and backward make is a chunk, or the weight's own gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    Largest.most = max(Largest.most, tensor.numel())
            return result

    monkeypatch.setattr(launch.head, "CHUNK_BYTES", 4 * 1000 * 8)
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    with Largest():
        LinearCrossEntropy.apply(hidden, weight, None, torch.randint(0, 1000, (512,)), 0.0).backward()
    assert Largest.most <= 16 * 1000
