"""What travels with a job of ours through Kubernetes, and what is kept of it.

RayJob NAMESPACE/NAME         truth of what was handed over; labels say whose it is, an annotation which submit made it
  head pod, annotation ORDER  what its run is to do, as a file by the downward API: one object, there or not
MOUNT/jobs/NAME/job.db        its database, which its runs alone open, one after the other
MOUNT/jobs/NAME/status.json   what that says, for those who see the volume
HOME/k8s/NAMESPACE/NAME.json  that it was handed over from here: written before it is, so that no submit is forgotten
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from launch.attempt import write_atomically
from launch.contract import Record
from orchestrator.errors import NotFoundError
from orchestrator.outside.record import Patience, Status, Task

PREFIX = "k8s:"
ID = re.compile(r"([a-z0-9][a-z0-9-]{0,62})/([a-z0-9][a-z0-9-]{0,62})")
OWN = "app.kubernetes.io/managed-by"
OURS = "tuneyard"
ARRAY_LABEL = "tuneyard.io/array"
JOB_LABEL = "tuneyard.io/job"
KEY = "tuneyard.io/key"
"""Annotation: a random word of the submit that made it. A create whose answer was lost finds it, and is not doubled."""
ORDER = "tuneyard.io/order"
HANDED = "tuneyard.io/handed"
"""Annotation: Handed as JSON, for who asks from another machine."""
CANCELLED = "tuneyard.io/cancelled"
"""Annotation: when somebody asked for its end."""
ORDER_FILE = "/etc/tuneyard/order"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
MAX_NAME = 40
"""KubeRay takes 47, and appends to it."""


class RunOrder(Record):
    """All that a run needs to know."""

    root: str
    """Where runs, checkpoints and models lie, as pods see it."""
    nodes: int
    """Worker pods to wait for, so that it starts as a gang."""
    processes: int
    grace_s: float
    """Between SIGTERM and SIGKILL of a pod."""
    patience: Patience
    task: Task


class Handed(Record):
    """That something is, or was to be, handed over from this home."""

    namespace: str
    name: str
    context: str | None = None
    job_name: str
    queue: str
    priority: int
    root: str
    """The volume's directory, as pods see it."""
    key: str
    array: str | None = None
    index: int = 0
    submitted_at: float
    created: bool = False
    """Whether the API server has said that it has it."""
    cancelled: bool = False
    ended: str | None = None
    """The last JobView that was final, as JSON: what is told once the RayJob is gone."""

    @property
    def id(self) -> str:
        return f"{PREFIX}{self.namespace}/{self.name}"


class Files:
    """Names of the files of a job's directory, where this machine sees it."""

    def __init__(self, root: Path | str, name: str) -> None:
        self.folder = Path(root) / "jobs" / name
        self.database = self.folder / "job.db"
        self.status = self.folder / "status.json"
        self.run = self.folder / "run.json"
        self.cancelled = self.folder / "cancelled"

    def read_status(self) -> Status | None:
        """None where no run has begun yet, or the volume is not in sight."""
        try:
            return Status.model_validate_json(self.status.read_bytes())
        except (OSError, ValidationError):
            return None


def new_key() -> str:
    return secrets.token_hex(8)


def object_name(job_id: str) -> str:
    """A DNS-1035 name of at most MAX_NAME characters that ends as `job_id` does, which makes it the job's own."""
    name = job_id if job_id[0].isalpha() else f"j-{job_id}"
    if len(name) <= MAX_NAME:
        return name
    tail = re.search(r"-[a-z0-9]{5}(-\d+)?$", name)
    end = tail[0] if tail else name[-12:]
    return name[: MAX_NAME - len(end)].rstrip("-") + end


def parse_id(job_id: str) -> tuple[str, str]:
    """`k8s:lab/sms-x1y2z` as (lab, sms-x1y2z). Raises NotFoundError for what is no id: no other path is read."""
    match = ID.fullmatch(job_id.removeprefix(PREFIX))
    if match is None:
        raise NotFoundError(f"`{job_id}` is no id of a RayJob", field="job", hint="write k8s:NAMESPACE/NAME")
    return match[1], match[2]


def folder_of(home: Path | str) -> Path:
    return Path(home) / "k8s"


def keep(home: Path | str, handed: Handed) -> None:
    """Raises OSError."""
    folder = folder_of(home) / handed.namespace
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{handed.name}.json", handed.model_dump_json(indent=2))


def recall(home: Path | str, namespace: str, name: str) -> Handed:
    """Raises NotFoundError for a job that was not handed over from this home."""
    try:
        return Handed.model_validate_json((folder_of(home) / namespace / f"{name}.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError) as problem:
        raise NotFoundError(
            f"no job {PREFIX}{namespace}/{name} was handed over from {home}",
            field="job",
            hint="see `tuneyard ls --on k8s`; TUNEYARD_HOME names another home",
        ) from problem


def recall_all(home: Path | str) -> Iterator[Handed]:
    """All that was handed over from this home, oldest first."""
    found = []
    for path in folder_of(home).glob("*/*.json"):
        try:
            found.append(Handed.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    yield from sorted(found, key=lambda one: (one.submitted_at, one.index))
