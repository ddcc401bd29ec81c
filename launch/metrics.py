"""Metrics over a held-out part, exact for any number of ranks: every row counts once."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from launch.config import Metric, OptimSpec, Task
from launch.data import Rows, collate
from launch.engine import Engine
from launch.errors import SpecError
from launch.losses import loss_terms
from launch.objective import Objective
from launch.sampler import rank_micro_batches

AGREE_EVERY_S = 1.0
"""How often the ranks ask each other whether to break off."""


class Interrupted(Exception):
    """An evaluation was broken off, on all ranks at the same batch, since somebody asked the attempt to stop."""


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
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Measure `rows`, those of like length together. `moves` is called before every batch, and about once a second
    `stop`, of which one rank's yes is enough.

    Raises:
        Interrupted: one of them said so.

    Each rank writes what it found into vectors as long as the data, zero elsewhere, and their sum over ranks is the
    whole: nothing is padded, repeated or out of order. Dummy batches only keep ZeRO-3's gathers in step.
    """
    accelerator = engine.accelerator
    causal = task == "causal-lm"
    everything = np.argsort(-rows.lengths, kind="stable")  # what does not fit into memory shows at once
    found = torch.zeros(2, len(rows), dtype=torch.float64, device=accelerator.device)  # loss, predicted class
    asking = Asking(engine, stop)
    engine.module.eval()
    with torch.no_grad():
        for part in rank_micro_batches(everything, accelerator.process_index, accelerator.num_processes, batch_size):
            if asking.agreed():
                engine.module.train()
                raise Interrupted
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


class Asking:
    """Whether any rank wishes to stop: asked by all at the same batches, about every AGREE_EVERY_S."""

    def __init__(self, engine: Engine, stop: Callable[[], bool]) -> None:
        self._engine, self._stop = engine, stop
        self._batches, self._every, self._since = 0, 1, time.monotonic()

    def agreed(self) -> bool:
        """Called before every batch, by all ranks alike."""
        self._batches += 1
        if self._batches < self._every:
            return False
        now = time.monotonic()
        told = [float(self._stop()), now - self._since]
        if self._engine.accelerator.num_processes > 1:
            shared = torch.tensor(told, dtype=torch.float64, device=self._engine.accelerator.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            told = shared.tolist()
        # The slowest rank's time, which all know: so they count to the same batch.
        self._every = max(1, min(2 * self._every, int(self._batches * AGREE_EVERY_S / max(told[1], 1e-9))))
        self._batches, self._since = 0, now
        return told[0] > 0


def sum_over_ranks(engine: Engine, values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, on the CPU."""
    if engine.accelerator.num_processes == 1:
        return values
    shared = values.to(engine.accelerator.device)
    torch.distributed.all_reduce(shared)
    return shared.cpu()


def check_held_out(optim: OptimSpec, held_out: Rows | None) -> None:
    """Raises SpecError where the job wants to be measured, and there is nothing to measure it on."""
    if held_out is not None:
        return
    if optim.early_stopping is not None or optim.keep_best:
        name = "early_stopping" if optim.early_stopping is not None else "keep_best"
        raise SpecError(
            f"{name} has nothing to look at: there is neither validation nor test data",
            code="no-held-out-data",
            field=f"train.{name}",
            hint="add data.validation, or data.split.validation",
        )
    if optim.samples:
        raise SpecError(
            "samples are continuations of held-out prompts: there is neither validation nor test data",
            code="no-held-out-data",
            field="train.samples",
            hint="add data.test, or data.split.test",
        )


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
        return self.over

    @property
    def over(self) -> bool:
        return self.state.since_best >= self._patience
