"""The weights of the best evaluation so far, in host memory: every rank keeps its own part."""

from __future__ import annotations

from typing import NamedTuple

import torch

from launch.config import Metric
from launch.engine import Engine
from launch.metrics import sign_of


class BestState(NamedTuple):
    """Which evaluation is the best; its weights lie beside it."""

    value: float
    step: int


class Best:
    """Sees every evaluation; all ranks decide alike, since the metrics are the same on every rank."""

    def __init__(self, engine: Engine, metric: Metric) -> None:
        self._engine = engine
        self._metric = metric
        self._sign = sign_of(metric)
        self._weights: dict[str, torch.Tensor] = {}
        self.state: BestState | None = None
        """None until an evaluation had a number to compare."""

    def sees(self, metrics: dict[str, float], step: int) -> None:
        """Copy this rank's weights if they are the best so far; of equals the earlier stays."""
        value = metrics[self._metric]
        before = float("inf") if self.state is None else self._sign * self.state.value
        if self._sign * value < before:
            self.state = BestState(value, step)
            self._weights = self._engine.fragments()

    def restore(self) -> None:
        """Give the model the best weights: to be measured and exported, not to be trained further."""
        if self.state is not None:
            self._engine.restore(self._weights)

    def forget(self) -> None:
        """There is no best yet, once the training has gone back to before the first evaluation."""
        self.state, self._weights = None, {}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's part of the best weights, as the engine's fragments are; empty while there are none."""
        return self._weights

    def room(self, state: BestState) -> dict[str, torch.Tensor]:
        """Take `state` for the best so far; returns where its weights, from a checkpoint, are to be written."""
        self.state = state
        self._weights = self._engine.fragments()
        return self._weights
