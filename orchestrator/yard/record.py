"""What a yard writes down of itself, and how its processes are started and waited for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from launch.attempt import write_atomically
from orchestrator.errors import YardError
from orchestrator.execute.processes import is_alive
from orchestrator.serve.secret import RAY_TOKEN
from orchestrator.serve.surroundings import ENV_YARD as ENV_YARD
from orchestrator.settings import Settings
from orchestrator.yard.remote import Remote

FILE = "yard.json"
START_S = 120.0  # a loaded machine takes long over three raylets
# Ray's own heartbeats: a node that is gone is dead after about 4 s instead of 15, one that is cut off after 12 instead
# of 45. And a node may take long to start.
RAY_WAITS = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "4"}
RAY_WAITS |= {"RAY_health_check_timeout_ms": "2000"}
RAY_WAITS |= {"RAY_raylet_start_wait_time_s": "100", "RAY_agent_register_timeout_ms": "100000"}
# A node's agent outlives its raylet, to end the ranks there: else their next attempt waits for the leash.
RAY_WAITS |= {"RAY_raylet_death_check_interval_milliseconds": "20000"}
# Told to end, Ray waits half a minute for work to move by itself. Ours was evacuated before, by who ends the node.
RAY_WAITS |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
# With its memory in Redis Ray's head may be away for so long before the other nodes give up; else it is a minute.
RAY_PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}


class Process(BaseModel):
    """A pid alone may be another process by the time one looks."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int
    start_time: float
    label: str | None = None
    """A Ray node's, by which it is known in the cluster."""

    @property
    def alive(self) -> bool:
        return is_alive(self.pid, self.start_time)


class YardRecord(BaseModel):
    """What `yard.json` holds: no secrets."""

    model_config = ConfigDict(frozen=True)

    id: str
    url: str
    executor: str
    ray_address: str | None = None
    ray_dir: str | None = None
    ray: tuple[Process, ...] = ()
    """By node; the first is Ray's head."""
    redis: str | None = None
    """Where Ray's head keeps what must outlive it: host:port."""
    controller: Process | None = None
    remotes: tuple[Remote, ...] = ()
    """Machines that were joined by ssh."""
    slurm_job: str | None = None
    """The allocation of Slurm's that it is in."""
    step: Process | None = None
    """There, what keeps the other nodes."""

    @property
    def whole(self) -> bool:
        """Whether no node has to be started again."""
        return all(process.alive for process in self.ray)


class Step(BaseModel):
    """What the step of an allocation is there for, as long as its file is."""

    model_config = ConfigDict(frozen=True)

    yard: str
    node: str
    """Where the yard's own processes are."""

    @classmethod
    def read(cls, settings: Settings) -> Self | None:
        try:
            return cls.model_validate_json(step_file(settings).read_bytes())
        except (OSError, ValidationError):
            return None


def step_file(settings: Settings) -> Path:
    return settings.root / "slurm-step.json"


def read_yard(settings: Settings) -> YardRecord | None:
    """The yard of this home, up or not; None if there never was one.

    Raises:
        YardError: its record cannot be read.
    """
    path = settings.root / FILE
    try:
        return YardRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as problem:
        raise YardError(
            f"the yard's record {path} cannot be read",
            code="yard-record",
            hint="end the yard's processes, remove the file, then `tuneyard up`",
        ) from problem


def as_json(record: YardRecord) -> dict[str, Any]:
    """For `-o json`."""
    data: dict[str, Any] = json.loads(record.model_dump_json())
    return data


def save(settings: Settings, record: YardRecord) -> None:
    write_atomically(settings.root / FILE, record.model_dump_json(indent=2))


def environment(settings: Settings, record: YardRecord) -> dict[str, str]:
    """The environment of a yard's processes."""
    env = {**os.environ, ENV_YARD: record.id, "TUNEYARD_HOME": str(settings.root)}
    env |= {"TUNEYARD_HOST": settings.host, "TUNEYARD_PORT": record.url.rpartition(":")[2]}
    if record.executor == "ray":
        env |= ray_environment(settings.root / RAY_TOKEN, redis=record.redis is not None)
        if record.redis is not None:
            env |= {"RAY_REDIS_ADDRESS": record.redis, "RAY_external_storage_namespace": record.id}
    return env


def ray_environment(token: Path, *, redis: bool) -> dict[str, str]:
    """What every process of Ray has in its environment; `token` is the file of Ray's own."""
    env = RAY_WAITS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return env | (RAY_PATIENCE if redis else {})


def spawn(settings: Settings, record: YardRecord, name: str, argv: list[str]) -> Process:
    """A detached process of the yard that logs to `logs/NAME.log`."""
    path = log_file(settings, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        child = subprocess.Popen(
            argv, env=environment(settings, record), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, cwd=settings.root,
        )  # fmt: skip
    return Process(name=name, pid=child.pid, start_time=psutil.Process(child.pid).create_time())


def log_file(settings: Settings, name: str) -> Path:
    return settings.root / "logs" / f"{name}.log"


def await_ready(settings: Settings, process: Process, what: str, ready: Callable[[], bool]) -> None:
    """Wait for `ready`. Raises YardError if the process ends first or takes too long."""
    deadline = time.monotonic() + START_S
    while not ready():
        if not process.alive:
            raise not_started(settings, process, f"{what} ended")
        if time.monotonic() > deadline:
            raise not_started(settings, process, f"{what} was not ready after {START_S:.0f} s")
        time.sleep(0.05)


def not_started(settings: Settings, process: Process, message: str) -> YardError:
    """An error with the last lines of the process's log."""
    log = log_file(settings, process.name)
    tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
    return YardError(f"{message}: {tail}", code="not-started", hint=f"see {log}, then `tuneyard down`")


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
