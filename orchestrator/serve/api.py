"""The REST API: jobs, events, logs, pause, cancel. Every request needs the yard's token, but for /healthz."""

from __future__ import annotations

import hmac
import re
import secrets
import string
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError

from launch import __version__
from launch.contract import GitState, Origin
from orchestrator.cluster.model import Snapshot
from orchestrator.cluster.status import StandbyReport
from orchestrator.control.loop import Controller
from orchestrator.control.wishes import waiting
from orchestrator.errors import (
    ConflictError,
    ExecutorError,
    NotFoundError,
    SpecError,
    SpecErrors,
    StoreError,
    TuneyardError,
    UnauthorizedError,
)
from orchestrator.job.spec import AnyJob, check_submission
from orchestrator.memory.options import factors_of
from orchestrator.memory.plan import plan
from orchestrator.memory.sizing import Sizing
from orchestrator.schedule.decide import Waiting, check_possible, first_that_fits
from orchestrator.serve.views import attempt_view, job_view
from orchestrator.views import AttemptView, DryRun, EventView, JobView, NodeView

MAX_BODY = 1 << 20
MAX_LOG = 1 << 20
MAX_SIZING = 1 << 18
MAX_OFFSET = 1 << 40
MAX_EVENT = (1 << 63) - 1
JOB_ID = re.compile(r"[a-z0-9-]{1,80}")
STATUS: dict[type[TuneyardError], int] = {
    NotFoundError: 404,
    ConflictError: 409,
    UnauthorizedError: 401,
    SpecError: 422,
    StoreError: 503,
    ExecutorError: 503,
}
ID_ALPHABET = string.ascii_lowercase + string.digits


def _job_id(job_id: str) -> str:
    """An id that a job can have. Raises NotFoundError for any other, before a database sees it."""
    if not JOB_ID.fullmatch(job_id):
        raise NotFoundError(f"there is no job {job_id[:80]!r}", field="job", hint="see `tuneyard ls`")
    return job_id


JobId = Annotated[str, Depends(_job_id)]


class Submission(BaseModel):
    """A job, validated by whoever submits it and again here."""

    job: dict[str, Any]
    git: GitState | None = None
    """Of the job file, as its reader saw it."""
    sizing: Annotated[str, Field(max_length=MAX_SIZING)] | None = None
    """memory.sizing.Sizing as JSON, made where the model's files are."""

    def read_sizing(self) -> str | None:
        """Raises SpecError if it is none."""
        if self.sizing is None:
            return None
        try:
            return Sizing.model_validate_json(self.sizing).model_dump_json()
        except ValidationError as problem:
            raise SpecError(
                "what was sent of the model's memory is not readable",
                code="bad-sizing",
                field="sizing",
                hint="are client and yard of one version?",
            ) from problem


def create_app(controller: Controller, token: str) -> FastAPI:
    """The application; requests read the database, and wake the controller when they changed it."""
    app = FastAPI(title="Tuneyard", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    store, executor = controller.store, controller.executor

    def authorized(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
            raise UnauthorizedError(
                "the token is missing or wrong",
                hint="send `Authorization: Bearer TOKEN`; the CLI reads it from TUNEYARD_HOME",
            )

    guarded = APIRouter(prefix="/v1", dependencies=[Depends(authorized)])

    @app.middleware("http")
    async def limit_body(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        if request.method == "POST" and (
            not length.isdigit() or int(length) > MAX_BODY or "transfer-encoding" in request.headers
        ):
            error = TuneyardError(
                f"a request has a length, and at most {MAX_BODY} bytes",
                code="too-large",
                hint="a job file names its data; it does not hold them",
            )
            return JSONResponse({"error": error.as_dict()}, status_code=413)
        return await call_next(request)

    @app.exception_handler(TuneyardError)
    async def explain(_request: Request, problem: TuneyardError) -> JSONResponse:
        status = next((code for kind, code in STATUS.items() if isinstance(problem, kind)), 400)
        errors = problem.errors if isinstance(problem, SpecErrors) else [problem]
        told = [error.as_dict() for error in errors]
        return JSONResponse({"error": told[0], "errors": told}, status_code=status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        field = ".".join(part for part in first["loc"][1:] if isinstance(part, str)) or None
        error = TuneyardError(
            f"{field}: {first['msg']}" if field else first["msg"],
            code="bad-request",
            field=field,
            hint='a submission is {"job": {...}} with Content-Type: application/json',
        )
        return JSONResponse({"error": error.as_dict()}, status_code=400)

    # The framework's own: a body that cannot be parsed, no such route, no such method.
    @app.exception_handler(400)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unroutable(_request: Request, problem: Exception) -> JSONResponse:
        status, detail = getattr(problem, "status_code", 400), getattr(problem, "detail", "bad request")
        error = TuneyardError(str(detail), code="bad-request", hint="routes start with /v1; `tuneyard` speaks them all")
        return JSONResponse({"error": error.as_dict()}, status_code=status)

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        return {"ok": True, "version": __version__, "acting": controller.lease is not None}

    @guarded.post("/jobs", status_code=201)
    def submit(submission: Submission) -> JobView:
        job = check_submission(submission.job)
        sizing = submission.read_sizing()
        check_possible(Snapshot(nodes=tuple(executor.nodes())), _wish(controller, job, sizing))
        suffix = "".join(secrets.choice(ID_ALPHABET) for _ in range(5))
        row = store.add_job(f"{job.name}-{suffix}", job, time.time(), Origin(git=submission.git), sizing)
        controller.wake.set()
        return job_view(row)

    @guarded.post("/jobs:dry-run")
    def dry_run(submission: Submission) -> DryRun:
        job = check_submission(submission.job)
        wish = _wish(controller, job, submission.read_sizing())
        nodes = tuple(executor.nodes())
        check_possible(Snapshot(nodes=nodes), wish)
        snapshot = Snapshot.of(nodes, [attempt.held for attempt in store.live_attempts()])
        now = first_that_fits(snapshot, wish)
        best = now or first_that_fits(snapshot.idle(), wish)
        assert best is not None  # it is possible
        there = best.placement
        chosen = (
            best.option.plan
            if best.option
            else plan(job, there.world_size, "cuda" if there.device == "cuda" else "cpu")
        )
        waits = None if now else "no room for the whole gang now; it would wait its turn"
        return DryRun(placement=now.placement if now else None, plan=chosen, waits=waits)

    @guarded.get("/jobs")
    def jobs(limit: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> list[JobView]:
        return [job_view(row) for row in store.jobs(limit=limit)]

    @guarded.get("/jobs/{job_id}")
    def job(job_id: JobId) -> JobView:
        row = store.job(job_id)
        return job_view(row, store.attempts(job_id))

    @guarded.get("/jobs/{job_id}/attempts")
    def attempts(job_id: JobId) -> list[AttemptView]:
        store.job(job_id)
        return [attempt_view(row) for row in store.attempts(job_id)]

    @guarded.get("/jobs/{job_id}/events")
    def events(
        job_id: JobId,
        after: Annotated[int, Query(ge=0, le=MAX_EVENT)] = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> list[EventView]:
        store.job(job_id)
        return [EventView.model_validate(row.model_dump()) for row in store.events(job_id, after, limit)]

    @guarded.get("/jobs/{job_id}/logs")
    def logs(
        job_id: JobId,
        attempt: Annotated[int | None, Query(ge=1)] = None,
        rank: Annotated[int | None, Query(ge=0)] = None,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_LOG)] = MAX_LOG,
    ) -> Response:
        """Bytes of a rank's log (the launcher's without `rank`) from `offset`; X-Next-Offset says where to go on."""
        store.job(job_id)
        rows = {row.number: row for row in store.attempts(job_id)}
        number = attempt or max(rows, default=0)
        if number not in rows:
            raise NotFoundError(f"job {job_id} has no attempt {number or 1} yet", field="attempt")
        contract = rows[number].run
        if rank is not None and rank >= contract.plan.world_size:
            raise NotFoundError(
                f"job {job_id} has ranks 0 to {contract.plan.world_size - 1}, no rank {rank}", field="rank"
            )
        data = executor.read_log(contract, rank, offset, limit)
        return Response(
            data, media_type="text/plain; charset=utf-8", headers={"X-Next-Offset": str(offset + len(data))}
        )

    @guarded.post("/jobs/{job_id}/pause")
    def pause(job_id: JobId) -> JobView:
        row = store.request_pause(job_id, time.time())
        controller.wake.set()
        return job_view(row)

    @guarded.post("/jobs/{job_id}/resume")
    def resume(job_id: JobId) -> JobView:
        row = store.request_resume(job_id, time.time())
        controller.wake.set()
        return job_view(row)

    @guarded.post("/jobs/{job_id}/cancel")
    def cancel(job_id: JobId) -> JobView:
        row = store.request_cancel(job_id, time.time())
        controller.wake.set()
        return job_view(row)

    @guarded.get("/nodes")
    def nodes() -> list[NodeView]:
        seen = executor.nodes()
        snapshot = Snapshot.of(seen, (attempt.held for attempt in store.live_attempts()))
        standbys = executor.standbys()
        return [
            NodeView(
                **node.model_dump(),
                free=snapshot.free(node, "any"),
                standbys=standbys.get(node.id, StandbyReport()),
            )
            for node in seen
        ]

    app.include_router(guarded)
    return app


def _wish(controller: Controller, job: AnyJob, sizing: str | None) -> Waiting:
    """A job that is not stored, as the scheduler would see it."""
    factors = factors_of(controller.store.forecasts()) if sizing is not None else ()
    return waiting("new", 0, job, sizing=sizing, nodes=controller.executor.nodes(), factors=factors)
