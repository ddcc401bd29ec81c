"""Typed client of a yard's REST API. Imports neither torch nor ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
from pydantic import TypeAdapter

from orchestrator.errors import (
    ConflictError,
    ImpossibleGangError,
    NotFoundError,
    SpecError,
    SpecErrors,
    TuneyardError,
    UnauthorizedError,
    YardError,
)
from orchestrator.job.spec import AnyJob
from orchestrator.views import AttemptView, DryRun, EventView, JobView, NodeView

ERRORS: dict[str, type[TuneyardError]] = {
    kind.code: kind for kind in (NotFoundError, ConflictError, UnauthorizedError, ImpossibleGangError, SpecError)
}
# Errors of these classes may have a code of their own.
CLASSES: dict[int, type[TuneyardError]] = {
    401: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    413: SpecError,
    422: SpecError,
}
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
        answer: dict[str, Any] = self._call("GET", "/healthz").json()
        return answer

    def submit(self, job: AnyJob) -> JobView:
        """Queue `job`. Raises ImpossibleGangError or SpecError; then nothing is stored."""
        body = {"job": job.model_dump(mode="json")}
        return JobView.model_validate(self._call("POST", "/v1/jobs", json=body).json())

    def dry_run(self, job: AnyJob) -> DryRun:
        """What would happen to `job`."""
        body = {"job": job.model_dump(mode="json")}
        return DryRun.model_validate(self._call("POST", "/v1/jobs:dry-run", json=body).json())

    def jobs(self, limit: int = 1000) -> list[JobView]:
        """The newest `limit` jobs in order of submission."""
        answer = self._call("GET", "/v1/jobs", params={"limit": limit}).json()
        return TypeAdapter(list[JobView]).validate_python(answer)

    def job(self, job_id: str) -> JobView:
        """Raises NotFoundError."""
        return JobView.model_validate(self._call("GET", f"/v1/jobs/{job_id}").json())

    def attempts(self, job_id: str) -> list[AttemptView]:
        """Attempts, oldest first."""
        answer = self._call("GET", f"/v1/jobs/{job_id}/attempts").json()
        return TypeAdapter(list[AttemptView]).validate_python(answer)

    def events(self, job_id: str, after: int = 0) -> list[EventView]:
        """Events with an id above `after`, oldest first."""
        answer = self._call("GET", f"/v1/jobs/{job_id}/events", params={"after": after}).json()
        return TypeAdapter(list[EventView]).validate_python(answer)

    def log(self, job_id: str, *, rank: int | None, attempt: int | None = None, offset: int = 0) -> tuple[bytes, int]:
        """A piece of a rank's log (the launcher's for None) and the offset to go on from; empty at the end."""
        wanted = {"rank": rank, "attempt": attempt, "offset": offset}
        params = {key: value for key, value in wanted.items() if value is not None}
        answer = self._call("GET", f"/v1/jobs/{job_id}/logs", params=params)
        return answer.content, int(answer.headers["X-Next-Offset"])

    def cancel(self, job_id: str) -> JobView:
        """Ask for the job's end. Raises ConflictError if it has ended already."""
        return JobView.model_validate(self._call("POST", f"/v1/jobs/{job_id}/cancel").json())

    def nodes(self) -> list[NodeView]:
        """The nodes that answer now."""
        return TypeAdapter(list[NodeView]).validate_python(self._call("GET", "/v1/nodes").json())

    def follow(self, job_id: str, timeout: float | None = None) -> Iterator[JobView]:
        """The job again and again until it is final; a yard that is away for a moment is waited for.

        Raises:
            YardError: it stayed away for a minute, or `timeout` seconds passed before the job ended.
        """
        start = last = time.monotonic()
        while True:
            try:
                view = self.job(job_id)
                last = time.monotonic()
                yield view
                if view.state.final:
                    return
            except YardError:
                if time.monotonic() - last > AWAY_S:
                    raise
            if timeout is not None and time.monotonic() - start > timeout:
                raise YardError(
                    f"job {job_id} has not ended within {timeout:g} s", code="timeout", hint="it goes on; wait again"
                )
            time.sleep(POLL_S)

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
