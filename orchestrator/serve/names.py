"""Names in paths of the API, checked before a database sees them."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends

from orchestrator.errors import NotFoundError, SpecError
from orchestrator.job.fields import JOB_ID, SLUG

NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}")


def _job_id(job_id: str) -> str:
    """An id that a job can have. Raises NotFoundError for any other, before a database sees it."""
    if not re.fullmatch(JOB_ID, job_id):
        raise NotFoundError(f"there is no job {job_id[:80]!r}", field="job", hint="see `tuneyard ls`")
    return job_id


def _queue_name(name: str) -> str:
    """A name that a queue can have. Raises SpecError for any other, before a database sees it."""
    if not re.fullmatch(SLUG, name):
        raise SpecError(
            f"{name[:80]!r} is not the name of a queue",
            code="bad-name",
            field="queue",
            hint="lower-case letters, digits and inner hyphens, at most 63 characters",
        )
    return name


def _node_name(name: str) -> str:
    """A name that a node can have. Raises NotFoundError for any other."""
    if not NODE_NAME.fullmatch(name):
        raise NotFoundError(f"there is no node {name[:80]!r}", field="node", hint="see `tuneyard nodes`")
    return name


JobId = Annotated[str, Depends(_job_id)]
QueueName = Annotated[str, Depends(_queue_name)]
NodeName = Annotated[str, Depends(_node_name)]
