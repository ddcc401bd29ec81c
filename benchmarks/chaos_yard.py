"""The yard that benchmarks.chaos breaks: three Ray nodes, a database and a Redis of its own, and trainings that never
run out until they are told to."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from launch.attempt import AttemptFiles
from launch.checkpoint.manifest import CheckpointId
from launch.contract import ProgressLine
from orchestrator.client import Client
from orchestrator.errors import TuneyardError, YardError
from orchestrator.execute.protocol import last_progress
from orchestrator.job.lifecycle import AttemptState, JobState
from orchestrator.settings import Settings
from orchestrator.views import AttemptView, EventView, JobView
from orchestrator.yard.home import connect
from tests import postgres
from tests.redis import a_redis, is_installed
from tests.worlds import write_bert, write_dialogues, write_gpt2, write_messages
from tests.yards import Yard, a_yard

NODES, SLOTS = 3, 2
LIVE = 2
"""Jobs at a time."""
PROCESSES = ("2", "2..3")
"""Theirs, in turn. Three are never on one node alone; where a node is lost, there is still room for two and two."""
STEPS = {"ddp": (500, 800), "zero2": (350, 550), "zero3": (250, 400)}
"""From and to: a minute or two of training each."""
ROWS = 600
BATCH = 12
EVERY = 10
"""Steps between checkpoints."""
DISK_MIB = 256
PATIENCE_S = 240.0
POLL_S, FEED_S = 0.1, 1.0
T = TypeVar("T")


class TooLate(Exception):
    """Something did not happen within PATIENCE_S."""


@dataclass(frozen=True)
class Training:
    """What a job of the mix trains."""

    strategy: str
    processes: str
    steps: int
    task: str


class Victim(NamedTuple):
    """A job in the middle of its training."""

    job: str
    attempt: AttemptView
    files: AttemptFiles

    @property
    def key(self) -> tuple[str, int]:
        return self.job, self.attempt.number

    def process(self, rank: int) -> psutil.Process:
        return psutil.Process(json.loads(self.files.process(rank).read_bytes())["pid"])

    def agent(self, node_index: int) -> psutil.Process:
        return psutil.Process(json.loads(self.files.agent(node_index).read_bytes())["pid"])

    def alive(self) -> bool:
        """Whether all of its ranks are there."""
        try:
            ranks = range(self.attempt.plan.world_size)
            return all(self.process(rank).status() != psutil.STATUS_ZOMBIE for rank in ranks)
        except (OSError, psutil.Error):
            return False


@dataclass
class World:
    """The yard, its jobs, and how to look at them."""

    yard: Yard
    draw: random.Random
    folder: Path
    client: Client
    database: postgres.Server | None
    disk: Path | None
    """Where checkpoints go, if it is a small file system of their own."""
    length: float
    """Times STEPS."""
    say: Callable[[str], None]
    jobs: dict[str, Training] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    struck: list[Any] = field(default_factory=list)
    """Faults so far: benchmarks.chaos_faults.Struck."""
    feeding: bool = True
    _fed: float = 0.0

    # Jobs.

    def feed(self) -> None:
        """Submit new jobs in place of those that have ended, now and then. While the yard is away: later."""
        if time.monotonic() - self._fed < FEED_S:
            return
        self._fed = time.monotonic()
        with suppress(TuneyardError, AssertionError):
            if self.feeding:
                for job in self.client.jobs():
                    if job.state.final:
                        self.ended.add(job.id)
                while len(self.jobs) - len(self.ended) < LIVE:
                    self._submit()

    def _submit(self) -> None:
        index = len(self.jobs)
        strategy = self.draw.choice(list(STEPS))
        training = Training(
            strategy=strategy,
            processes=PROCESSES[index % len(PROCESSES)],
            steps=self.draw.randint(*(int(steps * self.length) for steps in STEPS[strategy])),
            task=self.draw.choice(("sequence-classification", "causal-lm")),
        )
        classifies = training.task == "sequence-classification"
        where: dict[str, Any] = {"every_steps": EVERY}
        if self.disk is not None:
            where["directory"] = str(self.disk / "checkpoints")
        path = self.yard.job_file(
            name=f"c{index}-{training.strategy}",
            model={
                "name_or_path": str(self.folder / ("bert" if classifies else "gpt2")),
                "task": training.task,
                "dropout": 0.0,
            },
            data={"train": str(self.folder / "data.tsv"), "max_length": 48}
            if classifies
            else {
                "train": str(self.folder / "data.jsonl"),
                "prompt_column": "prompt",
                "response_column": "response",
                "max_length": 48,
            },
            train={
                "max_steps": training.steps,
                "global_batch_size": BATCH,
                "learning_rate": 1e-4,
                "log_samples": True,
            },
            strategy=training.strategy,
            resources={"num_processes": training.processes if ".." in training.processes else int(training.processes)},
            checkpoint=where,
        )
        self.jobs[self.yard.submit(path)] = training
        self.say(f"         submitted {path.stem}: {training}")

    def finish(self) -> None:
        """Let all jobs end."""
        self.feeding = False
        self.until(lambda: all(job.state.final for job in self.client.jobs()), "all jobs end", 3 * PATIENCE_S)

    # Looking.

    def until(self, condition: Callable[[], T | None], what: str, seconds: float = PATIENCE_S) -> T:
        """What `condition` returns once it is true. While the yard does not answer, it is not.

        Raises:
            TooLate: it never was.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(TuneyardError, OSError, psutil.Error):
                found = condition()
                if found:
                    return found
            self.feed()
            time.sleep(POLL_S)
        raise TooLate(what)

    def victims(self, eta_s: float) -> list[Victim]:
        """Jobs that have trained and saved since they were last started, with so much left to do, or with half of it
        on a machine that is fast."""
        found = []
        for job in self.client.jobs():
            if job.state != JobState.RUNNING or job.checkpoint is None:
                continue
            attempt = self.client.attempts(job.id)[-1]
            saved = CheckpointId.parse(job.checkpoint.id)
            line = self.line(job.id, attempt.number)
            if attempt.state != AttemptState.RUNNING or saved is None or saved.attempt != attempt.number:
                continue
            if line is None or line.loss is None or line.steps is None:
                continue
            if (line.eta_s or 0) < eta_s and line.step > line.steps / 2:
                continue
            victim = Victim(job.id, attempt, AttemptFiles(attempt.run_dir))
            if victim.alive():
                found.append(victim)
        return found

    def victim(self, suits: Callable[[Victim], bool] = lambda _victim: True, eta_s: float = 15.0) -> Victim:
        """One of them, once there is one that suits."""
        found = self.until(
            lambda: [victim for victim in self.victims(eta_s) if suits(victim)], "a job that trains", 2 * PATIENCE_S
        )
        return self.draw.choice(found)

    def live(self) -> list[Victim]:
        """All attempts that have not ended."""
        return [
            Victim(job.id, attempt, AttemptFiles(attempt.run_dir))
            for job in self.client.jobs()
            if not job.state.final
            for attempt in self.client.attempts(job.id)[-1:]
            if attempt.state != AttemptState.ENDED
        ]

    def line(self, job: str, attempt: int) -> ProgressLine | None:
        return last_progress(self.yard.files(job, attempt).progress(0))

    def events(self, job: str, after: int = 0) -> list[EventView]:
        return self.client.events(job, after)

    def last_event(self, job: str) -> int:
        return self.events(job)[-1].id

    def trained(self, job: str, since: float, above: int = 0) -> float | None:
        """When this job took its first step after `since`, in an attempt above `above`, if it has."""
        for attempt in range(self.client.job(job).attempts, above, -1):
            path = self.yard.files(job, attempt).progress(0)
            for text in path.read_text().splitlines() if path.exists() else ():
                line = ProgressLine.model_validate_json(text)
                if line.loss is not None and line.time > since:
                    return line.time
        return None

    def trained_in(self, victim: Victim, since: float) -> bool:
        """Whether an attempt has taken a step after `since`, by its own word alone."""
        line = self.line(victim.job, victim.attempt.number)
        return line is not None and line.time > since

    def check_nodes(self) -> None:
        """Raises YardError if not all nodes are there."""
        if len(self.client.nodes()) < NODES:
            raise YardError("a node is gone")

    def whole(self) -> bool:
        """Whether a controller acts and all nodes are there; what has died is started again."""
        if not self.yard.record.whole:
            self.up()
        return bool(self.client.health()["acting"]) and len(self.client.nodes()) == NODES

    def node_of(self, raylet: psutil.Process) -> int:
        """The index of a raylet's node."""
        folder = self.yard.record.ray_dir
        words = raylet.cmdline()
        return next(index for index in range(NODES) if any(f"{folder}/{index}/" in word for word in words))

    def up(self) -> None:
        """Start again what has died, as an administrator or a supervisor would."""
        self.until(lambda: self.yard.run("up", check=False, timeout=PATIENCE_S).returncode == 0, "the yard is up")

    def view(self, job: str) -> JobView:
        return self.client.job(job)


@contextmanager
def a_world(seed: int, length: float, say: Callable[[str], None], *, keep: Path | None = None) -> Iterator[World]:
    """Everything that chaos needs; all of it is gone afterwards."""
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        write_bert(folder / "bert", hidden=128)
        write_gpt2(folder / "gpt2", hidden=128)
        write_messages(folder / "data.tsv", ROWS)
        write_dialogues(folder / "data.jsonl", ROWS)
        settings = {"cpu_slots": str(SLOTS), "standbys": "1"}
        database = stack.enter_context(postgres.running()) if postgres.why_not() is None else None
        if database is not None:
            settings["database_url"] = database.url
        redis = stack.enter_context(a_redis()) if is_installed() else None
        if redis is not None:
            settings["redis"] = redis
        disk = stack.enter_context(small_disk(folder))
        yard = stack.enter_context(a_yard("--nodes", str(NODES), **settings))
        client = stack.enter_context(connect(Settings(home=yard.home)))
        say(f"         a yard of {NODES} nodes is up; PostgreSQL {bool(database)}, Redis {bool(redis)}")
        yield World(yard, random.Random(seed), folder, client, database, disk, length, say)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of DISK_MIB in memory; None where none can be mounted."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)
