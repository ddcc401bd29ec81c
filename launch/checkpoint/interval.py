"""How often to save, where the job lets us choose: pure. Torch-free."""

from __future__ import annotations

import math

OVERHEAD = 0.035
"""Training never waits for saves longer than this share of its time."""

MEAN_TIME_BETWEEN_FAILURES_S = 24 * 3600.0
"""Assumed of a node of which nothing is known."""


def daly(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between saves that lose the least to saves and failures together.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006, eq. 37; its first
    term is Young's (1974). `cost_s` is what a save holds up training, `mtbf_s` the mean time between failures.
    """
    assert min(cost_s, mtbf_s) > 0
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def interval(blocked_s: float, written_s: float, mtbf_s: float) -> float:
    """Seconds between the starts of two saves: Daly's, but training waits at most OVERHEAD of the time, and a save is
    done before the next begins.

    `blocked_s` is how long training waited for a save, `written_s` how long until it was committed.
    """
    cost = max(blocked_s, 1e-3)
    return max(daly(cost, mtbf_s), cost / OVERHEAD, written_s)
