"""Where a job's time went, from its submission to its end. Pure.

Each second is in one category, so that they add up to the wall time. Of work that is done twice the first time is lost:
that is known as soon as the attempt has failed, whether or not another one follows. The second time is training,
since its work stays. What an attempt did up to the copy of its last commit is safe, however late the commit came; all
that it did after that is lost, evaluations and saves as well.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from orchestrator.cluster.status import Spent
from orchestrator.job.lifecycle import JobState
from orchestrator.recover.classify import Outcome


class Category(enum.StrEnum):
    """What a second of a job was. The first nine may hold slots."""

    TRAINING = "training"  # steps whose work has stayed
    EVALUATING = "evaluating"
    SAVING = "saving"  # training waited for a save
    EXPORTING = "exporting"
    RUNNING = "running"  # a user's command, or ranks that tell nothing of what they do
    STARTING = "starting"
    LOST = "lost"  # done, and in no commit from which the job went on
    RECOVERING = "recovering"  # from a failure until the next attempt trains
    STOPPING = "stopping"  # the ranks are done, and leave
    QUEUED = "queued"
    PAUSED = "paused"


OF_PHASE = {
    "start": Category.STARTING,
    "load": Category.STARTING,
    "first-step": Category.TRAINING,
    "step": Category.TRAINING,
    "evaluate": Category.EVALUATING,
    "save": Category.SAVING,
    "export": Category.EXPORTING,
    "done": Category.STOPPING,
}
"""Of launch.pulse.PHASES."""
LOADING = frozenset(phase for phase, category in OF_PHASE.items() if category == Category.STARTING)


@dataclass(frozen=True)
class Mark:
    """How far rank 0 of an attempt was, and after which time."""

    step: int
    seconds: Mapping[str, float]
    """By phase, since it began."""

    @property
    def at_s(self) -> float:
        return math.fsum(self.seconds.values())


@dataclass(frozen=True)
class Stint:
    """An attempt."""

    number: int
    processes: int
    created_at: float
    ended_at: float | None = None
    """None: it lives."""
    outcome: Outcome | None = None
    planned: bool = False
    """Whether it was sent a stop after which its job goes on."""
    spent: Spent | None = None
    commits: Sequence[Mark] = ()
    """Its commits, each as of the copy."""
    begun_at: float | None = None
    """Where nobody told what it spent its time on: since when it ran."""

    @property
    def broke(self) -> bool:
        if self.outcome is None or self.planned:
            return False
        return self.outcome not in (Outcome.SUCCEEDED, Outcome.STOPPED)

    @property
    def from_step(self) -> int | None:
        """After how many steps it began to train; None if it did not."""
        return None if self.spent is None else self.spent.from_step


@dataclass(frozen=True)
class Story:
    """A job."""

    submitted_at: float
    ended_at: float | None = None
    stints: Sequence[Stint] = ()
    """In order."""
    moves: Sequence[tuple[float, JobState]] = ()
    """When it was queued and paused, in order."""


@dataclass(frozen=True)
class Span:
    """A stretch of a job's time; what it holds several of is spread over it, nobody says how."""

    since: float
    until: float
    seconds: Mapping[Category, float]
    stint: int | None = None
    """The attempt that it belongs to, which holds slots."""
    processes: int = 0
    startup: bool = False
    """Whether the attempt did not train yet."""

    def within(self, since: float, until: float) -> Span | None:
        """The part of it that lies there, with its share of everything."""
        low, high = max(self.since, since), min(self.until, until)
        if high <= low:
            return None
        share = (high - low) / (self.until - self.since)
        seconds = {category: value * share for category, value in self.seconds.items()}
        return replace(self, since=low, until=high, seconds=seconds)


@dataclass(frozen=True)
class Account:
    """Seconds, and slot-seconds: the same times the processes that held slots."""

    since: float
    until: float
    first_start: float | None
    spans: Sequence[Span]
    broken: frozenset[int] = frozenset()
    """Attempts that failed, otherwise than by a planned stop that took too long."""

    @property
    def wall_s(self) -> float:
        return self.until - self.since

    @property
    def seconds(self) -> dict[Category, float]:
        return total(self.spans)

    @property
    def slot_seconds(self) -> dict[Category, float]:
        return total(self.spans, slots=True)

    @property
    def goodput(self) -> float | None:
        """Training, as a share of the wall time since the first start; None if it never started, or told nothing."""
        return None if self.first_start is None else share_of(self.seconds, self.until - self.first_start)

    @property
    def useful(self) -> float | None:
        """Training, as a share of the slot-seconds that it held."""
        held = self.slot_seconds
        return share_of(held, math.fsum(held.values()))


def share_of(seconds: Mapping[Category, float], whole: float) -> float | None:
    """How much of `whole` was training, without what ran and told nothing; None where nothing else trained."""
    silent = seconds[Category.RUNNING]
    told = whole - silent > 0 and not (silent and not seconds[Category.TRAINING])
    return seconds[Category.TRAINING] / (whole - silent) if told else None


def total(spans: Iterable[Span], *, slots: bool = False) -> dict[Category, float]:
    """Seconds of every category, or slot-seconds."""
    found: dict[Category, list[float]] = {category: [] for category in Category}
    for span in spans:
        for category, seconds in span.seconds.items():
            found[category].append(seconds * span.processes if slots else seconds)
    return {category: math.fsum(values) for category, values in found.items()}


def account(job: Story, now: float) -> Account:
    """Where a job's time went until it ended, or until `now`. Clocks of hosts that differ shift seconds between
    categories and never change their sum."""
    until = max(job.submitted_at, now if job.ended_at is None else job.ended_at)
    book = _Book(job.submitted_at, until)
    recovers = False
    for index, stint in enumerate(job.stints):
        recovers = _wait(book, min(stint.created_at, until), job.moves, recovers)
        last = job.ended_at is not None and index == len(job.stints) - 1
        trained = _attempt(book, stint, kept_step(stint, job.stints[index + 1 :]), recovers, last)
        recovers = stint.broke or (recovers and not trained)
    _wait(book, until, job.moves, recovers)
    first = min(max(job.stints[0].created_at, job.submitted_at), until) if job.stints else None
    broken = frozenset(stint.number for stint in job.stints if stint.broke)
    return Account(job.submitted_at, until, first, tuple(book.spans), broken)


def kept_step(stint: Stint, later: Sequence[Stint]) -> int | None:
    """Up to which step the work of an attempt has stayed; None if all of it has."""
    began = [other.from_step for other in later if other.from_step is not None]
    if began:
        return min(began)
    if stint.outcome in (None, Outcome.SUCCEEDED) or stint.from_step is None:
        return None
    return max([stint.from_step, *(mark.step for mark in stint.commits)])


class _Book:
    """Spans without a gap, from the beginning on."""

    def __init__(self, since: float, until: float) -> None:
        self.at, self._until = since, until
        self.spans: list[Span] = []

    def to(
        self,
        at: float,
        what: Category | Mapping[Category, float],
        stint: Stint | None = None,
        *,
        startup: bool = False,
    ) -> None:
        """What was done up to `at`: one thing, or several in these proportions."""
        at = min(max(at, self.at), self._until)
        if at == self.at:
            return
        parts = {what: 1.0} if isinstance(what, Category) else {one: part for one, part in what.items() if part > 0}
        whole = math.fsum(parts.values())
        if not whole:
            parts, whole = {Category.TRAINING: 1.0}, 1.0
        seconds = {category: (at - self.at) * (part / whole) for category, part in parts.items()}
        number, processes = (None, 0) if stint is None else (stint.number, stint.processes)
        self.spans.append(Span(self.at, at, seconds, number, processes, startup))
        self.at = at


def _wait(book: _Book, until: float, moves: Sequence[tuple[float, JobState]], recovers: bool) -> bool:
    """Time without an attempt. Returns whether the job still recovers: a pause ends that."""
    for (at, state), (end, _) in pairwise([*moves, (math.inf, JobState.QUEUED)]):
        if state == JobState.PAUSED and end > book.at and at < until:
            book.to(min(at, until), Category.RECOVERING if recovers else Category.QUEUED)
            book.to(min(end, until), Category.PAUSED)
            recovers = False
    book.to(until, Category.RECOVERING if recovers else Category.QUEUED)
    return recovers


def _attempt(book: _Book, stint: Stint, kept: int | None, recovers: bool, last: bool) -> bool:
    """The time of an attempt. Returns whether it trained, or may have."""
    end = math.inf if stint.ended_at is None else max(stint.ended_at, book.at)
    before = Category.RECOVERING if recovers else Category.STARTING
    after = Category.RECOVERING if stint.broke and not last else Category.STOPPING
    spent = stint.spent

    def to(at: float, what: Category | Mapping[Category, float], *, startup: bool = False) -> None:
        book.to(min(at, end), what, stint, startup=startup)

    if spent is None:
        to(end if stint.begun_at is None else stint.begun_at, before, startup=True)
        to(end, Category.RUNNING)
        return stint.begun_at is not None
    moved = spent.began_at + math.fsum(spent.seconds.values())
    if spent.phase == "done" or stint.outcome in (Outcome.SUCCEEDED, Outcome.STOPPED):
        over = moved
    elif stint.ended_at is None:
        over = math.inf
    else:  # it failed in the middle of something
        over = max(moved, spent.failed_at or moved)
    if spent.from_step is None:
        to(over, before, startup=True)
        to(end, after)
        return False
    loading = _only(spent.seconds, LOADING)
    to(spent.began_at + math.fsum(loading.values()), before, startup=True)
    if kept is not None and kept < spent.step:
        marks = [Mark(spent.from_step, loading), *stint.commits, Mark(spent.step, spent.seconds)]
        safe = mark_at(kept, marks)
        to(spent.began_at + safe.at_s, _work(safe.seconds))
        to(over, Category.LOST)
    else:
        work = _work(spent.seconds)
        to(moved - work.pop(Category.EXPORTING, 0.0), work)  # which comes last
        to(moved, Category.EXPORTING)
        to(over, OF_PHASE.get(spent.phase, Category.TRAINING))
    to(end, after)
    return True


def mark_at(step: int, marks: Sequence[Mark]) -> Mark:
    """Where a rank was after `step`: between two marks in proportion to the steps, and never outside of them."""
    ordered = sorted(marks, key=lambda mark: (mark.step, mark.at_s))
    lower = [mark for mark in ordered if mark.step <= step]
    upper = [mark for mark in ordered if mark.step > step]
    if not lower:
        return ordered[0]
    low = lower[-1]
    if low.step == step or not upper:
        return low
    share = (step - low.step) / (upper[0].step - low.step)
    phases = sorted({*low.seconds, *upper[0].seconds})
    pairs = {phase: (low.seconds.get(phase, 0.0), upper[0].seconds.get(phase, 0.0)) for phase in phases}
    return Mark(step, {phase: one + share * (two - one) for phase, (one, two) in pairs.items()})


def _only(seconds: Mapping[str, float], phases: frozenset[str]) -> dict[str, float]:
    return {phase: value for phase, value in seconds.items() if phase in phases}


def _work(seconds: Mapping[str, float]) -> dict[Category, float]:
    """Seconds by category, without loading; of a phase that another version named, as training."""
    found: dict[Category, float] = {}
    for phase, value in seconds.items():
        if phase not in LOADING:
            category = OF_PHASE.get(phase, Category.TRAINING)
            found[category] = found.get(category, 0.0) + value
    return found
