"""What the API answers and the client reads: one set of types on both sides. Lenient, since versions may differ."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from launch.contract import ExecutionPlan, NodeShare, ProgressLine
from orchestrator.cluster.model import Node, Placement
from orchestrator.cluster.status import ProbeCheck, StandbyReport
from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import AttemptState, JobState, Reason


class View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JobView(View):
    id: str
    name: str
    queue: str
    priority: int
    state: JobState
    reason: Reason
    attempts: int
    failures: int = 0
    """How many attempts failed, which retry.max_restarts bounds."""
    preemptions: int = 0
    """How often it was stopped for the sake of another job."""
    served_s: float = 0.0
    """Processes x seconds of the attempts that have ended."""
    array_id: str | None = None
    """The array that it is an element of."""
    submitted_at: float
    started_at: float | None = None
    finished_at: float | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    progress: ProgressLine | None = None
    """The newest attempt's."""
    checkpoint: LastCheckpoint | None = None
    """The newest committed one that is known of."""
    plan: ExecutionPlan | None = None
    spec: dict[str, Any] | None = None


class AttemptView(View):
    number: int
    state: AttemptState
    plan: ExecutionPlan
    nodes: tuple[NodeShare, ...]
    run_dir: str
    checkpoint_dir: str | None = None
    """A directory, or a URL."""
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    outcome: str | None = None
    progress: ProgressLine | None = None
    launch: dict[str, str] = {}
    """File name → text of the generated launcher configuration of the first node."""


class EventView(View):
    id: int
    attempt: int | None
    time: float
    kind: str
    data: dict[str, Any]


class NodeView(Node):
    free: int
    """Ranks that it can take now."""
    busy: int = 0
    """Ranks of attempts that hold its slots."""
    standbys: StandbyReport = StandbyReport()
    mark: str | None = None
    """cordoned: it gets no new attempts; drained: and those on it go elsewhere; suspect: cordoned until it is probed"""
    mark_reason: str | None = None


class JoinView(View):
    """What a machine must know to be a node of the yard."""

    yard: str | None = None
    """Its id, if `tuneyard up` made it."""
    head: str
    """host:port of Ray's head."""
    ray_token: str | None = None
    """Ray's own; a secret."""
    home: str
    """The yard's directory, where runs and checkpoints lie unless jobs say otherwise."""
    redis: bool = False
    """Whether Ray's head may be away for long and come back."""
    python: str
    ray: str
    tuneyard: str


class MarkView(View):
    """That a node gets no new attempts."""

    name: str
    mark: str
    reason: str | None = None
    since: float


class ProbeView(View):
    """What a probe of a node has found."""

    name: str
    ok: bool
    checks: tuple[ProbeCheck, ...]


class QueueView(View):
    name: str
    weight: float
    guaranteed: int | None = None
    """Processes that are its own; null for none."""
    ceiling: int | None = None
    """Most processes that it may hold, with what it borrows; null for no limit."""
    lendable: bool
    """Whether others may have what it leaves idle of its guarantee."""
    configured: bool
    """Whether anything was said of it; else these are the defaults."""
    running: int = 0
    """Jobs with an attempt."""
    waiting: int = 0
    held: int = 0
    """Processes that have a place."""


class EtaView(View):
    """When a job is expected to start, in unix time; null where that is not in sight, or nobody knows."""

    low: float | None = None
    expected: float | None = None
    high: float | None = None


class TurnView(View):
    """A job that waits in the queue, in its order."""

    position: int
    """1 is the first."""
    job: str
    queue: str
    priority: int
    processes: tuple[int, int]
    """Fewest and most."""
    level: int
    """Within its queue: 0 has the least work ahead, as far as history tells, or has waited for long."""
    waited_s: float
    preemptions: int = 0
    reason: Reason
    eta: EtaView = EtaView()


class ReservationView(View):
    """Slots that are kept for the first job that cannot start yet."""

    job: str
    at: float | None = None
    """When it starts at the latest, if jobs take as long as expected; null where nobody knows."""
    slots: dict[str, int] = {}
    """Node name → processes."""


class QueueLook(View):
    """The queue as it stands."""

    time: float
    turns: tuple[TurnView, ...] = ()
    reservation: ReservationView | None = None
    queues: tuple[QueueView, ...] = ()


class WhyView(View):
    """Why a job is where it is."""

    job: str
    state: JobState
    reason: Reason
    turn: TurnView | None = None
    """Its place, if it stands in the queue."""
    ahead: tuple[str, ...] = ()
    """The next jobs before it, at most five, the first first."""
    jobs_ahead: int = 0
    reservation: ReservationView | None = None
    """Its own, or the one it must go around."""
    story: tuple[str, ...] = ()
    """What decides its place, in sentences."""


class DryRun(View):
    """What would happen to a job."""

    placement: Placement | None
    """Where it would start now; null if it would wait."""
    plan: ExecutionPlan
    waits: str | None
    """Why it would not start at once; null if it would."""


class EnergyView(View):
    """What counters told, of attempts that have ended; null where none did. Nothing is estimated."""

    gpu_kwh: float | None = None
    """Of the GPUs that attempts held."""
    cpu_kwh: float | None = None
    """Of the processors of nodes that an attempt held alone."""
    measured: int = 0
    """Attempts of which one of the two is known."""
    ended: int = 0
    """Of so many."""


class UseView(View):
    """Where time went. Seconds are those of jobs, slot-seconds the same times their processes; a slot is a GPU, or what
    a node without GPUs takes a rank on."""

    seconds: dict[str, float]
    """By category: recover.ledger.Category."""
    slot_seconds: dict[str, float]
    useful: float | None = None
    """Training, as a share of the slot-seconds that were held; null where nothing was told of it."""
    lost_slot_s: float
    """Held for work that was done again, or for start-up: the sum of the three."""
    lost_to_preemption_slot_s: float
    lost_to_failures_slot_s: float
    lost_to_startup_slot_s: float
    slot_hours: dict[str, float]
    """By kind of slot: cpu, or a type of GPU."""
    gpu_hours: float
    cost: float | None = None
    """Null where no price is configured of something that was held."""
    energy: EnergyView = EnergyView()


class StintView(View):
    """An attempt in an account."""

    number: int
    processes: int
    kinds: dict[str, int]
    """Processes by kind of slot."""
    since: float
    until: float
    ended: str | None = None
    """How, in a few words; null while it lives."""
    from_step: int | None = None
    """After how many steps it began to train; null if it did not, or did not tell."""
    step: int | None = None
    """The last that it was at."""
    kept_step: int | None = None
    """Up to which step its work has stayed, where some of it has not: the rest is done again."""
    seconds: dict[str, float]
    energy: EnergyView = EnergyView()


class SpanView(View):
    """A stretch of a job's time; several categories are spread over it."""

    since: float
    until: float
    attempt: int | None = None
    seconds: dict[str, float]


class AccountView(UseView):
    """Where the time of a job went: its seconds add up to `until` less `since`."""

    job: str
    queue: str
    state: JobState
    since: float
    """Its submission, in unix time."""
    until: float
    """Its end, or now."""
    wall_s: float
    goodput: float | None = None
    """Training, as a share of the time since its first start; null if it never started, or told nothing."""
    currency: str | None = None
    attempts: tuple[StintView, ...] = ()
    spans: tuple[SpanView, ...] = ()


class QueueAccount(UseView):
    queue: str
    jobs: int


class BinView(View):
    """A stretch of a cluster's time."""

    since: float
    until: float
    slot_seconds: dict[str, float]
    """By category, of all jobs."""
    offered_slot_s: float | None = None
    """Null where it is not known for all of it."""


class ClusterAccount(View):
    """Where the slots of a cluster went in a time."""

    since: float
    until: float
    total: UseView
    queues: tuple[QueueAccount, ...] = ()
    known_since: float | None = None
    """From when on it is known which slots there were; null for nothing."""
    offered_slot_s: dict[str, float] = {}
    """By kind, since then."""
    idle_slot_s: dict[str, float] = {}
    """What nobody held of them."""
    currency: str | None = None
    bins: tuple[BinView, ...] = ()
