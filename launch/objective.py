"""What a forward pass is for: from a batch to losses, by task. The loop and the evaluation know tasks only by this."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from launch.config import LossMode, OptimSpec, TrainSpec
from launch.data import Batch
from launch.engine import Engine
from launch.errors import SpecError
from launch.head import OutputLayer
from launch.losses import class_losses


class RowLosses(NamedTuple):
    losses: torch.Tensor
    """Plain cross-entropy of each row in fp32, (rows,): of its class, or summed over its target tokens."""
    predicted: torch.Tensor | None = None
    """sequence-classification: the most likely class of each row."""


class Objective(Protocol):
    """All ranks call it the same number of times."""

    def summed(self, engine: Engine, batch: Batch) -> torch.Tensor:
        """The training loss summed over the rows of `batch`, a scalar to go back from."""

    def by_row(self, engine: Engine, batch: Batch) -> RowLosses:
        """For evaluation, where nothing is weighted or smoothed."""

    def probe(self, engine: Engine, device: torch.device) -> LossMode:
        """How the loss is computed, found out by a forward pass over two tokens: before the first batch, since until it
        is known all logits are made."""


def objective_of(
    spec: TrainSpec, model: PreTrainedModel, class_weights: torch.Tensor | None, loss: LossMode = "chunked"
) -> Objective:
    """The objective of `spec`'s task; made before the engine wraps `model`."""
    if spec.model.task == "causal-lm":
        return LanguageModelling(model, spec.train.label_smoothing, chunked=loss == "chunked")
    return Classification(class_weights, spec.train.label_smoothing)


class Classification:
    def __init__(self, class_weights: torch.Tensor | None, smoothing: float) -> None:
        self._weights, self._smoothing = class_weights, smoothing

    def summed(self, engine: Engine, batch: Batch) -> torch.Tensor:
        logits = engine(**batch.inputs()).logits
        weights = None if self._weights is None else self._weights.to(logits.device)
        return class_losses(logits, batch.targets, weights, self._smoothing).sum()

    def by_row(self, engine: Engine, batch: Batch) -> RowLosses:
        logits = engine(**batch.inputs()).logits
        return RowLosses(class_losses(logits, batch.targets), logits.argmax(dim=-1))

    def probe(self, engine: Engine, device: torch.device) -> LossMode:  # noqa: ARG002
        return "whole"


class LanguageModelling:
    def __init__(self, model: PreTrainedModel, smoothing: float, *, chunked: bool) -> None:
        self._layer = OutputLayer(model, smoothing, chunked=chunked)

    def summed(self, engine: Engine, batch: Batch) -> torch.Tensor:
        return self._losses(engine, batch).sum()

    def by_row(self, engine: Engine, batch: Batch) -> RowLosses:
        rows, longest = batch.targets.shape
        losses = self._losses(engine, batch)
        assert batch.predicting is not None
        return RowLosses(losses.new_zeros(rows).index_add_(0, batch.predicting // longest, losses))

    def _losses(self, engine: Engine, batch: Batch) -> torch.Tensor:
        assert batch.predicting is not None
        self._layer.at(batch.predicting, batch.targets.flatten().index_select(0, batch.predicting + 1))
        return self._layer.losses(engine(**batch.inputs()).logits)

    def probe(self, engine: Engine, device: torch.device) -> LossMode:
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
        batch = Batch(tokens, torch.ones_like(tokens), tokens, predicting=tokens[0, :1])  # the first
        engine.module.eval()  # dropout would draw numbers
        with torch.no_grad():
            self._losses(engine, batch)
        return "chunked" if self._layer.fused else "whole"


def check_loss_mode(optim: OptimSpec, found: LossMode) -> None:
    """Raises SpecError where chunks were asked for by name and the model has none."""
    if optim.loss_mode == "chunked" and found != "chunked":
        raise SpecError(
            "this model's logits cannot be made in chunks: something happens to them after its output layer",
            code="loss-mode-not-available",
            field="train.loss_mode",
            hint="leave loss_mode out, or take `whole`",
        )
