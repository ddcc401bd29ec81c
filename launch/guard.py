"""Whether the loss has exploded: a pure function of the losses, which all ranks know alike. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from launch.optimisation import Divergence

LEAST = 5
"""So many losses make a median worth comparing with."""


class Explosion(NamedTuple):
    """Steps in a row, numbered from 1, whose losses were far above what they were before."""

    first: int
    last: int
    loss: float
    """Of the last."""
    usual: float
    """The median of those before."""

    def __str__(self) -> str:
        return (
            f"the loss was {self.loss:g} at step {self.last}, after a median of {self.usual:g}, and as bad since step "
            f"{self.first}"
        )


class Guard:
    """Sees the loss of every step; without a `spec` it never finds anything."""

    def __init__(self, spec: Divergence | None) -> None:
        self._spec = spec
        self._good: deque[float] = deque(maxlen=spec.window if spec is not None else 1)
        self._bad = 0
        self.found: Explosion | None = None
        """The explosion that nobody has done anything about yet."""
        self.left_out: list[tuple[int, int]] = []
        """Steps, from and to, that are not trained: their batches made the loss explode."""
        self.rollbacks = 0

    def sees(self, step: int, loss: float) -> None:
        """The loss of step `step`, or one that is not finite."""
        if self._spec is None or self.found is not None:
            return
        usual = statistics.median(self._good) if len(self._good) >= min(LEAST, self._spec.window) else math.inf
        if math.isfinite(loss) and loss <= self._spec.factor * usual:
            self._good.append(loss)
            self._bad = 0
            return
        self._bad += 1
        if self._bad >= self._spec.steps:
            self.found = Explosion(step - self._bad + 1, step, loss, usual)

    def leaves_out(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.left_out)

    def go_on(self, step: int, losses: Sequence[float], left_out: Iterable[tuple[int, int]], rollbacks: int) -> None:
        """After a checkpoint of `step` was loaded, with the losses up to it."""
        self._good.clear()
        self._bad, self.found = 0, None
        self.left_out, self.rollbacks = list(left_out), rollbacks
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            self.sees(number, loss)

    @property
    def may_go_back(self) -> bool:
        """Whether the job says so, and has not done so too often."""
        spec = self._spec
        return spec is not None and spec.then == "rollback" and self.rollbacks < spec.max_rollbacks
