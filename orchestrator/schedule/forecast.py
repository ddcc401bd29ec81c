"""When a waiting gang is expected to start: the yard's own decisions, played forward. Pure.

Running gangs and those that start end when history expects them to; nothing else is submitted. Once with short run
times, once with middling and once with long ones: the band.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Gang, Held
from orchestrator.schedule.yard import Yard

QUANTILES = (0.2, 0.5, 0.8)
"""Of what gangs have left to run."""
MAX_STEPS = 2000
"""Decisions after which the future is too far away to tell."""


@dataclass(frozen=True)
class Eta:
    """When a gang starts, in unix time; math.inf where it is not in sight, or nobody knows how long jobs take."""

    low: float
    expected: float
    high: float


def forecast(yard: Yard, now: float, job_ids: Collection[str], max_steps: int = MAX_STEPS) -> dict[str, Eta]:
    """The expected start of each of these gangs that waits."""
    wanted = [job_id for job_id in job_ids if job_id in yard.waiting]
    played = [_play(yard, now, set(wanted), quantile, max_steps) for quantile in QUANTILES]
    etas = {}
    for job_id in wanted:
        low, expected, high = sorted(starts.get(job_id, math.inf) for starts in played)
        etas[job_id] = Eta(low, expected, high)
    return etas


def _play(yard: Yard, now: float, wanted: set[str], quantile: float, max_steps: int) -> dict[str, float]:
    """When each of `wanted` starts, if gangs take as long as `quantile` says."""
    yard = yard.copy()
    starts: dict[str, float] = {}
    ends: list[tuple[float, float, str]] = []

    def ends_of(held: Held) -> None:
        end = held.since + _lasts(yard, held, now, quantile)
        if math.isfinite(end):
            heapq.heappush(ends, (max(end, now), held.since, held.gang.job_id))

    for held in yard.running.values():
        if held.stopping:
            heapq.heappush(ends, (now, held.since, held.gang.job_id))
        else:
            ends_of(held)
    at = now
    for _ in range(max_steps):
        decisions = decide(yard, at)
        for stop in decisions.stops:
            held = yard.release(stop.job_id)
            yard.wait(_again(held, at, stop.target))
        for start in decisions.starts:
            gang = yard.waiting[start.job_id]
            if start.job_id in wanted:
                starts.setdefault(start.job_id, at)
            waited = gang.waited_s + max(0.0, at - gang.queued_at)
            held = Held(replace(gang, waited_s=waited, target=None), start.placement, at)
            yard.hold(held)
            ends_of(held)
        if len(starts) == len(wanted):
            break
        if decisions.stops:
            continue
        while ends and _stale(yard, ends[0]):
            heapq.heappop(ends)
        times = [ends[0][0]] if ends else []
        if decisions.next_at is not None:
            times.append(decisions.next_at)
        if not times:
            break
        at = max(at, min(times))
        while ends and ends[0][0] <= at:
            end = heapq.heappop(ends)
            if not _stale(yard, end):
                yard.release(end[2])
    return starts


def _stale(yard: Yard, end: tuple[float, float, str]) -> bool:
    """Whether the gang was stopped since then."""
    held = yard.running.get(end[2])
    return held is None or held.since != end[1]


def _lasts(yard: Yard, held: Held, now: float, quantile: float) -> float:
    """How long an attempt takes, of which some may be over."""
    gang = held.gang
    ran = max(0.0, now - held.since)
    limit = gang.left_s if gang.left_s is not None else math.inf
    if gang.oracle_s is not None:
        return min(limit, gang.oracle_s - gang.ran_s)
    left = yard.history.left_s(gang, gang.ran_s + ran, quantile)
    return min(limit, ran + left if left is not None else math.inf)


def _again(held: Held, now: float, target: int | None) -> Gang:
    gang = held.gang
    return replace(gang, queued_at=now, ran_s=gang.ran_s + now - held.since, target=target)
