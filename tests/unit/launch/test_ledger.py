"""What the ledger counts, on real tensors whose storages can be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.ledger import Ledger
from launch.model import build_model
from tests.worlds import a_spec, write_bert, write_messages

KIB = 1024


def fill(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB // 4)


def test_what_is_made_is_counted_until_it_is_freed() -> None:
    with Ledger() as ledger:
        one = fill(4)
        two = fill(2)
        assert ledger.live == 6 * KIB
        del one
        assert (ledger.live, ledger.most) == (2 * KIB, 6 * KIB)
        two = two + 1.0  # the old one lives until the new one is there
        assert (ledger.live, ledger.most) == (2 * KIB, 6 * KIB)
    del two
    assert ledger.live == 0


def test_views_and_what_is_done_in_place_cost_nothing() -> None:
    with Ledger() as ledger:
        whole = fill(8)
        parts = [whole.view(2, -1), whole[10:20], whole.t(), whole.detach(), whole.add_(1.0)]
        assert (ledger.live, ledger.most) == (8 * KIB, 8 * KIB)
        del whole
        assert ledger.live == 8 * KIB, "a view keeps all of it"
        del parts
        assert ledger.live == 0


def test_a_part_counts_as_the_storage_that_it_keeps() -> None:
    with Ledger() as ledger:
        row = fill(8).view(8, -1)[0]
        assert ledger.live == 8 * KIB
        row = row.clone()
        assert ledger.live == 1 * KIB
    assert row.numel() == KIB // 4


def test_what_was_there_before_is_counted_elsewhere() -> None:
    before, unknown = fill(4), fill(2)
    ledger = Ledger()
    ledger.ignore(before)
    with ledger:
        before.add_(1.0)
        assert before.view(2, -1).shape[0] == 2
        assert ledger.live == 0
        assert unknown.view(-1).dim() == 1  # was never said to be there
        assert ledger.live == 2 * KIB


def test_peaks_begin_anew() -> None:
    with Ledger() as ledger:
        kept = fill(1)
        assert fill(7).dim() == 1
        assert ledger.most == 8 * KIB
        ledger.forget_peaks()
        assert (ledger.most, ledger.most_beside, ledger.most_reducing, ledger.most_halving) == (KIB,) * 4
        assert kept.dim() == 1


class Story:
    """Gradients of whole KiB that come and go between other tensors, and the four peaks after each step."""

    def __init__(self, bucket_kib: int) -> None:
        self.ledger = Ledger(bucket_kib * KIB // 4)

    def gradient(self, kib: int) -> torch.Tensor:
        made = fill(kib)
        self.ledger.note_gradient(made)
        return made

    def peaks(self) -> tuple[int, int, int, int]:
        ledger = self.ledger
        return (
            ledger.most // KIB,
            ledger.most_beside // KIB,
            ledger.most_reducing // KIB,
            ledger.most_halving // KIB,
        )


@pytest.fixture
def story() -> Iterator[Story]:
    story = Story(bucket_kib=3)
    with story.ledger:
        yield story


def test_gradients_are_told_apart_once_they_are_complete(story: Story) -> None:
    activations = fill(10)
    first = story.gradient(2)
    # Until it was complete it was a tensor like any other; then the bucket holds a copy, and half of it is kept.
    assert story.peaks() == (12, 12, 12, 13)
    assert (story.ledger.live, story.ledger.gradients) == (12 * KIB, 2 * KIB)
    del activations
    second = story.gradient(2)
    # 4 of gradients; beside them at most 2 in the making, with 2 in the bucket and half of what came before.
    assert (story.ledger.live, story.ledger.gradients) == (4 * KIB, 4 * KIB)
    assert story.peaks() == (12, 12, 12, 13)
    del first
    assert story.ledger.gradients == 2 * KIB
    del second
    assert (story.ledger.live, story.ledger.gradients) == (0, 0)


def test_a_bucket_fills_and_is_then_used_again(story: Story) -> None:
    ledger, gradients = story.ledger, []
    for _ in range(4):
        gradients.append(story.gradient(2))
        ledger.most_beside = ledger.most_reducing = ledger.most_halving = 0
        ledger.note_gradient(torch.empty(0))  # only looks
    # Nothing beside the gradients; the bucket is 3 KiB however much went through it; half of 8 KiB is kept.
    assert story.peaks()[1:] == (0, 3, 7)
    assert ledger.most == 8 * KIB
    del gradients


def test_without_a_bucket_reducing_is_as_without_gradients() -> None:
    with Ledger() as ledger:
        held = fill(4)
        ledger.note_gradient(held)
        extra = fill(5)
        assert (ledger.most_beside, ledger.most_reducing) == (5 * KIB, 5 * KIB)
        assert ledger.most_halving == 7 * KIB
        assert extra.dim() == 1


class Saved:
    """Storages that autograd keeps for a backward pass, and what a forward pass returned."""

    def __init__(self, model: nn.Module) -> None:
        self._there = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}

    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._there:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_after_a_real_forward_pass_it_holds_what_autograd_has_saved(tmp_path: Path, attention: str) -> None:
    model_dir, data = write_bert(tmp_path / "bert"), write_messages(tmp_path / "messages.tsv", rows=10)
    spec = a_spec(model_dir, data, model={"dropout": 0.1, "attn_implementation": attention})
    model = build_model(spec, ("ham", "spam"), 0, checkpointing=False).train()
    ids = torch.ones((3, 20), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    saved, ledger = Saved(model), Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.ignore(tensor)
    for tensor in (ids, mask):
        ledger.ignore(tensor)
        saved.see(tensor)
    inputs = dict(saved.sizes)
    with torch.autograd.graph.saved_tensors_hooks(saved.see, lambda tensor: tensor), ledger:
        logits = model(input_ids=ids, attention_mask=mask).logits
    saved.see(logits.detach())
    assert ledger.live == sum(size for place, size in saved.sizes.items() if place not in inputs)
    with ledger:
        logits.sum().backward()
        del logits
    kept = sum(
        parameter.grad.untyped_storage().nbytes() for parameter in model.parameters() if parameter.grad is not None
    )
    assert ledger.live == kept > 4 * sum(parameter.numel() for parameter in model.bert.encoder.parameters())
    model.zero_grad()
    assert ledger.live == 0
