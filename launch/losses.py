"""Losses summed over rows or target tokens, and how many there are: the loop divides by the global batch's number."""

from __future__ import annotations

import torch
from torch.nn import functional

from launch.config import Task
from launch.data import IGNORED, Batch, Rows
from launch.sampler import Indices


def row_losses(logits: torch.Tensor, batch: Batch, task: Task) -> torch.Tensor:
    """Cross-entropy of each row in fp32, shape (rows,): of its class, or summed over its target tokens."""
    if task == "sequence-classification":
        return functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    predicted = logits[:, :-1].float().transpose(1, 2)  # position t predicts token t + 1
    losses = functional.cross_entropy(predicted, batch.targets[:, 1:], reduction="none", ignore_index=IGNORED)
    return losses.sum(dim=1)


def loss_terms(rows: Rows, chosen: Indices, task: Task) -> int:
    """How many terms the loss of `chosen` is a mean over. Every rank can count those of all ranks."""
    return len(chosen) if task == "sequence-classification" else rows.targets(chosen)
