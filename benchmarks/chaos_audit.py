"""What there is to see of benchmarks.chaos when all is over: nothing is assumed, all is read from files and /proc."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos_faults import Struck
from benchmarks.chaos_yard import BATCH, ROWS, World
from launch.attempt import ENV_RUN_ID
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.manifest import CheckpointId
from launch.checkpoint.storage import open_storage
from orchestrator.job.lifecycle import JobState
from orchestrator.views import AttemptView
from orchestrator.yard.record import ENV_YARD

SAMPLE_S = 0.2
LEAVING_S = 10.0


class Observer(threading.Thread):
    """Looks every SAMPLE_S which attempts have processes, whatever anybody says of them."""

    def __init__(self, yard_id: str) -> None:
        super().__init__(name="observer", daemon=True)
        self._yard = f"{ENV_YARD}={yard_id}".encode()
        self._over = threading.Event()
        self.overlaps: set[tuple[str, int, int]] = set()
        """Job, and two of its attempts that were seen at once."""
        self.samples = 0

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.look()

    def look(self) -> dict[int, str]:
        """Pid → run id of what lives now."""
        found = attempts_alive(self._yard)
        by_job: dict[str, set[int]] = defaultdict(set)
        for run_id in found.values():
            job, _, number = run_id.rpartition(".")
            by_job[job].add(int(number))
        self.overlaps |= {
            (job, first, second) for job, numbers in by_job.items() for first in numbers for second in numbers
            if first < second
        }  # fmt: skip
        self.samples += 1
        return found

    def close(self) -> None:
        self._over.set()
        self.join()


def attempts_alive(yard: bytes) -> dict[int, str]:
    """Pid → run id of every living process of an attempt of a yard; `yard` as it stands in environments."""
    found, wanted = {}, f"{ENV_RUN_ID}=".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
            run_id = next((one for one in variables if one.startswith(wanted)), None)
            if run_id is None or yard not in variables:
                continue
            state = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found[int(entry.name)] = run_id[len(wanted) :].decode()
    return found


@dataclass
class Audit:
    """All but `jobs` and `attempts` should be 0."""

    jobs: int = 0
    attempts: int = 0
    jobs_lost: int = 0
    torn_checkpoints_loaded: int = 0
    samples_duplicated: int = 0
    samples_missing: int = 0
    overlapping_attempts: int = 0
    orphan_processes: int = 0
    false_alarms: int = 0
    """Attempts that were ended as hung, and none of their ranks had been stopped."""
    unexplained_ends: int = 0
    """Attempts that failed in another way without a fault."""
    wrong: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, object]:
        return asdict(self)

    @property
    def clean(self) -> bool:
        counts = {key: value for key, value in asdict(self).items() if key not in ("jobs", "attempts")}
        return not any(counts.values())


def audit(world: World, observer: Observer, struck: Sequence[Struck]) -> Audit:
    """Look at all that the jobs have left; they have ended."""
    found = Audit(jobs=len(world.jobs))
    for job, training in world.jobs.items():
        view = world.view(job)
        steps = (view.result or {}).get("train", {}).get("steps")
        if view.state != JobState.SUCCEEDED or steps != training.steps:
            found.jobs_lost += 1
            found.wrong.append(f"{job}: {view.state}, {steps} of {training.steps} steps: {view.reason.sentence}")
            continue
        dropped = sum((view.result or {})["train"]["dropped_rows"].values())
        _look_at_attempts(world, job, struck, found)
        _look_at_samples(world, job, training.steps, ROWS - dropped, found)
        _look_at_checkpoints(world, job, struck, found)
    for job, first, second in sorted(observer.overlaps):
        found.overlapping_attempts += 1
        found.wrong.append(f"{job}: attempts {first} and {second} were seen alive at once")
    deadline = time.monotonic() + LEAVING_S
    while (left := observer.look()) and time.monotonic() < deadline:
        time.sleep(SAMPLE_S)
    found.orphan_processes = len(left)
    found.wrong += [f"process {pid} of {run_id} is left" for pid, run_id in left.items()]
    return found


def _look_at_attempts(world: World, job: str, struck: Sequence[Struck], found: Audit) -> None:
    """Whether each had a reason to end, and had ended before the next began, by what they wrote down themselves."""
    last_end, fast_s = 0.0, clocks_differ_s()
    for attempt in world.client.attempts(job):
        found.attempts += 1
        begins, ends = [], []
        for rank in range(attempt.plan.world_size):
            files = world.yard.files(job, attempt.number)
            if files.process(rank).exists():
                begins.append(json.loads(files.process(rank).read_bytes())["start_time"] + fast_s)
            if files.exit(rank).exists():
                ends.append(json.loads(files.exit(rank).read_bytes())["time"])
        if begins and min(begins) < last_end:
            found.overlapping_attempts += 1
            found.wrong.append(f"{job}: attempt {attempt.number} began before the one before it had ended")
        last_end = max([last_end, *ends])
        causes = [one for one in struck if (job, attempt.number) in one.ends]
        if attempt.outcome == "hung" and not any(one.kind == "rank-stopped" for one in causes):
            found.false_alarms += 1
            found.wrong.append(f"{job}: attempt {attempt.number} was taken for hung")
        elif attempt.outcome not in ("succeeded", "stopped", "hung") and not causes:
            found.unexplained_ends += 1
            found.wrong.append(
                f"{job}: attempt {attempt.number} ended as {attempt.outcome} without a fault: {_story(world, job)}"
            )


def clocks_differ_s() -> float:
    """What to add to the time at which a process began, as the system tells it, to have the time of day: it counts from
    a whole second."""
    begun = time.time()
    with subprocess.Popen(["sleep", "10"]) as process:
        told = psutil.Process(process.pid).create_time()
        process.kill()
    return begun - told


Rows = dict[int, list[int]]
"""Step → the rows that all ranks took in it."""


def _story(world: World, job: str) -> str:
    """What happened to a job, but for its checkpoints."""
    events = [event for event in world.events(job) if not event.kind.startswith("checkpoint-")]
    first = events[0].time
    return "; ".join(f"{one.time - first:.1f} s {one.attempt} {one.kind} {one.data}" for one in events)[-4000:]


def lineage(
    claims: Mapping[int, CheckpointId | None], rescued: Mapping[int, int], rows: Mapping[int, Rows]
) -> list[tuple[int, int, int | None]]:
    """Which attempt took each stretch of the final model's steps: (attempt, after which step, up to which), the first
    first. The last goes to the end: up to None.

    By the checkpoints that attempts have claimed; one that has gone on from copies (`rescued`: after which step) has
    them of the last attempt that had come so far.
    """
    attempt, until = max({*claims, *rows}), None
    found: list[tuple[int, int, int | None]] = []
    while True:
        if attempt in rescued:
            step = rescued[attempt]
            before = max(number for number in rows if number < attempt and step in rows[number])
        else:
            start = claims.get(attempt)
            step, before = (start.step, start.attempt) if start is not None else (0, 0)
        found.append((attempt, step, until))
        if not before:
            return found[::-1]
        attempt, until = before, step


def _look_at_samples(world: World, job: str, steps: int, rows: int, found: Audit) -> None:
    """Whether the steps that made the model saw each row exactly once an epoch, by what each rank wrote down."""
    attempts = world.client.attempts(job)
    listing = Catalogue(open_storage(attempts[-1].checkpoint_dir or "")).listing()
    claims = {
        attempt: CheckpointId.parse(claim.starts_from) if claim.starts_from else None
        for attempt, claim in listing.claims.items()
    }
    told = [event for event in world.events(job) if event.kind == "checkpoint-resumed"]
    rescued = {event.attempt or 0: event.data["step"] for event in told if event.data.get("source") == "memory"}
    taken = {one.number: _rows(world, job, one) for one in attempts}
    seen: list[int] = []
    for number, after, until in lineage(claims, rescued, {number: some for number, some in taken.items() if some}):
        for step in range(after + 1, (steps if until is None else until) + 1):
            seen += taken[number].get(step, [])
    check_rows(job, seen, steps, rows, BATCH, found)


def _rows(world: World, job: str, attempt: AttemptView) -> Rows:
    by_step: Rows = defaultdict(list)
    for rank in range(attempt.plan.world_size):
        path = world.yard.files(job, attempt.number).samples(rank)
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            by_step[line["step"]] += line["rows"]
    return dict(by_step)


def check_rows(job: str, seen: Sequence[int], steps: int, rows: int, batch: int, found: Audit) -> None:
    """Count what came twice in an epoch of `rows`, and what should have come in so many steps and did not."""
    a_pass = -(-rows // batch)  # the last batch of an epoch may be smaller
    expected = steps // a_pass * rows + min(rows, steps % a_pass * batch)
    distinct = sum(len(Counter(seen[start : start + rows])) for start in range(0, len(seen), rows))
    found.samples_duplicated += len(seen) - distinct
    found.samples_missing += max(0, expected - distinct)
    if len(seen) != expected or distinct != expected:
        found.wrong.append(f"{job}: {expected} rows were to be seen; {len(seen)} were, {distinct} of them once")


def _look_at_checkpoints(world: World, job: str, struck: Sequence[Struck], found: Audit) -> None:
    """Whether a later attempt began from a checkpoint that had been damaged, by its claim or by its own word."""
    torn = [one for one in struck if one.job == job and one.damaged is not None]
    if not torn:
        return
    events = world.events(job)
    told = {str(one.data.get("id")) for one in events if one.kind == "checkpoint-quarantined"}
    resumed = {(one.attempt or 0, str(one.data.get("id"))) for one in events if one.kind == "checkpoint-resumed"}
    store = world.client.attempts(job)[-1].checkpoint_dir or ""
    claims = Catalogue(open_storage(store)).listing().claims
    resumed |= {(attempt, str(claim.starts_from)) for attempt, claim in claims.items()}
    for one in torn:
        loaded = [attempt for attempt, name in resumed if name == one.damaged and attempt > (one.attempt or 0)]
        found.torn_checkpoints_loaded += len(loaded)
        if loaded or one.damaged not in told:
            found.wrong.append(f"{job}: {one.damaged} was damaged, and " + ("loaded" if loaded else "nobody said so"))
