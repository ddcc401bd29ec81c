"""The learning rate as a pure function of the step. Torch-free."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    schedule: Literal["linear", "cosine", "constant"], peak: float, warmup_steps: int, step: int, steps: int
) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`.

    A linear warm-up from 0 to `peak`, then a decay that would reach 0 at step `steps`: the same formulas as
    transformers' `get_linear_schedule_with_warmup` and its siblings.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1 - done)
    return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
