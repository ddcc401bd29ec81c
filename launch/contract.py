"""What passes between the orchestrator and the ranks: the plan, the contract, and the files of an attempt. Torch-free.

An attempt's directory is its whole interface. The orchestrator writes `contract.json`, the launcher's configuration
and `stop.json`; a rank writes `rank-N/{process,progress,exit,log}`; nobody else writes there. How a rank ended is
`exit.json`, so that it is known even where nobody waited for the process.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from launch.config import Offload, Precision, TrainSpec

Device = Literal["cpu", "cuda"]
EngineName = Literal["single", "ddp", "zero1", "zero2", "zero3"]


class ExitCode(enum.IntEnum):
    """How a rank ends; the process's exit status."""

    DONE = 0
    CRASH = 1  # an exception nobody foresaw; Python's own status for it
    STOPPED = 10  # asked to stop, and did so at a step boundary
    OUT_OF_MEMORY = 11
    DATA_ERROR = 12
    USER_ERROR = 13  # the job file, or the model it names
    CONTRACT_MISMATCH = 14  # the rank found itself running something else than planned
    LEASH_EXPIRED = 15  # its node agent fell silent
    KILLED = 16  # by a signal; written by the node agent, since the rank could not


class Record(BaseModel):
    """Stored or sent by a peer: unknown fields are kept out silently, so that versions can differ."""

    model_config = ConfigDict(frozen=True, extra="ignore")


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
    activation_checkpointing: bool = False

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


class RunContract(Record):
    """All that a worker needs, in one JSON file."""

    run_id: str
    """`<job id>.<attempt>`; in the environment of every process of the attempt."""
    job_id: str
    attempt: int
    plan: ExecutionPlan
    nodes: tuple[NodeShare, ...]
    main_port: int
    run_dir: str
    """The attempt's directory, seen by every node."""
    output_dir: str
    """Where the model directory goes."""
    checkpoint_dir: str
    """Shared by all attempts of the job."""
    spec: TrainSpec | None = None
    command: tuple[str, ...] | None = None
    """The user's own command; exactly one of `spec` and `command` is given."""
    working_dir: str | None = None
    leash_s: float = 30.0
    """A rank ends itself when its node agent's heartbeat is older than this."""

    @property
    def main_address(self) -> str:
        return self.nodes[0].address

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


class RankError(Record):
    code: str
    message: str
    field: str | None = None
    hint: str | None = None
    traceback: str | None = None


class TrainSummary(Record):
    """What rank 0 reports of the loop."""

    steps: int
    samples: int
    samples_per_s: float
    losses: tuple[float, ...]
    """One per optimizer step: mean over the global batch (rows, or target tokens for causal-lm)."""
    first_step_at: float | None = None
    """Unix time at which the first optimizer step had been taken."""
    stopped_early: bool = False


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
    peak_bytes: int
    """cuda: torch's peak allocation; cpu: peak resident set of the process."""
    moment_bytes: int
    """Adam's two moments held by this rank, read from the optimizer's tensors."""
    master_bytes: int
    """fp32 copies of weights held beside the weights themselves by this rank."""
    metrics: dict[str, float] | None = None
    train: TrainSummary | None = None
    output_dir: str | None = None


class RankExit(Record):
    rank: int
    code: ExitCode
    time: float
    """Unix time; the earliest failure is the cause, the others are its echo."""
    signal: int | None = None
    error: RankError | None = None
    result: RankResult | None = None


class ProgressLine(Record):
    """One line of `progress.jsonl`."""

    time: float
    phase: str
    """start | load | train | evaluate | save | export | done"""
    step: int = 0
    steps: int | None = None
    samples: int = 0
    loss: float | None = None
    learning_rate: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    memory_bytes: int | None = None
    metrics: dict[str, float] | None = None


class StopRequest(Record):
    """The stop message: ranks agree on a step boundary, then end with ExitCode.STOPPED."""

    reason: str
    deadline: float
    """Unix time after which the node agent ends what is left."""


# Environment of every process of an attempt.
ENV_RUN_ID = "TUNEYARD_RUN_ID"
ENV_HEARTBEAT = "TUNEYARD_HEARTBEAT"
ENV_CHECKPOINT_DIR = "TUNEYARD_CHECKPOINT_DIR"
ENV_OUTPUT_DIR = "TUNEYARD_OUTPUT_DIR"
ENV_STOP_FILE = "TUNEYARD_STOP_FILE"
ENV_PROGRESS_FILE = "TUNEYARD_PROGRESS_FILE"


class AttemptFiles:
    """Names of the files in an attempt's directory."""

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)
        self.contract = self.run_dir / "contract.json"
        self.accelerate_config = self.run_dir / "accelerate.yaml"
        self.deepspeed_config = self.run_dir / "deepspeed.json"
        self.stop = self.run_dir / "stop.json"

    def node_accelerate_config(self, node_index: int) -> Path:
        """The launcher's configuration differs between nodes by the machine's rank alone."""
        return self.run_dir / f"accelerate-{node_index}.yaml"

    def heartbeat(self, node_index: int) -> Path:
        """Touched by the node's agent: holds time.monotonic() of that node."""
        return self.run_dir / f"agent-{node_index}.heartbeat"

    def agent(self, node_index: int) -> Path:
        """RankProcess-like record of the node's agent; created exclusively, so an attempt starts once."""
        return self.run_dir / f"agent-{node_index}.json"

    def agent_exit(self, node_index: int) -> Path:
        """Written when every process of the attempt on that node has ended: the launcher's exit status."""
        return self.run_dir / f"agent-{node_index}.exit.json"

    def launcher_log(self, node_index: int) -> Path:
        return self.run_dir / f"launcher-{node_index}.log"

    def rank(self, rank: int) -> Path:
        return self.run_dir / f"rank-{rank}"

    def process(self, rank: int) -> Path:
        return self.rank(rank) / "process.json"

    def progress(self, rank: int) -> Path:
        return self.rank(rank) / "progress.jsonl"

    def exit(self, rank: int) -> Path:
        return self.rank(rank) / "exit.json"

    def log(self, rank: int) -> Path:
        return self.rank(rank) / "log"


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part. Raises OSError (a full disk, for one)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def dumps(record: Record) -> dict[str, Any]:
    """`record` as JSON types."""
    return record.model_dump(mode="json")
