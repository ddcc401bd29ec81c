"""What the yard knows of a job's checkpoints: a pointer to the newest, made from what rank 0 tells. Pure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from launch.contract import ProgressLine


class LastCheckpoint(BaseModel):
    """The newest committed checkpoint of a job. The store has the last word on what is loaded; this is for people."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    step: int
    time: float
    """Unix time of the commit; of one that was resumed from, and whose commit nobody saw, of that."""
    url: str
    """Its directory in the store."""


def newest(last: LastCheckpoint | None, line: ProgressLine, directory: str) -> LastCheckpoint | None:
    """The pointer after a progress line of an attempt whose checkpoints lie in `directory`."""
    note = line.checkpoint
    if note is None:
        return last
    if note.outcome == "quarantined" and last is not None and last.id == note.id:
        return None  # what is resumed from instead is told next
    known = last is not None and last.id == note.id
    if note.outcome in ("committed", "rolled-back") or (note.outcome == "resumed" and not known):
        return LastCheckpoint(id=note.id, step=note.step, time=line.time, url=f"{directory.rstrip('/')}/{note.id}")
    return last
