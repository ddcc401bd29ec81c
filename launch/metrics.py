"""Metrics over a held-out part, exact for any number of ranks: every row counts once."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from launch.config import Metric, Task
from launch.data import Rows, collate
from launch.engine import Engine
from launch.losses import loss_terms
from launch.objective import Objective
from launch.sampler import rank_micro_batches


class Evaluation(NamedTuple):
    """The same on every rank."""

    metrics: dict[str, float]
    """loss (plain cross-entropy), then accuracy, f1_macro and mcc, or perplexity."""
    predicted: npt.NDArray[np.int64] | None = None
    """sequence-classification: the class that each row was taken for."""


def evaluate(
    engine: Engine,
    objective: Objective,
    rows: Rows,
    task: Task,
    batch_size: int,
    pad_token_id: int,
    moves: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure `rows`, those of like length together. `moves` is called before every batch.

    Each rank writes what it found into vectors as long as the data, zero elsewhere, and their sum over ranks is the
    whole: nothing is padded, repeated or out of order. Dummy batches only keep ZeRO-3's gathers in step.
    """
    accelerator = engine.accelerator
    causal = task == "causal-lm"
    everything = np.argsort(-rows.lengths, kind="stable")  # what does not fit into memory shows at once
    found = torch.zeros(2, len(rows), dtype=torch.float64, device=accelerator.device)  # loss, predicted class
    engine.module.eval()
    with torch.no_grad():
        for part in rank_micro_batches(everything, accelerator.process_index, accelerator.num_processes, batch_size):
            moves()
            batch = collate(rows, part.rows, pad_token_id, causal=causal).to(accelerator.device)
            losses, predicted = objective.by_row(engine, batch)
            if not part.dummy:
                chosen = torch.from_numpy(part.rows).to(found.device)
                found[0, chosen] = losses.double()
                if predicted is not None:
                    found[1, chosen] = predicted.double()
    engine.module.train()
    found = sum_over_ranks(engine, found)
    loss = float(found[0].sum()) / loss_terms(rows, everything, task)
    if causal:
        return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 700.0))})
    # A second of imports, which the first step need not wait for.
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes = found[1].cpu().long().numpy()
    return Evaluation(
        {
            "loss": loss,
            "accuracy": float(accuracy_score(rows.classes, classes)),
            "f1_macro": float(f1_score(rows.classes, classes, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(rows.classes, classes)),
        },
        classes,
    )


def sum_over_ranks(engine: Engine, values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, on the CPU."""
    if engine.accelerator.num_processes == 1:
        return values
    shared = values.to(engine.accelerator.device)
    torch.distributed.all_reduce(shared)
    return shared.cpu()


def sign_of(metric: Metric) -> float:
    """1 where less is better, -1 where more is."""
    return 1.0 if metric in ("loss", "perplexity") else -1.0


class EarlyStopState(NamedTuple):
    """What early stopping remembers between evaluations."""

    best: float
    since_best: int


class EarlyStop:
    """Counts evaluations without improvement; the same on every rank, since the metrics are."""

    def __init__(self, metric: Metric, patience: int, min_delta: float) -> None:
        self._metric = metric
        self._sign = sign_of(metric)
        self._patience = patience
        self._min_delta = min_delta
        self.state = EarlyStopState(best=sys.float_info.max, since_best=0)

    def sees(self, metrics: dict[str, float]) -> bool:
        """Take in one evaluation; True when it is time to stop."""
        value = self._sign * metrics[self._metric]
        better = value < self.state.best - self._min_delta
        self.state = EarlyStopState(value, 0) if better else EarlyStopState(self.state.best, self.state.since_best + 1)
        return self.state.since_best >= self._patience
