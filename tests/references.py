"""Textbook formulas that tests compare with."""

from __future__ import annotations

import torch
from torch.nn import functional

from launch.data import IGNORED, Batch


def answer_loss(logits: torch.Tensor, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    """The cross-entropy summed over target tokens, from the logits of every position, (rows, longest, vocabulary)."""
    assert IGNORED == -100, "what torch's cross_entropy leaves out by itself"
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.targets[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
    )
