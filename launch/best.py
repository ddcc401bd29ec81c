"""The weights of the best evaluation so far, in host memory: every rank keeps its own part."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

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

    def save(self, checkpoint: Path) -> None:
        """Write this rank's part into the directory of a checkpoint; `state` goes with the loop's."""
        if self.state is not None:
            save_file(self._weights, self._file(checkpoint))

    def load(self, checkpoint: Path, state: BestState | None) -> None:
        """What `save` wrote, on the same engine and world size."""
        self.state = state
        if state is not None:
            self._weights = load_file(self._file(checkpoint))

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / f"best-{self._engine.accelerator.process_index}.safetensors"
