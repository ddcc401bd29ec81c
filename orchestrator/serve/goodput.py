"""Where time went: of a job, and of the cluster by queue."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query

from launch.contract import CheckpointNote
from orchestrator.cluster.status import Energy, Slots
from orchestrator.control.loop import Controller
from orchestrator.control.stops import PREEMPT, planned
from orchestrator.errors import SpecError
from orchestrator.job.lifecycle import JobState
from orchestrator.recover.classify import Outcome
from orchestrator.recover.ledger import Account, Mark, Stint, Story, account, kept_step, total
from orchestrator.recover.usage import (
    CPU,
    HOUR_S,
    J_PER_KWH,
    Part,
    bins_of,
    energy_of,
    offered,
    parts_of,
    use_of,
    within,
)
from orchestrator.serve.names import JobId
from orchestrator.settings import Settings
from orchestrator.store.rows import AttemptRow, EventRow, InventoryRow, JobRow
from orchestrator.store.store import Store
from orchestrator.views import (
    AccountView,
    BinView,
    ClusterAccount,
    EnergyView,
    QueueAccount,
    SpanView,
    StintView,
    UseView,
)

DAY_S = 86400.0
MOST_S = 366 * DAY_S
MOST_JOBS = 50_000  # a minute or so
MOST_BINS = 2000
COMMITTED, ERROR = "checkpoint-committed", "attempt-error"
MOVES = {f"job-{state}": state for state in (JobState.QUEUED, JobState.PAUSED)}

WELL = frozenset({JobState.STARTING, JobState.RUNNING, JobState.STOPPING, JobState.SUCCEEDED})


@dataclass(frozen=True)
class Book:
    """A job and its account."""

    row: JobRow
    account: Account
    parts: Sequence[Part]
    attempts: Sequence[AttemptRow]
    stints: Sequence[Stint]
    energy: Mapping[int, Energy]
    """Of attempts that have ended."""


def keep_accounts(guarded: APIRouter, controller: Controller) -> None:
    """Add the routes that tell where time went."""
    store = controller.store

    @guarded.get("/jobs/{job_id}/goodput")
    def goodput_of(job_id: JobId) -> AccountView:
        """A job's time, second by second, and each of its attempts."""
        row = store.job(job_id)
        (book,) = _books(store, [row], row.submitted_at, time.time())
        return _account_view(book, store.events_of([row.id], [ERROR]), controller.settings)

    @guarded.get("/goodput")
    def goodput(
        last_s: Annotated[float, Query(gt=0, le=MOST_S, allow_inf_nan=False)] = DAY_S,
        bins: Annotated[int, Query(ge=0, le=MOST_BINS)] = 0,
    ) -> ClusterAccount:
        """Where the slots of the last `last_s` seconds went, by queue, and in so many bins of time."""
        now = time.time()
        since = now - last_s
        rows = store.jobs_between(since, now, MOST_JOBS + 1)
        if len(rows) > MOST_JOBS:
            raise SpecError(
                f"more than {MOST_JOBS} jobs are of that time",
                code="too-many",
                field="since",
                hint="ask for less of it",
            )
        books = _books(store, rows, min([since, *(row.submitted_at for row in rows)]), now)
        return _cluster_view(books, store.inventories(since), since, now, bins, controller.settings)


def slot_seconds(store: Store, since: float, now: float, most_jobs: int) -> dict[str, float] | None:
    """What slots were held for in a time, by category; None where it is of more than `most_jobs` jobs.

    Raises:
        StoreError: the database cannot be used.
    """
    rows = store.jobs_between(since, now, most_jobs + 1, begun=True)
    if len(rows) > most_jobs:
        return None
    books = _books(store, rows, min([since, *(row.submitted_at for row in rows)]), now)
    return _named(use_of([part for book in books for part in within(book.parts, since, now)]).slot_seconds)


def _books(store: Store, rows: Sequence[JobRow], since: float, now: float) -> list[Book]:
    """The accounts of these jobs, the first of which was submitted at `since`."""
    inventories = store.inventories(since)
    attempts: dict[str, list[AttemptRow]] = {row.id: [] for row in rows}
    for attempt in store.attempts_of(list(attempts)):
        attempts[attempt.job_id].append(attempt)
    moves: dict[str, list[tuple[float, JobState]]] = {row.id: [] for row in rows}
    for event in store.events_of(list(attempts), MOVES):
        assert event.job_id is not None
        moves[event.job_id].append((event.time, MOVES[event.kind]))
    commits: dict[tuple[str, int], list[Mark]] = {}
    for event in store.events_of([row.id for row in rows if may_have_lost(row)], [COMMITTED]):
        assert event.job_id is not None
        assert event.attempt is not None
        note = CheckpointNote.model_validate(event.data)
        if note.spent is not None:
            commits.setdefault((event.job_id, event.attempt), []).append(Mark(note.step, note.spent))
    books = []
    for row in rows:
        mine = attempts[row.id]
        stints = [stint_of(attempt, commits.get((row.id, attempt.number), ())) for attempt in mine]
        found = account(Story(row.submitted_at, row.finished_at, stints, moves[row.id]), now)
        kinds = {attempt.number: kinds_of(attempt, inventories) for attempt in mine}
        energy = {
            attempt.number: energy_of(attempt.energy, whole=holds_all(attempt, inventories))
            for attempt in mine
            if attempt.ended_at is not None
        }
        books.append(Book(row, found, parts_of(found, kinds), mine, stints, energy))
    return books


def may_have_lost(row: JobRow) -> bool:
    """Whether work of a job may be lost, so that it matters what was saved: not while its only attempt goes well."""
    return row.attempts > 1 or (row.attempts == 1 and row.state not in WELL)


def stint_of(row: AttemptRow, commits: Sequence[Mark] = ()) -> Stint:
    """An attempt as the ledger wants it."""
    silent = row.run.spec is None or (row.progress is not None and row.progress.step > 0)
    return Stint(
        number=row.number,
        processes=row.held.world_size,
        created_at=row.created_at,
        ended_at=row.ended_at,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        planned=planned(row),
        spent=row.spent,
        commits=commits,
        begun_at=row.started_at if silent else None,
    )


def kinds_of(row: AttemptRow, inventories: Sequence[InventoryRow]) -> dict[str, int]:
    """Processes by the kind of their slots: cpu, a type of GPU, or `gpu` where nobody knows that any more."""
    nodes, found = nodes_at(inventories, row.created_at), dict[str, int]()
    for share in row.held.shares:
        known = nodes.get(share.node)
        kind = CPU if not share.gpus else known.kind if known is not None else "gpu"
        found[kind] = found.get(kind, 0) + share.processes
    return found


def holds_all(row: AttemptRow, inventories: Sequence[InventoryRow]) -> bool:
    """Whether an attempt held every slot of its nodes."""
    nodes = nodes_at(inventories, row.created_at)
    return all(share.node in nodes and nodes[share.node].slots <= share.processes for share in row.held.shares)


def nodes_at(inventories: Sequence[InventoryRow], at: float) -> Mapping[str, Slots]:
    """What there was then; the first that is known where that is later."""
    index = bisect_right(inventories, at, key=lambda row: row.time)
    return inventories[max(0, index - 1)].nodes if inventories else {}


def ended(row: AttemptRow, errors: Mapping[int, str]) -> str | None:
    """How an attempt ended, in a few words."""
    if row.outcome is None:
        return None
    told = row.outcome
    if row.outcome == Outcome.STOPPED and row.stop is not None:
        told = row.stop.reason
        if told == PREEMPT and row.preempted_by is not None:
            told += f" for {row.preempted_by}"
    return f"{told}: {errors[row.number]}" if row.number in errors else told


def _account_view(book: Book, events: Iterable[EventRow], settings: Settings) -> AccountView:
    row, found = book.row, book.account
    errors = {
        event.attempt: str(event.data.get("message"))
        for event in events
        if event.kind == ERROR and event.attempt is not None
    }
    stints = []
    for index, (attempt, stint) in enumerate(zip(book.attempts, book.stints, strict=True)):
        kept = kept_step(stint, book.stints[index + 1 :])
        spent = attempt.spent
        spans = [span for span in found.spans if span.stint == attempt.number]
        energy = {attempt.number: book.energy[attempt.number]} if attempt.number in book.energy else {}
        stints.append(
            StintView(
                number=attempt.number,
                processes=attempt.held.world_size,
                kinds=next((dict(part.kinds) for part in book.parts if part.span.stint == attempt.number), {}),
                since=attempt.created_at,
                until=found.until if attempt.ended_at is None else attempt.ended_at,
                ended=ended(attempt, errors),
                from_step=stint.from_step,
                step=None if spent is None else spent.step,
                kept_step=kept if kept is not None and spent is not None and kept < spent.step else None,
                seconds=_named(total(spans)),
                energy=_energy_view(energy.values()),
            )
        )
    return AccountView(
        **_use(book.parts, book.energy.values(), settings),
        job=row.id,
        queue=row.queue,
        state=row.state,
        since=found.since,
        until=found.until,
        wall_s=found.wall_s,
        goodput=found.goodput,
        currency=settings.currency,
        attempts=tuple(stints),
        spans=tuple(
            SpanView(since=span.since, until=span.until, attempt=span.stint, seconds=_named(span.seconds))
            for span in found.spans
        ),
    )


def _cluster_view(
    books: Sequence[Book], inventories: Sequence[InventoryRow], since: float, now: float, bins: int, settings: Settings
) -> ClusterAccount:
    parts = {book.row.id: within(book.parts, since, now) for book in books}
    energy = {
        book.row.id: [
            book.energy[attempt.number]
            for attempt in book.attempts
            if attempt.ended_at is not None and attempt.ended_at > since
        ]
        for book in books
    }
    queues: dict[str, list[str]] = {}
    for book in books:
        queues.setdefault(book.row.queue, []).append(book.row.id)
    views = [
        QueueAccount(
            **_use(
                [part for job in jobs for part in parts[job]], [one for job in jobs for one in energy[job]], settings
            ),
            queue=queue,
            jobs=len(jobs),
        )
        for queue, jobs in sorted(queues.items())
    ]
    everything = [part for several in parts.values() for part in several]
    told = [(row.time, row.nodes) for row in inventories]
    known, offers = offered(told, since, now)
    held = use_of(within(everything, known, now)).kind_seconds if known is not None else {}
    return ClusterAccount(
        since=since,
        until=now,
        total=UseView(**_use(everything, [one for several in energy.values() for one in several], settings)),
        queues=tuple(views),
        known_since=known,
        offered_slot_s=offers,
        idle_slot_s={kind: max(0.0, seconds - held.get(kind, 0.0)) for kind, seconds in offers.items()},
        currency=settings.currency,
        bins=_bins(everything, told, since, now, bins),
    )


def _bins(
    parts: Sequence[Part], told: Sequence[tuple[float, Mapping[str, Slots]]], since: float, now: float, count: int
) -> tuple[BinView, ...]:
    if not count:
        return ()
    width, found = (now - since) / count, []
    for at, slots in enumerate(bins_of(parts, since, now, count)):
        low, high = since + at * width, since + (at + 1) * width
        known, offers = offered(told, low, high)
        whole = sum(offers.values()) if known is not None and known <= low else None
        found.append(BinView(since=low, until=high, slot_seconds=_named(slots), offered_slot_s=whole))
    return tuple(found)


def _use(parts: Sequence[Part], energy: Iterable[Energy], settings: Settings) -> dict[str, Any]:
    """The fields of a UseView."""
    use = use_of(parts)
    hours = {kind: seconds / HOUR_S for kind, seconds in use.kind_seconds.items()}
    return {
        "seconds": _named(use.seconds),
        "slot_seconds": _named(use.slot_seconds),
        "useful": use.useful,
        "lost_slot_s": use.lost_slot_s,
        "lost_to_preemption_slot_s": use.lost_to_preemption_slot_s,
        "lost_to_failures_slot_s": use.lost_to_failures_slot_s,
        "lost_to_startup_slot_s": use.lost_to_startup_slot_s,
        "slot_hours": hours,
        "gpu_hours": sum(value for kind, value in hours.items() if kind != CPU),
        "cost": use.cost(settings.prices),
        "energy": _energy_view(energy),
    }


def _energy_view(energy: Iterable[Energy]) -> EnergyView:
    several = list(energy)
    gpu = [one.gpu_j for one in several if one.gpu_j is not None]
    cpu = [one.cpu_j for one in several if one.cpu_j is not None]
    return EnergyView(
        gpu_kwh=sum(gpu) / J_PER_KWH if gpu else None,
        cpu_kwh=sum(cpu) / J_PER_KWH if cpu else None,
        measured=sum(one.gpu_j is not None or one.cpu_j is not None for one in several),
        ended=len(several),
    )


def _named(seconds: Mapping[Any, float]) -> dict[str, float]:
    """With plain words for keys, in the order of the categories."""
    return {str(category): value for category, value in seconds.items()}
