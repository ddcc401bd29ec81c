"""What is added to a prediction before it is compared with what there is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from launch.contract import ExecutionPlan
from launch.footprint_record import Footprint


@dataclass(frozen=True)
class Margin:
    """Shares added to what is predicted, before it is compared with what there is."""

    static: float = 0.02
    """On what stays: weights, gradients, the optimizer's state."""
    dynamic: float = 0.10
    """On what comes and goes: activations, logits, buffers."""

    def scaled(self, factor: float) -> Margin:
        """What has been learned is told as a factor of both. What stays is not taken to be less than predicted."""
        return Margin(self.static * max(0.0, factor), self.dynamic * factor)


COLD = Margin()
"""Before anything has been measured, and the unit in which what was measured is told."""
EXACT = Margin(0.01, 0.04)
"""The same, of a trace in fp32 of plain training on a CPU: `benchmarks/memory.py` finds no such peak above it."""
HIDDEN = Margin(0.02, 0.25)
"""The same, of half precision on a CPU, whose matrix products take workspaces that no trace sees."""
WIDE = Margin(dynamic=0.20)
"""The same, where formulas stand in for a trace: their worst cases are further off."""
NONE = Margin(0.0, 0.0)


def cold(footprint: Footprint, plan: ExecutionPlan) -> Margin:
    """The margin while nothing has been learned."""
    if footprint.source != "traced":
        return WIDE
    if plan.device == "cuda":
        return COLD
    if plan.half:
        return HIDDEN
    return COLD if plan.zero_stage else EXACT
