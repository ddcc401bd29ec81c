"""The REST API: jobs, events, logs, pause, cancel; queues and nodes are in `administration`. Every request needs the
yard's token, but for /healthz; for /metrics one that reads no more will do."""

from __future__ import annotations

import hmac
import secrets
import string
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError

from launch import __version__
from launch.config import Section, validate
from launch.contract import GitState, Origin
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import UNKNOWN_NEED, Node
from orchestrator.control.loop import Controller
from orchestrator.control.rules import rules_of
from orchestrator.control.wishes import gang_of_new
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
from orchestrator.job.fields import JOB_ID as ID
from orchestrator.job.fields import MAX_ELEMENTS, Priority
from orchestrator.job.spec import AnyJob, check_submission, received
from orchestrator.memory.options import factors_of
from orchestrator.memory.plan import plan
from orchestrator.memory.sizing import Sizing
from orchestrator.schedule.explain import check_possible
from orchestrator.schedule.gang import Gang
from orchestrator.schedule.place import room_for
from orchestrator.serve.administration import administer
from orchestrator.serve.goodput import keep_accounts
from orchestrator.serve.joining import let_join
from orchestrator.serve.metrics import expose
from orchestrator.serve.names import JobId
from orchestrator.serve.outlook import foresee
from orchestrator.serve.views import attempt_view, job_view
from orchestrator.store.jobs import NewJob
from orchestrator.store.rows import NodeMark
from orchestrator.views import AttemptView, DryRun, EventView, JobView

MAX_BODY = 1 << 20
MAX_ARRAY = 1 << 24
MAX_LOG = 1 << 20
MAX_SIZING = 1 << 18
MAX_OFFSET = 1 << 40
MAX_EVENT = (1 << 63) - 1
STATUS: dict[type[TuneyardError], int] = {
    NotFoundError: 404,
    ConflictError: 409,
    UnauthorizedError: 401,
    SpecError: 422,
    StoreError: 503,
    ExecutorError: 503,
}
SUBMISSION = 'a submission is {"job": {...}} with Content-Type: application/json'
HINTS = {
    "/v1/jobs": SUBMISSION,
    "/v1/jobs:dry-run": SUBMISSION,
    "/v1/arrays": 'an array is {"elements": [{"job": {...}}, ...]} with Content-Type: application/json',
}
ID_ALPHABET = string.ascii_lowercase + string.digits


class Wish(BaseModel):
    """A job, validated by whoever submits it and again here."""

    job: dict[str, Any]
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


class Submission(Wish):
    git: GitState | None = None
    """Of the job file, as its reader saw it."""


class ArraySubmission(BaseModel):
    """The elements of one array, in order: all are stored, or none."""

    elements: Annotated[list[Wish], Field(min_length=1, max_length=MAX_ELEMENTS)]
    git: GitState | None = None


class PriorityChange(Section):
    priority: Priority


def create_app(controller: Controller, token: str, head: str | None = None) -> FastAPI:
    """The application; requests read the database, and wake the controller when they changed it. `head` is where other
    machines find Ray's, host:port, if they do."""
    app = FastAPI(title="Tuneyard", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    store, executor = controller.store, controller.executor

    def check(request: Request, *tokens: str) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.encode(), one.encode()) for one in tokens]
        if scheme.lower() != "bearer" or not any(known):
            raise UnauthorizedError(
                "the token is missing or wrong",
                hint="send `Authorization: Bearer TOKEN`; the CLI reads it from TUNEYARD_HOME",
            )

    def authorized(request: Request) -> None:
        check(request, token)

    def may_watch(request: Request) -> None:
        other = controller.settings.metrics_token
        check(request, token, *([] if other is None else [other.get_secret_value()]))

    guarded = APIRouter(prefix="/v1", dependencies=[Depends(authorized)])

    @app.middleware("http")
    async def limit_body(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        most = MAX_ARRAY if request.url.path == "/v1/arrays" else MAX_BODY
        if request.method in ("POST", "PUT") and (
            not length.isdigit() or int(length) > most or "transfer-encoding" in request.headers
        ):
            error = TuneyardError(
                f"a request has a length, and at most {most} bytes",
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
    async def malformed(request: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        field = ".".join(part for part in first["loc"][1:] if isinstance(part, str)) or None
        error = TuneyardError(
            f"{field}: {first['msg']}" if field else first["msg"],
            code="bad-request",
            field=field,
            hint=HINTS.get(request.url.path, "a body is a JSON object, with Content-Type: application/json"),
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
        return {"ok": True, "version": __version__, "acting": controller.acting}

    @guarded.post("/jobs", status_code=201)
    def submit(submission: Submission) -> JobView:
        job = check_submission(submission.job)
        sizing = submission.read_sizing()
        _check_possible(controller, [(job, sizing)])
        row = store.add_job(_new_id(job), job, time.time(), Origin(git=submission.git), sizing)
        controller.wake.set()
        return job_view(row)

    @guarded.post("/arrays", status_code=201)
    def submit_array(submission: ArraySubmission) -> list[JobView]:
        """All elements of an array, in their order."""
        wishes = [(check_submission(one.job), one.read_sizing()) for one in submission.elements]
        _check_array([job for job, _ in wishes])
        _check_possible(controller, wishes)
        origin = Origin(git=submission.git)
        rows = store.add_jobs([NewJob(_new_id(job), job, origin, sizing) for job, sizing in wishes], time.time())
        controller.wake.set()
        return [job_view(row) for row in rows]

    @guarded.post("/jobs:dry-run")
    def dry_run(submission: Submission) -> DryRun:
        job = check_submission(submission.job)
        wish = _wish(controller, job, submission.read_sizing())
        nodes = tuple(executor.nodes())
        closed = _closed(store.node_marks(), nodes)
        all_nodes = (*nodes, *controller.prospect.nodes)
        idle = Capacity(all_nodes)
        check_possible(idle, wish)
        capacity = Capacity.of(nodes, [attempt.held for attempt in store.live_attempts()], closed)
        pending = store.check_after(job.after)
        consolidate = rules_of(controller.settings).consolidate
        now = None if pending else room_for(capacity, wish, wish.most, consolidate=consolidate)
        best = now or room_for(idle, wish, wish.most)
        assert best is not None  # it is possible
        where, option = best
        there = (capacity if now else idle).placement(where, wish.accelerator, option.need if option else UNKNOWN_NEED)
        if option:
            chosen = option.plan
        else:
            bf16 = there.multiplies_bf16(all_nodes)
            chosen = plan(job, there.world_size, "cuda" if there.device == "cuda" else "cpu", bf16=bf16)
        waits = "no room for the whole gang now; it would wait its turn"
        if pending:
            waits = f"it would wait until {pending[0]} has succeeded" + (", and others" if len(pending) > 1 else "")
        return DryRun(placement=there if now else None, plan=chosen, waits=None if now else waits)

    @guarded.get("/jobs")
    def jobs(
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000, array: Annotated[str | None, Query(pattern=ID)] = None
    ) -> list[JobView]:
        return [job_view(row) for row in store.jobs(array=array, limit=limit)]

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

    @guarded.post("/jobs/{job_id}/priority")
    def priority(job_id: JobId, body: dict[str, Any]) -> JobView:
        wanted = validate(PriorityChange, received(body)).priority
        row = store.set_priority(job_id, wanted, time.time())
        controller.wake.set()
        return job_view(row)

    administer(guarded, controller)
    foresee(guarded, controller)
    keep_accounts(guarded, controller)
    let_join(guarded, controller, head)
    expose(app, controller, may_watch)
    app.include_router(guarded)
    return app


def _new_id(job: AnyJob) -> str:
    return f"{job.name}-{''.join(secrets.choice(ID_ALPHABET) for _ in range(5))}"


def _wish(controller: Controller, job: AnyJob, sizing: str | None) -> Gang:
    """A job that is not stored, as the scheduler would see it."""
    factors = factors_of(controller.store.forecasts()) if sizing is not None else ()
    return gang_of_new("new", job, sizing=sizing, nodes=_nodes(controller), factors=factors)


def _nodes(controller: Controller) -> tuple[Node, ...]:
    """Those that there are, and those that there could be."""
    return (*controller.executor.nodes(), *controller.prospect.nodes)


def _check_possible(controller: Controller, wishes: Iterable[tuple[AnyJob, str | None]]) -> None:
    """Raises ImpossibleGangError or DoesNotFitError for what no placement on an idle yard holds."""
    nodes = _nodes(controller)
    # The elements of an array ask for much the same: what differs in its name alone is looked at once.
    alike = {
        (job.model_copy(update={"name": "new", "array_of": None}).model_dump_json(), sizing): job
        for job, sizing in wishes
    }
    factors = factors_of(controller.store.forecasts()) if any(sizing is not None for _, sizing in alike) else ()
    for (_, sizing), job in alike.items():
        check_possible(Capacity(nodes), gang_of_new("new", job, sizing=sizing, nodes=nodes, factors=factors))


def _closed(marks: Iterable[NodeMark], nodes: Sequence[Node]) -> list[str]:
    """Ids of the nodes on which nothing starts."""
    marked = {mark.name for mark in marks}
    return [node.id for node in nodes if node.name in marked]


def _check_array(jobs: Sequence[AnyJob]) -> None:
    """Raises SpecError unless these are all elements of one array, in order."""
    places = [job.array_of for job in jobs]
    first = places[0]
    if first is None or places != [first.model_copy(update={"index": index}) for index in range(len(jobs))]:
        raise SpecError(
            "these are not all elements of one array, in order",
            code="inconsistent",
            field="elements",
            hint="each has `array_of`: the same id and at_once, and indices from 0 on; `tuneyard submit` writes them",
        )
