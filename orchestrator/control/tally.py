"""What a controller has done since it started, for whoever watches it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from orchestrator.control.actions import EndAttempt


@dataclass
class Tally:
    """Written by the controller alone, read by any thread."""

    ticks: int = 0
    """As the acting one."""
    tick_s: float = 0.0
    last_tick_at: float | None = None
    """Unix time."""
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Attempts by outcome, and by the code of the reason that their jobs have since."""

    def tick(self, seconds: float, now: float) -> None:
        self.ticks += 1
        self.tick_s += seconds
        self.last_tick_at = now

    def end(self, action: EndAttempt) -> None:
        self.ends[action.outcome.value, action.reason.code.value] += 1
