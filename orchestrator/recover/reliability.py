"""How often a gang fails, from how past ones ended. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.recover.classify import TREATMENTS, Outcome

PRIOR_S = 24 * 3600.0
"""Taken as seen beforehand: one failure in so much time of one node."""

LOOK_BACK_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Ran:
    """An attempt that has ended."""

    seconds: float
    nodes: int
    outcome: Outcome


def mean_time_between_failures(history: Iterable[Ran], nodes: int) -> float:
    """Seconds until a gang of `nodes` nodes fails, on average: any of its nodes ends it.

    Failures per node and second, as a gamma prior of one failure in PRIOR_S and what was seen make it: a few days
    without a failure prove little. What counts is what a restart from a checkpoint mends.
    """
    node_seconds, failures = PRIOR_S, 1
    for ran in history:
        node_seconds += max(ran.seconds, 0.0) * ran.nodes
        failures += TREATMENTS[ran.outcome].again
    return node_seconds / failures / nodes
