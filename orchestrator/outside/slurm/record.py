"""What travels with a job of ours through Slurm, and what is kept of it: in its script, and in files beside its runs.

ROOT/slurm/1234.json          who 1234 is: written when it is handed over, and by its first run
ROOT/slurm/1234.out           what its script printed (1234_5.out of an array)
ROOT/jobs/JOB/slurm.json      who may run here: one job of Slurm's, however often it is requeued
ROOT/jobs/JOB/job.db          its database, which its runs alone open, one after the other
ROOT/jobs/JOB/status.json     what that says, for those who ask
ROOT/jobs/JOB/attempt-N, checkpoints, model      as everywhere
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from launch.attempt import write_atomically
from launch.contract import Record
from orchestrator.cluster.model import Node
from orchestrator.errors import NotFoundError
from orchestrator.outside.record import Patience, Status, Task

ID = re.compile(r"(\d{1,12})(?:_(\d{1,7}))?")
PREFIX = "slurm:"


class Run(Record):
    """What all elements of an array have in common."""

    root: str
    """Where runs, checkpoints and models lie."""
    home: str
    """Where whoever handed it over looks for it."""
    node: Node
    """What each node gives."""
    warning_s: float
    """How long before its time limit Slurm warns it."""
    patience: Patience


class Handed(Record):
    """A job, or an array, that was handed over."""

    id: str
    """Slurm's, of the array as a whole."""
    root: str
    job_ids: tuple[str, ...]
    """Of an array those of its elements, in order."""
    names: tuple[str, ...]
    queue: str
    priority: int
    is_array: bool
    submitted_at: float


class Files:
    """Names of the files of a job's directory."""

    def __init__(self, root: Path | str, job_id: str) -> None:
        self.folder = Path(root) / "jobs" / job_id
        self.owner = self.folder / "slurm.json"
        self.database = self.folder / "job.db"
        self.status = self.folder / "status.json"
        self.cancelled = self.folder / "cancelled"

    def read_status(self) -> Status | None:
        """None where no run has begun yet."""
        try:
            return Status.model_validate_json(self.status.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def folder_of(home: Path | str) -> Path:
    return Path(home) / "slurm"


def parse_id(job_id: str) -> tuple[str, int | None]:
    """`slurm:1234_5` as (1234, 5). Raises NotFoundError for what is no id, so that no other path is ever read."""
    match = ID.fullmatch(job_id.removeprefix(PREFIX))
    if match is None:
        raise NotFoundError(
            f"`{job_id}` is no id of Slurm's", field="job", hint="write slurm:1234, or slurm:1234_5 in an array"
        )
    return match[1], None if match[2] is None else int(match[2])


def keep(home: Path | str, handed: Handed) -> None:
    """Raises OSError."""
    folder = folder_of(home)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{handed.id}.json", handed.model_dump_json(indent=2))


def recall(home: Path | str, slurm_id: str) -> Handed:
    """Raises NotFoundError for a job that was not handed over from this home."""
    try:
        return Handed.model_validate_json((folder_of(home) / f"{slurm_id}.json").read_bytes())
    except (FileNotFoundError, ValidationError) as problem:
        raise NotFoundError(
            f"no job {PREFIX}{slurm_id} was handed over from {home}",
            field="job",
            hint="see `tuneyard ls --on slurm`; TUNEYARD_HOME names another home",
        ) from problem


def recall_all(home: Path | str) -> Iterator[Handed]:
    """All that was handed over from this home, oldest first."""
    folder = folder_of(home)
    names = [path.stem for path in folder.glob("*.json") if path.stem.isdigit()] if folder.is_dir() else []
    for name in sorted(names, key=int):
        yield recall(home, name)


def dump_script_data(run: Run, tasks: Iterable[Task]) -> str:
    """The lines that a script hands to its run: what tasks have in common, then a line each."""
    return "\n".join([run.model_dump_json(), *(task.model_dump_json() for task in tasks)])


def parse_script_data(text: str) -> tuple[Run, list[Task]]:
    """Raises pydantic.ValidationError: a script is written by us."""
    first, *others = text.splitlines()
    return Run.model_validate_json(first), [Task.model_validate_json(line) for line in others]
