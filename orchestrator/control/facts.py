"""What decisions are made from: what is stored, what is seen, and how patient to be. Values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.cluster.model import Node
from orchestrator.cluster.status import AttemptStatus
from orchestrator.job.lifecycle import JobState, Reason
from orchestrator.memory.alike import Peak
from orchestrator.memory.options import Factors
from orchestrator.schedule.gang import Queue, Rules
from orchestrator.store.rows import AttemptRow, JobRow, Mark


@dataclass(frozen=True)
class Policy:
    """How patient to be, in seconds."""

    leash: float = 30.0
    leash_margin: float = 5.0
    stop_grace: float = 60.0
    pause_grace: float = 600.0
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class State:
    """What the database holds of the living."""

    jobs: Sequence[JobRow]
    attempts: Sequence[AttemptRow] = ()
    peaks: Sequence[Peak] = ()
    """Of jobs like those that have not started yet."""
    factors: Factors = ()
    """What attempts have taught of memory: by what to multiply margins."""
    queues: Sequence[Queue] = ()
    """Of which something was said."""
    marks: Mapping[str, Mark] = field(default_factory=dict)
    """Of nodes, by name."""
    ended: Mapping[str, JobState] = field(default_factory=dict)
    """Jobs that have ended, of those that waiting ones come after."""


@dataclass(frozen=True)
class Facts:
    """What was seen."""

    nodes: Sequence[Node]
    statuses: Mapping[str, AttemptStatus] = field(default_factory=dict)
    """By run id."""
    tracing: frozenset[str] = frozenset()
    """Jobs whose memory is being traced, which they wait for."""
    coming: Mapping[str, Reason] = field(default_factory=dict)
    """Jobs for which the cluster grows, and what is told of it."""


@dataclass(frozen=True)
class Prospect:
    """What a cluster that grows and shrinks may become."""

    nodes: tuple[Node, ...] = ()
    """That are not there, and could be."""
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    """Of jobs for which it grows now."""
