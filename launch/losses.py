"""Losses of classes, and what a loss is a mean over: the loop divides by the global batch's sum."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from launch.config import Task
from launch.data import Rows
from launch.errors import SpecError
from launch.guard import Explosion
from launch.sampler import Indices


def class_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy in fp32 of each row's class, shape (rows,), from logits (rows, classes).

    With class weights w, C classes and smoothing e, a row of class y has the loss

        (1 - e) * w[y] * -log p[y]  +  e / C * sum over c of w[c] * -log p[c]

    and divided by the sum of w[y] over the global batch (loss_terms) that is torch.nn.CrossEntropyLoss of it.
    """
    return functional.cross_entropy(
        logits.float(), targets, weight=class_weights, reduction="none", label_smoothing=label_smoothing
    )


def loss_terms(rows: Rows, chosen: Indices, task: Task, class_weights: torch.Tensor | None = None) -> float:
    """What the loss of `chosen` is a mean over: rows, their weights, or target tokens. Every rank can add up those of
    all ranks, since it knows all of the batch."""
    if task == "causal-lm":
        return rows.targets(chosen)
    if class_weights is None:
        return len(chosen)
    return float(class_weights.double().cpu()[torch.from_numpy(rows.classes[chosen])].sum())


def weights_of_classes(
    wish: Literal["balanced"] | Mapping[str, float] | None, rows: Rows, labels: Sequence[str]
) -> torch.Tensor | None:
    """The weight of each class, shape (classes,) in fp32; None where all rows count the same.

    `balanced` is scikit-learn's: rows / (classes * rows of the class), over the training rows.

    Raises:
        SpecError: a weight for a label that there is not, or a class without training rows to balance.
    """
    if wish is None:
        return None
    if wish == "balanced":
        counts = np.bincount(rows.classes, minlength=len(labels))
        if not counts.all():
            raise SpecError(
                f"no training row has the label {labels[int(counts.argmin())]!r}, so it has no balanced weight",
                code="empty-class",
                field="train.class_weights",
                hint="split with `stratify: true`, or give the weights as a mapping",
            )
        return torch.from_numpy(len(rows) / (len(labels) * counts)).float()
    for label in wish:
        if label not in labels:
            near = difflib.get_close_matches(label, labels, n=1)
            raise SpecError(
                f"class_weights names the label {label!r}, which no row has",
                code="unknown-label",
                field=f"train.class_weights.{label}",
                hint=(f"did you mean {near[0]!r}? " if near else "") + f"the classes are: {', '.join(labels)}",
            )
    return torch.tensor([wish.get(label, 1.0) for label in labels])


def exploded(why: Explosion, rollbacks: int, more: str = "") -> SpecError:
    """What ends a training whose loss has exploded, after so many times in which it went back."""
    times = f", after {rollbacks} rollback{'s' if rollbacks > 1 else ''}" if rollbacks else ""
    return SpecError(
        f"{why}{times}{'; ' if more else ''}{more}",
        code="loss-exploded",
        field="train.divergence",
        hint="lower the learning rate, add warmup_steps, or look at the data of these steps (train.log_samples)",
    )


MAX_SKIPPED = 10
"""Steps in a row whose loss may be not finite, with `on_nonfinite: skip`."""


def not_finite(loss: float, step: int, skipped: int) -> SpecError:
    """What ends a training at `step`, before which so many steps in a row were left out."""
    before = f", after {skipped} skipped steps" if skipped else ""
    return SpecError(
        f"the loss is {loss} at step {step}{before}",
        code="loss-not-finite",
        field="train.learning_rate",
        hint="lower the learning rate, add warmup_steps, or take bf16 or fp32 instead of fp16",
    )
