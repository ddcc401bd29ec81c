"""Typed client of a yard's REST API. Imports neither torch nor ray."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from launch.contract import GitState
from orchestrator.errors import (
    ConflictError,
    ExecutorError,
    ImpossibleGangError,
    NotFoundError,
    SpecError,
    SpecErrors,
    StoreError,
    TuneyardError,
    UnauthorizedError,
    YardError,
)
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import AnyJob
from orchestrator.views import AttemptView, DryRun, EventView, JobView, NodeView

ERRORS: dict[str, type[TuneyardError]] = {
    kind.code: kind
    for kind in (
        NotFoundError,
        ConflictError,
        UnauthorizedError,
        ImpossibleGangError,
        SpecError,
        StoreError,
        ExecutorError,
    )
}
# Errors of these classes may have a code of their own.
CLASSES: dict[int, type[TuneyardError]] = {
    401: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    413: SpecError,
    422: SpecError,
}
T = TypeVar("T")
EVENTS = 1000  # at a time
POLL_S = 0.3
AWAY_S = 60.0


class Client:
    """A yard at `url`. Methods raise YardError if it does not answer, and else the error that it answers."""

    def __init__(self, url: str, token: str, timeout: float = 30.0) -> None:
        self.url = url
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=timeout, trust_env=False
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def health(self) -> dict[str, Any]:
        """`ok`, `version`, and whether that controller is the acting one."""
        return self._ask(dict[str, Any], "GET", "/healthz")

    def submit(self, job: AnyJob, git: GitState | None = None, sizing: str | None = None) -> JobView:
        """Queue `job`, whose file stood at `git`; `sizing` is a memory.sizing.Sizing as JSON, if its model is known.

        Raises ImpossibleGangError, DoesNotFitError or SpecError; then nothing is stored."""
        body = {
            "job": job.model_dump(mode="json"),
            "git": None if git is None else git.model_dump(mode="json"),
            "sizing": sizing,
        }
        return self._ask(JobView, "POST", "/v1/jobs", json=body)

    def dry_run(self, job: AnyJob, sizing: str | None = None) -> DryRun:
        """What would happen to `job`."""
        body = {"job": job.model_dump(mode="json"), "sizing": sizing}
        return self._ask(DryRun, "POST", "/v1/jobs:dry-run", json=body)

    def jobs(self, limit: int = 1000) -> list[JobView]:
        """The newest `limit` jobs in order of submission."""
        return self._ask(list[JobView], "GET", "/v1/jobs", params={"limit": limit})

    def job(self, job_id: str) -> JobView:
        """Raises NotFoundError."""
        return self._ask(JobView, "GET", f"/v1/jobs/{job_id}")

    def attempts(self, job_id: str) -> list[AttemptView]:
        """Attempts, oldest first."""
        return self._ask(list[AttemptView], "GET", f"/v1/jobs/{job_id}/attempts")

    def events(self, job_id: str, after: int = 0) -> list[EventView]:
        """All events with an id above `after`, oldest first."""
        found: list[EventView] = []
        while True:
            params = {"after": found[-1].id if found else after, "limit": EVENTS}
            page = self._ask(list[EventView], "GET", f"/v1/jobs/{job_id}/events", params=params)
            found += page
            if len(page) < EVENTS:
                return found

    def log(self, job_id: str, *, rank: int | None, attempt: int | None = None, offset: int = 0) -> tuple[bytes, int]:
        """A piece of a rank's log (the launcher's for None) and the offset to go on from; empty at the end."""
        wanted = {"rank": rank, "attempt": attempt, "offset": offset}
        params = {key: value for key, value in wanted.items() if value is not None}
        answer = self._call("GET", f"/v1/jobs/{job_id}/logs", params=params)
        return answer.content, int(answer.headers.get("X-Next-Offset", offset + len(answer.content)))

    def cancel(self, job_id: str) -> JobView:
        """Ask for the job's end. Raises ConflictError if it has ended already."""
        return self._ask(JobView, "POST", f"/v1/jobs/{job_id}/cancel")

    def pause(self, job_id: str) -> JobView:
        """Ask that the job saves, ends what it runs and waits. Raises ConflictError if it has ended already."""
        return self._ask(JobView, "POST", f"/v1/jobs/{job_id}/pause")

    def resume(self, job_id: str) -> JobView:
        """Ask that a paused job goes back to the queue. Raises ConflictError if it is not paused."""
        return self._ask(JobView, "POST", f"/v1/jobs/{job_id}/resume")

    def nodes(self) -> list[NodeView]:
        """The nodes that answer now."""
        return self._ask(list[NodeView], "GET", "/v1/nodes")

    def follow(self, job_id: str, timeout: float | None = None, until: Container[JobState] = ()) -> Iterator[JobView]:
        """The job again and again until it is final, or in a state of `until`; a yard that is away for a moment is
        waited for.

        Raises:
            YardError: it stayed away for a minute, or `timeout` seconds passed before the job ended.
        """
        start = last = time.monotonic()
        while True:
            try:
                view = self.job(job_id)
                last = time.monotonic()
                yield view
                if view.state.final or view.state in until:
                    return
            except (YardError, StoreError, ExecutorError):
                if time.monotonic() - last > AWAY_S:
                    raise
            if timeout is not None and time.monotonic() - start > timeout:
                raise YardError(
                    f"job {job_id} has not ended within {timeout:g} s", code="timeout", hint="it goes on; wait again"
                )
            time.sleep(POLL_S)

    def _ask(self, kind: type[T], method: str, path: str, **arguments: Any) -> T:
        """The answer as a `kind`."""
        answer = self._call(method, path, **arguments)
        try:
            return TypeAdapter(kind).validate_json(answer.content)
        except ValidationError as problem:
            raise YardError(
                f"what answers at {self.url} speaks another language: {answer.text[:80]!r}",
                hint="is this a Tuneyard API, of this version?",
            ) from problem

    def _call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **arguments)
        except httpx.HTTPError as problem:
            raise YardError(
                f"the yard at {self.url} does not answer: {problem}", hint="is it up? start it with `tuneyard up`"
            ) from problem
        if answer.is_success:
            return answer
        raise _error_of(answer)


def _error_of(answer: httpx.Response) -> TuneyardError:
    """The error that a yard answered, as the class that it was there."""
    try:
        body = answer.json()
        told = body.get("errors") or [body["error"]]
        errors = [_error(error, answer.status_code) for error in told]
    except (ValueError, KeyError, TypeError, AttributeError):
        return YardError(f"the yard answered {answer.status_code}: {answer.text[:200]}", hint="is this a Tuneyard API?")
    several = [error for error in errors if isinstance(error, SpecError)]
    return SpecErrors(several) if len(several) > 1 else errors[0]


def _error(told: dict[str, Any], status: int) -> TuneyardError:
    kind = ERRORS.get(told["code"], CLASSES.get(status, YardError))
    return kind(told["message"], code=told["code"], field=told.get("field"), hint=told.get("hint"))
