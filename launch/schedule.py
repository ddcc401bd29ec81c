"""The learning rate as a pure function of the step. Torch-free."""

from __future__ import annotations

import math
from fractions import Fraction

from launch.optimisation import DECAY_SHARE, OptimSpec, Schedule


def rate_at(optim: OptimSpec, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`, as `optim` has it."""
    warmup = optim.warmup_steps if optim.warmup_ratio is None else share_of(optim.warmup_ratio, steps)
    decay = optim.decay_steps or share_of(optim.decay_ratio or DECAY_SHARE, steps)
    return learning_rate(optim.schedule, optim.learning_rate, warmup, step, steps, decay)


def share_of(share: float, steps: int) -> int:
    """Steps of `share`, rounded up; exact, so that 0.1 of 30 steps is 3 and not 4."""
    return math.ceil(Fraction(str(share)) * steps)


def learning_rate(
    schedule: Schedule, peak: float, warmup_steps: int, step: int, steps: int, decay_steps: int = 0
) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`.

    A linear warm-up from 0 to `peak`, then a decay that would reach 0 at step `steps`: the same formulas as
    transformers' `get_linear_schedule_with_warmup` and its siblings. `wsd` (warm-up, stable, decay: Hu et al. 2024,
    MiniCPM) decays linearly, in the last `decay_steps` or what the warm-up leaves of them.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    start = max(warmup_steps, steps - decay_steps) if schedule == "wsd" else warmup_steps
    done = max(0.0, (step - start) / max(1, steps - start))
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
    return peak * max(0.0, 1 - done)
