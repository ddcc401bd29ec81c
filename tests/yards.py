"""A real yard in a directory of its own, driven by the command line as its users do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from launch.attempt import ENV_RUN_ID, AttemptFiles
from launch.token_cache import ENV_CACHE
from orchestrator.execute.processes import carrying, end_all
from orchestrator.settings import Settings
from orchestrator.yard.joined import ENV_NODE, NodeRecord
from orchestrator.yard.record import ENV_YARD, YardRecord, environment, read_yard

PATIENCE = 120.0

# A rank that says every 50 ms that it lives, and ends when it is asked to.
TICKER = """
import os, pathlib, sys, time
out = pathlib.Path(os.environ["TUNEYARD_OUTPUT_DIR"]); out.mkdir(parents=True, exist_ok=True)
log = (out / f"ticks-{os.environ['TUNEYARD_RUN_ID']}-{os.environ.get('RANK', '0')}").open("a", buffering=1)
for _ in range(int(sys.argv[1])):
    log.write(f"{time.time()}\\n")
    print("tick", flush=True)
    if os.path.exists(os.environ["TUNEYARD_STOP_FILE"]):
        sys.exit(10)
    time.sleep(0.05)
"""


class Yard:
    """A home directory, and the command line bound to it."""

    def __init__(self, home: Path, prefix: Sequence[str] = (), **settings: str) -> None:
        self.home = home
        self.prefix = list(prefix)
        """What comes before its commands, such as the name of another host."""
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("TUNEYARD_")}
        self.env |= {
            "TUNEYARD_HOME": str(home),
            ENV_CACHE: os.environ.get(ENV_CACHE, f"{home}/cache"),
            "HF_HUB_OFFLINE": "1",
        }
        settings = {"standbys": "0"} | settings  # importing for a job that never comes
        self.env |= {f"TUNEYARD_{name.upper()}": value for name, value in settings.items()}

    def run(self, *arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`tuneyard ARGUMENTS`."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "orchestrator", *arguments],
            env=self.env, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, check: bool = True) -> Any:
        """The last line of stdout of `tuneyard ARGUMENTS -o json`."""
        return json.loads(self.run(*arguments, "-o", "json", check=check).stdout.strip().splitlines()[-1])

    def job_file(self, **keys: Any) -> Path:
        """A job file (YAML is a superset of JSON)."""
        path = self.home / f"{keys['name']}.yaml"
        path.write_text(json.dumps(keys))
        return path

    def ticker(self, name: str, processes: int = 2, ticks: int = 10_000, **keys: Any) -> Path:
        """A job whose ranks tick."""
        script = self.home / "ticker.py"
        script.write_text(TICKER)
        run = [sys.executable, str(script), str(ticks)]
        return self.job_file(name=name, run=run, resources={"num_processes": processes}, **keys)

    def submit(self, path: Path) -> str:
        job: str = self.json("submit", str(path))["job"]
        return job

    def describe(self, job: str) -> Any:
        return self.json("describe", job)

    def attempt_dir(self, job: str, attempt: int = 1) -> Path:
        return self.home / "jobs" / job / f"attempt-{attempt}"

    def files(self, job: str, attempt: int = 1) -> AttemptFiles:
        return AttemptFiles(self.attempt_dir(job, attempt))

    def rank_pids(self, job: str, attempt: int = 1, ranks: int = 2) -> list[int]:
        """Pids of the ranks, once all have begun."""
        files = self.files(job, attempt)
        until(lambda: all(files.process(rank).exists() for rank in range(ranks)))
        return [json.loads(files.process(rank).read_bytes())["pid"] for rank in range(ranks)]

    def ticks(self, job: str, attempt: int = 1, rank: int = 0) -> list[float]:
        path = self.home / "jobs" / job / "model" / f"ticks-{job}.{attempt}-{rank}"
        return [float(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def record(self) -> YardRecord:
        record = read_yard(Settings(home=self.home))
        assert record is not None
        return record

    def without_controller(self) -> tuple[str, dict[str, str]]:
        """End the controller: the address of its Ray, and the environment for another driver of that."""
        controller, address = self.record.controller, self.record.ray_address
        assert controller is not None
        assert address is not None
        kill(controller.pid, signal.SIGTERM)
        until(lambda: not controller.alive)
        return address, environment(Settings(home=self.home), self.record)

    def left_of(self, job: str) -> list[psutil.Process]:
        """Processes of any attempt of a job that are alive."""
        return [process for attempt in range(1, 6) for process in carrying(ENV_RUN_ID, f"{job}.{attempt}")]


@contextmanager
def a_joined_node(yard: Yard, name: str, prefix: Sequence[str], **settings: str) -> Iterator[Yard]:
    """Another home, which is a node of `yard`; ended by its id."""
    with tempfile.TemporaryDirectory(prefix="tn-", ignore_cleanup_errors=True) as folder:
        node = Yard(Path(folder), prefix, **settings)
        try:
            node.run("node", "join", yard.record.url, "--token-file", str(yard.home / "token"), "--name", name)
            yield node
            node.run("node", "leave", "--force")
            log = "".join(path.read_text() for path in (node.home / "logs").glob("node*.log"))
            assert "Ray has ended" in log
            assert "Draining" not in log, "Ray waits for nobody who could move by himself"
        finally:
            record = NodeRecord.read(Settings(home=node.home))
            if record is not None:
                if record.keeper is not None and record.alive:
                    kill(record.keeper.pid)
                end_all(ENV_NODE, record.id)


@contextmanager
def a_yard(*up: str, prefix: Sequence[str] = (), **settings: str) -> Iterator[Yard]:
    """A yard that is up; ended by its id, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="ty-", ignore_cleanup_errors=True) as folder:
        yard = Yard(Path(folder), prefix, **settings)
        try:
            yard.run("up", *up)
            yield yard
            yard_id = yard.record.id
            yard.run("down", "--force")
            assert carrying(ENV_YARD, yard_id) == []
        finally:
            record = read_yard(Settings(home=yard.home))
            if record is not None:
                end_all(ENV_YARD, record.id)


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What `condition` returns once it is true. How long that takes is not tested, only that it happens."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)
