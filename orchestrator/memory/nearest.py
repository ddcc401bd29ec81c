"""What would have to change for a job that does not fit: changes are tried, the least first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.config import AdapterSpec
from launch.footprint_record import Footprint
from launch.shape import ModelShape
from orchestrator.cluster.spec import NodeKind
from orchestrator.job.spec import TrainingJob
from orchestrator.memory.margin import Margin
from orchestrator.memory.search import Choice, Predict, search, told

MOST_NODES = 1024
"""Of a kind, when more nodes than there are, are tried."""


@dataclass(frozen=True)
class Change:
    """One change that makes it fit."""

    change: str
    """`with train.activation_checkpointing: true`"""
    choice: Choice

    @property
    def sentence(self) -> str:
        return f"it fits {self.change}: {told(self.choice.best.plan)}"


def nearest(
    job: TrainingJob,
    shape: ModelShape,
    kinds: Sequence[NodeKind],
    footprint_of: Callable[[TrainingJob], Footprint],
    margin: Margin | None = None,
    predict: Predict | None = None,
) -> Change | None:
    """The first of the changes that does: what the job file fixes is left to the planner, other nodes and more
    processes of the cluster, half as long rows, an adapter, more nodes than there are."""
    for change, changed, nodes in _changes(job, kinds):
        choice = search(changed, shape, footprint_of(changed), nodes, margin, predict)
        if choice is not None and choice.fits:
            return Change(change, choice)
    return None


Try = tuple[str, TrainingJob, Sequence[NodeKind]]


def _changes(job: TrainingJob, kinds: Sequence[NodeKind]) -> Iterator[Try]:
    free, freed = job, []
    for change, update in _fixed(job):
        yield f"with {change}", _with(job, update), kinds
        free = _with(free, update)
        freed.append(change)
    if len(freed) > 1:
        yield f"with {' and '.join(freed)}", free, kinds
    _, high = job.resources.bounds
    rows = job.train.global_batch_size
    available = max((kind.most for kind in kinds), default=0)
    size = high
    while size < min(available, rows):
        size = min(2 * size, available, rows)
        yield f"on {size} processes", _processes(free, size), kinds
    if job.resources.accelerator != "any" and job.train.precision != "int8":
        anywhere = _with(free, {"resources": {"accelerator": "any"}})
        yield "with resources.accelerator: any", anywhere, kinds
    if job.train.precision in ("auto", "fp32"):
        yield "with train.precision: bf16", _with(free, {"train": {"precision": "bf16"}}), kinds
    half = _halves(job.data.max_length)
    for length in half:
        yield f"with data.max_length: {length}", _with(free, {"data": {"max_length": length}}), kinds
    if job.adapter is None and not job.train.freeze:
        adapter = free.model_copy(update={"adapter": AdapterSpec()})
        yield "with an adapter (adapter: {type: lora})", adapter, kinds
        for length in half:
            shorter = _with(adapter, {"data": {"max_length": length}})
            yield f"with an adapter (adapter: {{type: lora}}) and data.max_length: {length}", shorter, kinds
    size = max(high, 1)
    while 2 * size <= rows:
        size *= 2
        more = [replace(kind, count=min(MOST_NODES, max(kind.count, -(-size // kind.slots)))) for kind in kinds]
        if size > available:
            yield f"on {size} processes, more than the cluster takes", _processes(free, size), more


def _fixed(job: TrainingJob) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the job file says that could be left to the planner."""
    if job.train.micro_batch_size is not None:
        yield "train.micro_batch_size: null", {"train": {"micro_batch_size": None}}
    if job.train.loss_mode == "whole":
        yield "train.loss_mode: chunked", {"train": {"loss_mode": "chunked"}}
    if job.train.activation_checkpointing is False:
        yield "train.activation_checkpointing: true", {"train": {"activation_checkpointing": True}}
    if job.strategy != "auto":
        yield "strategy: auto", {"strategy": "auto"}
    if job.offload is not None and job.offload != "all":
        yield "offload: null", {"offload": None}


def _halves(length: int) -> list[int]:
    found = []
    while length > 128:
        length //= 2
        found.append(length)
    return found


def _with(job: TrainingJob, update: dict[str, Any]) -> TrainingJob:
    changed = {
        name: getattr(job, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in update.items()
    }
    return job.model_copy(update=changed)


def _processes(job: TrainingJob, count: int) -> TrainingJob:
    changed = job if job.strategy != "single" else _with(job, {"strategy": "auto"})
    return _with(changed, {"resources": {"num_processes": count}})
