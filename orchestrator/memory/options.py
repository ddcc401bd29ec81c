"""In which ways a job may run on the nodes that there are: what the scheduler chooses from. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from launch.contract import Allocator, Device, EngineName, ExecutionPlan, Record
from orchestrator.cluster.model import Need, Node, Option
from orchestrator.cluster.spec import NodeKind, kind_of
from orchestrator.job.spec import TrainingJob, parse_job
from orchestrator.memory.alike import Peak
from orchestrator.memory.calibrate import NOTHING_LEARNED, Score, margin_factor
from orchestrator.memory.ladder import NOTHING, Relief, eased
from orchestrator.memory.margin import COLD, NONE, Margin, cold
from orchestrator.memory.search import Candidate, candidates, missing, predict_of
from orchestrator.memory.sizing import Sizing

DEVICES: tuple[Device, ...] = ("cuda", "cpu")
ALIKE = 0.95
"""Nodes with as much of each other's memory are alike: the same machines report a little more or less."""
TIGHT = 0.6
"""Of its place: a job that needs more is worth tracing before it starts."""


class Forecast(Record):
    """What was predicted of an attempt, in bytes: on a CPU of the whole process, else of its tensors on the GPU."""

    family: str
    peak_bytes: int
    margin_bytes: int
    """The margin before anything was learned."""


@dataclass(frozen=True)
class Ways:
    """Options, best first; without any, why."""

    options: tuple[Option, ...]
    misfit: str | None = None
    tight: bool = False
    """Whether the best of them needs most of its place."""


def kinds_of(nodes: Iterable[Node]) -> tuple[NodeKind, ...] | None:
    """Nodes that are alike, together, with the memory of the smallest; None where one does not tell its memory: then
    nobody knows what fits."""
    kinds = []
    for node in nodes:
        if not node.gpus and not node.cpu_slots:
            continue
        if node.memory_bytes is None or any(gpu.memory_bytes is None for gpu in node.gpus):
            return None
        found = kind_of(node)
        kinds.append(replace(found, name=found.gpu.name if found.gpu is not None else "cpu"))
    together: list[NodeKind] = []
    for kind in sorted(kinds, key=lambda one: (one.memory_bytes, one.gpu_memory_bytes)):
        at = next((at for at, one in enumerate(together) if _alike(one, kind)), None)
        if at is None:
            together.append(kind)
        else:
            least = min(together[at].gpu_memory_bytes, kind.gpu_memory_bytes)
            together[at] = replace(together[at], count=together[at].count + 1, gpu_memory_bytes=least)
    return tuple(together)


def _alike(few: NodeKind, more: NodeKind) -> bool:
    """Whether two kinds differ in little but their number; `few` has no more host memory than `more`."""
    memories = sorted((few.gpu_memory_bytes, more.gpu_memory_bytes))
    near = few.memory_bytes >= ALIKE * more.memory_bytes and memories[0] >= ALIKE * memories[1]
    same = replace(more, count=few.count, memory_bytes=few.memory_bytes, gpu_memory_bytes=few.gpu_memory_bytes)
    return near and same == few


Like = tuple[str, EngineName, Allocator]
"""What margins are learned by: architecture, engine and allocator."""
Factors = tuple[tuple[Like, float], ...]
"""By which to multiply the margins of what is alike."""


def factors_of(peaks: Iterable[Peak]) -> Factors:
    """By which factor margins change, from what attempts have needed; only where they were enough to tell."""
    scores: dict[Like, list[Score]] = {}
    for peak in peaks:
        if peak.predicted is None:
            continue
        forecast = Forecast.model_validate(peak.predicted)
        found = max(peak.measured_bytes or 0, (peak.limit_bytes or 0) if peak.ran_out else 0)
        if found:
            score = Score(predicted_bytes=forecast.peak_bytes, margin_bytes=forecast.margin_bytes, measured_bytes=found)
            scores.setdefault((forecast.family, peak.plan.engine, peak.plan.allocator), []).append(score)
    factors = ((like, margin_factor(values)) for like, values in scores.items())
    return tuple(sorted((like, factor) for like, factor in factors if factor != NOTHING_LEARNED))


@lru_cache(maxsize=4096)
def ways(
    job: str,
    sizing: str,
    kinds: tuple[NodeKind, ...],
    factors: Factors = (),
    relief: str | None = None,
) -> Ways | None:
    """How `job` may run on `kinds`; job, Sizing and Relief as JSON, so that an answer can be remembered.

    None where no kind of node alone takes such a gang: what it needs on nodes that differ, nobody knows.
    """
    spec = parse_job(job)
    assert isinstance(spec, TrainingJob)
    known, limits = Sizing.model_validate_json(sizing), Relief.model_validate_json(relief) if relief else NOTHING
    learned = {like: COLD.scaled(factor) for like, factor in factors}
    found = _found(spec, known, kinds, learned)
    if not found:
        return None
    fitting = [one for one in found if one.fits]
    if not fitting:
        # What the job file fixes is run if it fits as predicted; with nothing to spare, the ladder is there.
        fitting = [one for one in _found(spec, known, kinds, None) if one.fits]
    if not fitting:
        least = min(found, key=lambda one: one.excess)
        return Ways((), f"does not fit: the plan that misses by least {missing(least)}")
    best: dict[tuple[NodeKind, int], Candidate] = {}
    for one in sorted(fitting, key=lambda one: one.rank):
        best.setdefault((one.kind, one.plan.world_size), one)
    ordered = sorted(best.values(), key=lambda one: (-one.plan.world_size, one.plan.device == "cpu", one.rank))
    return Ways(tuple(_option(spec, known, one, limits) for one in ordered), tight=_is_tight(ordered[0]))


def _found(
    job: TrainingJob,
    sizing: Sizing,
    kinds: Sequence[NodeKind],
    learned: Mapping[Like, Margin] | None,
) -> list[Candidate]:
    """With the margins that were learned; without any for None."""

    def margin_of(plan: ExecutionPlan) -> Margin:
        if learned is None:
            return NONE
        return learned.get((sizing.family, plan.engine, plan.allocator)) or cold(sizing.on(plan.device), plan)

    return [
        one
        for device in DEVICES
        for one in candidates(
            job,
            sizing.work,
            sizing.on(device),
            [kind for kind in kinds if kind.device == device],
            margin_of,
            predict_of(job),
        )
    ]


def _option(job: TrainingJob, sizing: Sizing, one: Candidate, relief: Relief) -> Option:
    plan = one.plan
    on_gpu = plan.device == "cuda"
    return Option(
        processes=plan.world_size,
        device=plan.device,
        need=Need(device_bytes=one.needed.device if on_gpu else 0, host_bytes=one.needed.host),
        plan=eased(job, plan, relief),
        predicted=Forecast(family=sizing.family, peak_bytes=one.bare, margin_bytes=one.cold_margin).model_dump(),
    )


def _is_tight(one: Candidate) -> bool:
    on_gpu = one.plan.device == "cuda"
    return (one.needed.device > TIGHT * one.room.device) if on_gpu else (one.needed.host > TIGHT * one.room.host)
