"""What passes between the orchestrator and the ranks: the plan, the contract, and the files of an attempt. Torch-free.

Where the files of an attempt lie is `launch.attempt`, re-exported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from launch.attempt import (
    ENV_CHECKPOINT_DIR,
    ENV_HEARTBEAT,
    ENV_OUTPUT_DIR,
    ENV_PROGRESS_FILE,
    ENV_RUN_ID,
    ENV_STOP_FILE,
    AttemptFiles,
    ExitCode,
    write_atomically,
)
from launch.config import Half, LossMode, Offload, Precision, TrainSpec, half_of

__all__ = [
    "ALONE",
    "ENV_CHECKPOINT_DIR",
    "ENV_HEARTBEAT",
    "ENV_OUTPUT_DIR",
    "ENV_PROGRESS_FILE",
    "ENV_RUN_ID",
    "ENV_STOP_FILE",
    "Allocator",
    "AttemptFiles",
    "CheckpointNote",
    "Device",
    "EngineName",
    "ExecutionPlan",
    "ExitCode",
    "GitState",
    "NodeShare",
    "Origin",
    "Pinned",
    "ProgressLine",
    "RankError",
    "RankExit",
    "RankProcess",
    "RankResult",
    "Record",
    "RunContract",
    "StopRequest",
    "TrainSummary",
    "checkpoints_of_job",
    "dumps",
    "write_atomically",
]

Device = Literal["cpu", "cuda"]
Allocator = Literal["fast", "tight"]
EngineName = Literal["single", "ddp", "zero1", "zero2", "zero3"]


class Record(BaseModel):
    """Stored or sent by a peer: unknown fields are kept out silently, so that versions can differ."""

    # A metric may be no number, which JSON does not know; fields of floats read the text.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class ExecutionPlan(Record):
    """How a job fits: everything that may change without changing what is trained."""

    engine: EngineName
    world_size: int
    device: Device
    micro_batch_size: int
    """Rows per forward pass of a rank; the last one of a step may be smaller."""
    gradient_accumulation_steps: int
    """Forward passes per rank and optimizer step."""
    precision: Precision = "fp32"
    offload: Offload = "none"
    offload_path: str | None = None
    """The directory on each node's disk that it is moved to; None is host memory."""
    activation_checkpointing: bool = False
    loss: LossMode = "chunked"
    """A language model's; chunked only where its output layer allows that, which a rank finds out."""
    allocator: Allocator = "fast"
    """fast keeps what is freed for the next step; tight gives it back, so that as much is held as is used: on a CPU by
    malloc's threshold for mapping blocks, on a GPU by expandable segments."""

    @property
    def half(self) -> Half | None:
        """The type of two bytes that it computes in; None: in fp32, but for products if the precision is int8."""
        return half_of(self.precision)

    @property
    def zero_stage(self) -> int:
        """0 where nothing is sharded."""
        return int(self.engine[-1]) if self.engine.startswith("zero") else 0


class NodeShare(Record):
    """One node's part of a gang; node 0 holds rank 0."""

    node: str
    address: str
    processes: int
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs, one a process; empty on CPU."""
    threads: int = 1
    """CPU threads of each process."""


class GitState(Record):
    """Where a file stands in its git repository."""

    commit: str = Field(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")
    dirty: bool
    """Whether a tracked file differed from the commit, or the file itself is not in it."""
    path: str | None = Field(None, max_length=4096)
    """The file, from the repository's top; null if git does not track it."""


class Pinned(Record):
    """What a run that repeats another one is held to, so that nothing is planned anew."""

    plan: ExecutionPlan
    threads: tuple[int, ...]
    """CPU threads by rank: sums are taken in another order with another number of them."""
    data: dict[str, str]
    """Fingerprint of each part of the data."""


class Origin(Record):
    """Where a job comes from, beside what its file says: filled in by whoever submits it, never by the file."""

    git: GitState | None = None
    """The job file's."""
    pinned: Pinned | None = None


ALONE = 0
"""The attempt of a contract that no orchestrator made."""


class RunContract(Record):
    """All that a worker needs, in one JSON file."""

    run_id: str
    """`<job id>.<attempt>`; in the environment of every process of the attempt."""
    job_id: str
    attempt: int
    """ALONE if nobody numbers them."""
    plan: ExecutionPlan
    nodes: tuple[NodeShare, ...]
    main_port: int
    run_dir: str
    """The attempt's directory, seen by every node."""
    output_dir: str
    """Where the model directory goes."""
    checkpoint_dir: str
    """Shared by all attempts of the job: a directory, or a URL."""
    tracker_dir: str
    """Where trackers keep the job's run, which every attempt goes on with."""
    spec: TrainSpec | None = None
    command: tuple[str, ...] | None = None
    """The user's own command; exactly one of `spec` and `command` is given."""
    working_dir: str | None = None
    env: dict[str, str] = {}
    """The job's own environment variables."""
    env_from: dict[str, str] = {}
    """Variables whose values the node's agent takes from its own environment: name there by name here."""
    leash_s: float = 30.0
    """A rank ends itself when its node agent's heartbeat is older than this."""
    mtbf_s: float | None = None
    """Mean time between failures of a gang like this one, in seconds, where the orchestrator knows it."""
    hang_s: float | None = None
    """How long a rank may stay in a part of a step before it counts as hung; None for patience that adapts, 0 for
    ever."""
    log_patterns: tuple[str, ...] = ()
    """What the node's agent looks for in the log of a rank that failed."""
    origin: Origin = Origin()

    @property
    def main_address(self) -> str:
        return self.nodes[0].address

    def ranks_of(self, node_index: int) -> tuple[int, ...]:
        """Global ranks of a node: they are numbered through the nodes in order."""
        first = sum(share.processes for share in self.nodes[:node_index])
        return tuple(range(first, first + self.nodes[node_index].processes))

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=2))

    @classmethod
    def read(cls, path: Path) -> RunContract:
        """Raises pydantic.ValidationError or OSError: a contract is written by us, so a bad one is a bug."""
        return cls.model_validate_json(path.read_bytes())


class RankProcess(Record):
    """Who a rank is: a pid alone may be another process by the time one looks."""

    rank: int
    pid: int
    start_time: float
    """Seconds since the epoch, as psutil's create_time gives it."""
    host: str
    standby: bool = False
    """Whether it is a fork of a standby."""


class RankError(Record):
    code: str
    message: str
    field: str | None = None
    hint: str | None = None
    traceback: str | None = None
    echo: bool = False
    """Whether it tells of no more than the end of another rank."""
    limit_bytes: int | None = None
    """Out of memory: how much there is, and how much of it was used, where that is known."""
    used_bytes: int | None = None


class TrainSummary(Record):
    """What rank 0 reports of the loop."""

    steps: int
    samples: int
    samples_per_s: float
    losses: tuple[float, ...]
    """One per optimizer step taken: mean over the global batch (rows, their weights, or target tokens)."""
    first_step_at: float | None = None
    """Unix time at which the first optimizer step had been taken."""
    stopped_early: bool = False
    skipped_steps: int = 0
    """Steps left out because their loss was not finite; they are among `steps`, and have no loss."""
    rollbacks: int = 0
    """How often it went back to a checkpoint, since the loss had exploded; the steps left out then are skipped ones."""
    best_step: int | None = None
    """With train.keep_best: the step whose weights were exported."""
    dropped_rows: dict[str, int] = {}
    """causal-lm: rows of each part left out because no target token lies within data.max_length."""


class RankResult(Record):
    """What a rank found itself to be and to have used; rank 0 adds metrics and the loop's summary."""

    engine: EngineName
    zero_stage: int
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    precision: Precision
    offload: Offload
    activation_checkpointing: bool
    loss: LossMode = "whole"
    """Whether a language model's logits were made in chunks."""
    allocator: Allocator = "fast"
    peak_bytes: int
    """cuda: torch's peak allocation; cpu: peak resident set of the process."""
    baseline_bytes: int = 0
    """cpu: resident set after the imports, before there was a model."""
    moment_bytes: int
    """What the optimizer remembers of the weights on this rank (AdamW: two moments), read from its tensors."""
    master_bytes: int
    """fp32 copies of weights held beside the weights themselves by this rank."""
    metrics: dict[str, float] | None = None
    train: TrainSummary | None = None
    output_dir: str | None = None


class RankExit(Record):
    rank: int
    code: ExitCode
    time: float
    """Unix time; the earliest failure that is no echo is the cause."""
    signal: int | None = None
    status: int | None = None
    """Of a user's own command, if it is another one than `code`."""
    found: tuple[str, ...] = ()
    """Of the contract's log_patterns, those that the end of its log has; written by the node's agent."""
    error: RankError | None = None
    result: RankResult | None = None


class CheckpointNote(Record):
    """What became of a checkpoint."""

    id: str
    step: int
    outcome: Literal["committed", "failed", "resumed", "quarantined", "not-tidied", "rolled-back"]
    """committed; a save that failed; what the attempt went on from; found damaged and set aside; committed, but older
    ones could not be deleted; what it went back to."""
    bytes: int = 0
    """Of all ranks; resumed: that this rank read."""
    blocked_s: float | None = None
    """For how long training waited."""
    save_s: float | None = None
    """From the copy to the commit."""
    write_s: float | None = None
    """Of the slowest rank, hashing included."""
    hash_s: float | None = None
    source: Literal["memory"] | None = None
    """resumed: it was made of what the ranks before had left, in memory or as they ended; null: they had saved it."""
    spent: dict[str, float] | None = None
    """Of rank 0: seconds by phase (launch.pulse) from its beginning to this save, which makes safe what was done by
    then, however late it is committed."""
    code: str | None = None
    message: str | None = None
    hint: str | None = None


class ProgressLine(Record):
    """One line of `progress.jsonl`."""

    time: float
    phase: str
    """start | load | ready | train | evaluate | save | export | done; ready is between loading and the first step"""
    step: int = 0
    steps: int | None = None
    samples: int = 0
    loss: float | None = None
    learning_rate: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    memory_bytes: int | None = None
    slow_rank: int | None = None
    """The rank that the others wait for at every step, if there is one."""
    slow_by: float | None = None
    """How many times their time it needs for its own part of a step."""
    skipped: int | None = None
    """How many steps were left out so far, where this is one."""
    metrics: dict[str, float] | None = None
    checkpoint: CheckpointNote | None = None


class StopRequest(Record):
    """The stop message: ranks agree on a step boundary, then end with ExitCode.STOPPED."""

    reason: str
    deadline: float
    """Unix time after which the node agent ends what is left."""


def checkpoints_of_job(directory: str | None, job_id: str, job_dir: Path) -> str:
    """Where a job's checkpoints go: its own folder in the job file's `checkpoint.directory`, if there is one."""
    return f"{directory.rstrip('/')}/{job_id}" if directory else str(job_dir / "checkpoints")


def dumps(record: Record) -> dict[str, Any]:
    """`record` as JSON types."""
    return record.model_dump(mode="json")
