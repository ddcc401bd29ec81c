"""What is seen of an attempt, node by node. Pure: executors fill it in, reconcile reads it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from launch.contract import ProgressLine, RankExit


class StandbyReport(BaseModel):
    """The idle standbys of a node."""

    model_config = ConfigDict(frozen=True)

    count: int = 0
    bytes: int = 0
    """Memory they hold; what several processes map is divided among them."""


class Stall(BaseModel):
    """Where a rank stood when one of its node, or of its gang, did not move for too long."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rank: int
    time: float
    phase: str
    part: str
    """Of a step."""
    step: int
    count: int
    """Of its moves: who made fewer than the others keeps them waiting."""
    seconds: float
    """Since it moved last."""
    limit_s: float
    stopped: bool
    """A signal has stopped its process."""
    overdue: bool
    stack: str | None = None


class Spent(BaseModel):
    """Where rank 0's time went, as its pulse told. Stored beside its attempt, whose directory may be gone one day."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    began_at: float
    """Unix time."""
    seconds: dict[str, float] = {}
    """By phase (launch.pulse), from `began_at` until it moved last."""
    phase: str
    """What it has been doing since then."""
    step: int = 0
    from_step: int | None = None
    """After how many steps the attempt began to train; null before it did."""
    failed_at: float | None = None
    """When the first of the ranks failed, if one did and said so."""


class Energy(BaseModel):
    """What counters of a node told of the time of an attempt, in joules; null where there is no counter."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gpu_j: float | None = None
    """Of the GPUs that the attempt held there."""
    cpu_j: float | None = None
    """Of all processors of the node, whoever used them."""


class Slots(BaseModel):
    """What a node takes of ranks."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    kind: str
    """cpu, or a type of GPU."""
    slots: int


class ProbeRequest(BaseModel):
    """A probe of a node: by itself, or as one of several that sum with each other."""

    model_config = ConfigDict(frozen=True)

    id: str
    directory: str
    """On the disk that jobs use."""
    rank: int = 0
    size: int = 1
    address: str = "127.0.0.1"
    """Of rank 0."""
    port: int = 0
    neighbour: str = ""
    """The other's name."""

    @property
    def options(self) -> list[str]:
        """The words of `python -m launch.probe`."""
        return [f"--{name}={value}" for name, value in self.model_dump(exclude={"id"}).items()]


class ProbeCheck(BaseModel):
    """What came of one check of a probe."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    ok: bool
    told: str
    value: float | None = None
    unit: str | None = None


TOGETHER = "all-reduce"
"""How names of checks with a neighbour begin."""


class ProbeReport(BaseModel):
    """What a probe of a node has found."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    checks: tuple[ProbeCheck, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def sound(self) -> bool:
        """Whether it may have attempts: if it fails with one neighbour and not with another, that one is bad."""
        alone = [check for check in self.checks if not check.name.startswith(TOGETHER)]
        together = [check.ok for check in self.checks if check.name.startswith(TOGETHER)]
        return all(check.ok for check in alone) and (any(together) or not together)

    @property
    def sentence(self) -> str:
        """What has failed."""
        return "; ".join(f"{check.name}: {check.told}" for check in self.checks if not check.ok)


class NodeReport(BaseModel):
    """What is known of an attempt on one of its nodes."""

    model_config = ConfigDict(frozen=True)

    node_index: int
    reachable: bool
    """Whether the agent answered; if not, the rest is what the attempt's directory shows, if it can be seen."""
    claimed: bool = False
    """An agent has taken the attempt on."""
    ended: bool = False
    """No process of the attempt is left on the node."""
    begun: bool = False
    """A rank has shown itself."""
    exits: tuple[RankExit, ...] = ()
    progress: ProgressLine | None = None
    """The newest line of the node's first rank."""
    news: tuple[ProgressLine, ...] = ()
    """Rank 0's lines about checkpoints past the offset that was asked from: the next of them, maybe not all."""
    offset: int = 0
    """Up to where its progress was read for them; to go on from."""
    stalls: tuple[Stall, ...] = ()
    """Where its ranks stand, while one does not move."""
    spent: Spent | None = None
    """The node's first rank's."""
    energy: Energy | None = None
    """Of an attempt that has ended here."""


class AttemptStatus(BaseModel):
    """What is known of an attempt: one report a node."""

    model_config = ConfigDict(frozen=True)

    reports: tuple[NodeReport, ...]

    @property
    def ended(self) -> bool:
        return all(report.ended for report in self.reports)

    @property
    def begun(self) -> bool:
        return any(report.begun for report in self.reports)

    @property
    def claimed(self) -> bool:
        return any(report.claimed for report in self.reports)

    @property
    def claimed_everywhere(self) -> bool:
        return all(report.claimed for report in self.reports)

    @property
    def seen(self) -> bool:
        """Whether every node's agent has answered, so that what has ended is known to be gone."""
        return all(report.reachable for report in self.reports)

    @property
    def reachable(self) -> bool:
        """Whether every node that has not ended answered."""
        return all(report.reachable or report.ended for report in self.reports)

    @property
    def exits(self) -> list[RankExit]:
        return [end for report in self.reports for end in report.exits]

    @property
    def stalls(self) -> list[Stall]:
        return [stall for report in self.reports for stall in report.stalls]

    @property
    def progress(self) -> ProgressLine | None:
        """The newest line of rank 0."""
        return self.reports[0].progress if self.reports else None

    @property
    def news(self) -> tuple[ProgressLine, ...]:
        return self.reports[0].news if self.reports else ()

    @property
    def offset(self) -> int:
        return self.reports[0].offset if self.reports else 0

    @property
    def spent(self) -> Spent | None:
        """Where rank 0's time went."""
        return self.reports[0].spent if self.reports else None

    @property
    def energy(self) -> tuple[Energy | None, ...]:
        """What each node's counters told, once it has ended there."""
        return tuple(report.energy for report in self.reports)
