"""Micro-batches laid out ahead are those that are laid out when they are due."""

from __future__ import annotations

import numpy as np
import torch

from launch.contract import ExecutionPlan
from launch.data import Rows
from launch.feed import Feed
from launch.sampler import Sampler

CPU = torch.device("cpu")


def feed(rank: int, *, ahead: bool) -> Feed:
    lengths = np.random.default_rng(0).integers(2, 9, 23)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = Rows(np.arange(offsets[-1], dtype=np.int32), offsets, labels=np.arange(23) % 3)
    sampler = Sampler("f", 0, 23, 8, lengths)
    plan = ExecutionPlan(engine="ddp", world_size=3, device="cpu", micro_batch_size=2, gradient_accumulation_steps=2)
    return Feed(rows, sampler, plan, rank, 0, causal=False, varlen=False, ahead=ahead)


def test_ahead_is_the_same_as_in_time_over_the_end_of_an_epoch() -> None:
    for rank in range(3):
        early, due = feed(rank, ahead=True), feed(rank, ahead=False)
        consumed = 0
        for _ in range(10):
            pairs = list(zip(early.step(consumed, CPU), due.step(consumed, CPU), strict=True))
            assert pairs
            for ours, theirs in pairs:
                assert ours.weight == theirs.weight
                assert torch.equal(ours.batch.input_ids, theirs.batch.input_ids)
                assert torch.equal(ours.batch.targets, theirs.batch.targets)
            consumed += len(early.chosen(consumed))


def test_going_elsewhere_than_expected_is_no_trouble() -> None:
    """After a resume, or when the learning begins in mid-epoch."""
    early, due = feed(0, ahead=True), feed(0, ahead=False)
    for consumed in (0, 16, 0, 23):
        ours, theirs = list(early.step(consumed, CPU)), list(due.step(consumed, CPU))
        assert [m.batch.input_ids.tolist() for m in ours] == [m.batch.input_ids.tolist() for m in theirs]


def test_the_last_batch_of_an_epoch_has_dummies_for_the_ranks_without_rows() -> None:
    """Of 7 rows, three ranks have 3, 2 and 2: all make two passes."""
    weights = [[micro.weight for micro in feed(rank, ahead=False).step(16, CPU)] for rank in range(3)]
    assert weights == [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
