"""Typed client of a yard's REST API. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

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
from orchestrator.follow import follow
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import AnyJob
from orchestrator.views import (
    AccountView,
    AttemptView,
    ClusterAccount,
    DryRun,
    EventView,
    JobView,
    JoinView,
    MarkView,
    NodeView,
    ProbeView,
    QueueLook,
    QueueView,
    WhyView,
)

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
ARRAY_S = 300.0  # a thousand jobs are looked at before they are stored
ACCOUNTS_S = 300.0  # a second or so for every thousand jobs
PROBE_TIMEOUT_S = 900.0  # a hung one ends after three minutes, and rounds of neighbours follow
MAX_JOBS = 10_000


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

    def submit_array(
        self, jobs: Sequence[AnyJob], git: GitState | None = None, sizings: Sequence[str | None] = ()
    ) -> list[JobView]:
        """Queue all elements of an array, which `job.array` made of a file; `sizings` are theirs.

        Raises as `submit`; then nothing is stored."""
        each = sizings or [None] * len(jobs)
        body = {
            "elements": [
                {"job": job.model_dump(mode="json"), "sizing": sizing} for job, sizing in zip(jobs, each, strict=True)
            ],
            "git": None if git is None else git.model_dump(mode="json"),
        }
        return self._ask(list[JobView], "POST", "/v1/arrays", json=body, timeout=ARRAY_S)

    def dry_run(self, job: AnyJob, sizing: str | None = None) -> DryRun:
        """What would happen to `job`."""
        body = {"job": job.model_dump(mode="json"), "sizing": sizing}
        return self._ask(DryRun, "POST", "/v1/jobs:dry-run", json=body)

    def jobs(self, limit: int = 1000, array: str | None = None) -> list[JobView]:
        """The newest `limit` jobs in order of submission, or those of an array."""
        params = {"limit": limit} | ({} if array is None else {"array": array})
        return self._ask(list[JobView], "GET", "/v1/jobs", params=params)

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

    def set_priority(self, job_id: str, priority: int | str) -> JobView:
        """Move a job that has not ended; `priority` as in a job file."""
        return self._ask(JobView, "POST", f"/v1/jobs/{job_id}/priority", json={"priority": priority})

    def queue(self) -> QueueLook:
        """The jobs that wait, in order, with their expected starts."""
        return self._ask(QueueLook, "GET", "/v1/queue")

    def why(self, job_id: str) -> WhyView:
        """Why a job is where it is, and when it is expected to start."""
        return self._ask(WhyView, "GET", f"/v1/jobs/{job_id}/why")

    def goodput_of(self, job_id: str) -> AccountView:
        """Where a job's time went."""
        return self._ask(AccountView, "GET", f"/v1/jobs/{job_id}/goodput")

    def goodput(self, last_s: float, bins: int = 0) -> ClusterAccount:
        """Where the slots of the cluster went in the last `last_s` seconds, also in so many `bins` of time. Raises
        SpecError where too many jobs are of that time."""
        params = {"last_s": last_s, "bins": bins}
        return self._ask(ClusterAccount, "GET", "/v1/goodput", params=params, timeout=ACCOUNTS_S)

    def queues(self) -> list[QueueView]:
        """The queues of which something was said, and those that have live jobs."""
        return self._ask(list[QueueView], "GET", "/v1/queues")

    def set_queue(self, name: str, changes: Mapping[str, Any]) -> QueueView:
        """Change some of a queue's weight, guaranteed, ceiling and lendable. Raises SpecError for what cannot be."""
        return self._ask(QueueView, "PUT", f"/v1/queues/{name}", json=dict(changes))

    def delete_queue(self, name: str) -> None:
        """Let a queue have the defaults again. Raises NotFoundError if it has them."""
        self._call("DELETE", f"/v1/queues/{name}")

    def mark_node(self, name: str, how: Literal["cordon", "drain"], reason: str | None = None) -> MarkView:
        """Let a node have no new attempts; drained, those on it save and go elsewhere. Raises NotFoundError."""
        return self._ask(MarkView, "POST", f"/v1/nodes/{name}/{how}", json={"reason": reason})

    def uncordon(self, name: str) -> None:
        """Let a node have attempts again. Raises ConflictError if it may have them."""
        self._call("POST", f"/v1/nodes/{name}/uncordon")

    def probe(self, names: Sequence[str] = ()) -> list[ProbeView]:
        """Probe nodes, all of them if none is named; takes half a minute or so. Raises NotFoundError."""
        body = {"nodes": list(names)}
        return self._ask(list[ProbeView], "POST", "/v1/probe", json=body, timeout=PROBE_TIMEOUT_S)

    def joining(self) -> JoinView:
        """How a machine becomes a node of this yard. Raises ConflictError: it takes none."""
        return self._ask(JoinView, "GET", "/v1/joining")

    def nodes(self) -> list[NodeView]:
        """The nodes that answer now."""
        return self._ask(list[NodeView], "GET", "/v1/nodes")

    def follow(self, job_id: str, timeout: float | None = None, until: Container[JobState] = ()) -> Iterator[JobView]:
        """The job again and again until it is final, or in a state of `until`; a yard that is away for a moment is
        waited for.

        Raises:
            YardError: it stayed away for a minute, or `timeout` seconds passed before the job ended.
        """
        yield from follow(
            f"job {job_id}", lambda: self.job(job_id), lambda view: view.state.final or view.state in until, timeout
        )

    def follow_array(self, array: str, timeout: float | None = None) -> Iterator[list[JobView]]:
        """All jobs of an array again and again until all are final; otherwise as `follow`."""
        yield from follow(
            f"array {array}",
            lambda: self.jobs(limit=MAX_JOBS, array=array),
            lambda views: all(view.state.final for view in views),
            timeout,
        )

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
