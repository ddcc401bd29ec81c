"""The files and environment of an attempt, and how its ranks end. Standard library alone.

An attempt's directory is the whole interface between the orchestrator and the ranks. The node agent writes the
contract, the launcher's configuration and `stop.json`; a rank writes `rank-N/{process,progress,exit,log}`; nobody
else writes there. How a rank ended is `exit.json`, so that it is known even where nobody waited for the process.

Nothing heavier than the standard library is imported here: the node agent, which starts in every attempt, pays for it.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from pathlib import Path

# Environment of every process of an attempt.
ENV_RUN_ID = "TUNEYARD_RUN_ID"
ENV_HEARTBEAT = "TUNEYARD_HEARTBEAT"
ENV_CHECKPOINT_DIR = "TUNEYARD_CHECKPOINT_DIR"
ENV_OUTPUT_DIR = "TUNEYARD_OUTPUT_DIR"
ENV_STOP_FILE = "TUNEYARD_STOP_FILE"
ENV_PROGRESS_FILE = "TUNEYARD_PROGRESS_FILE"

# Environment of a standby: so many characters, the room in which its attempt's id is written when it gets one.
ENV_RESERVED = "TUNEYARD_STANDBY"
RESERVED = 160


PULSE = "pulse"
CANCELLED = "cancelled"
"""The stop message's reason where nothing of the job is to go on."""
HUNG = "hung"
"""The stop message's reason where a rank of the gang does not move: agents read all stacks before they end anything."""

# A plan's wish for a GPU's allocator. Who starts the launcher puts it into torch's own words (`told_to_torch`).
ENV_ALLOCATOR = "TUNEYARD_ALLOCATOR"
TORCH_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch looks for its allocator's settings; it reads the first of them that is set, and only at the start."""


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


class AttemptFiles:
    """Names of the files in an attempt's directory."""

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)
        self.contract = self.run_dir / "contract.json"
        self.deepspeed_config = self.run_dir / "deepspeed.json"
        self.stop = self.run_dir / "stop.json"

    def accelerate_config(self, node_index: int) -> Path:
        """The launcher's configuration differs between nodes by the machine's rank alone."""
        return self.run_dir / f"accelerate-{node_index}.yaml"

    def heartbeat(self, node_index: int) -> Path:
        """Rewritten by the node's agent: holds time.monotonic() of that node."""
        return self.run_dir / f"agent-{node_index}.heartbeat"

    def agent(self, node_index: int) -> Path:
        """Who the node's agent is; created exclusively, so an attempt starts once."""
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

    def pulse(self, rank: int) -> Path:
        """Where it is at the moment: launch.pulse."""
        return self.rank(rank) / PULSE

    def stall(self, rank: int) -> Path:
        """Written by the node's agent while the rank does not move: execute.stall."""
        return self.rank(rank) / "stall.json"

    def stacks(self, rank: int) -> Path:
        """What its threads were doing when it, or another one, did not move."""
        return self.rank(rank) / "stacks.txt"

    def collectives(self, rank: int | None = None) -> Path:
        """With NCCL: what its flight recorder has of the rank's collectives, once they failed or the rank hung; without
        a rank how all begin."""
        return self.run_dir / f"nccl-trace-{'' if rank is None else rank}"

    def ask_for_collectives(self, rank: int) -> Path:
        """A named pipe of torch's: what is written there makes the flight recorder write."""
        return self.run_dir / f"nccl-trace-{rank}.pipe"

    def samples(self, rank: int) -> Path:
        """With train.log_samples: which rows it trained on."""
        return self.rank(rank) / "samples.jsonl"

    def exit(self, rank: int) -> Path:
        return self.rank(rank) / "exit.json"

    def log(self, rank: int) -> Path:
        return self.rank(rank) / "log"


def told_to_torch(environment: Mapping[str, str]) -> dict[str, str]:
    """A launcher's `environment` in which torch reads the wish of ENV_ALLOCATOR, beside what the user tells it there.

    Whatever the user says of expandable segments stands; a rank finds out, and refuses to run as something else.
    """
    told = dict(environment)
    if told.pop(ENV_ALLOCATOR, None) == "tight":
        name = next((name for name in TORCH_ALLOCATOR if told.get(name)), TORCH_ALLOCATOR[-1])
        if expands_segments(told.get(name, "")) is None:
            told[name] = ",".join(filter(None, [told.get(name), "expandable_segments:True"]))
    return told


def expands_segments(settings: str) -> bool | None:
    """What settings of torch's allocator say of expandable segments; None if nothing."""
    said = dict(pair.partition(":")[::2] for pair in "".join(settings.split()).split(","))
    value = said.get("expandable_segments")
    return None if value is None else value == "True"


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part. Raises OSError (a full disk, for one)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
