"""A yard on this machine: Ray's processes, the controller and its API, each detached, all found again by `yard.json`.

Every process of a yard carries its id in the environment, so that `down` ends what is left by that, not by name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from launch.attempt import write_atomically
from orchestrator.client import Client
from orchestrator.cluster.model import CORES_LABEL, MEMORY_LABEL, NAME_LABEL
from orchestrator.errors import ConflictError, YardError
from orchestrator.execute.local import cpu_slots, free_port
from orchestrator.execute.memory import host_memory
from orchestrator.execute.processes import end_all, is_alive
from orchestrator.job.lifecycle import JobState
from orchestrator.serve.secret import RAY_TOKEN, ensure_secret, ensure_token
from orchestrator.settings import Settings

FILE = "yard.json"
ENV_YARD = "TUNEYARD_YARD"
START_S = 120.0  # a loaded machine takes long over three raylets
STOP_S = 10.0
OBJECT_STORE_BYTES = 100_000_000  # Ray's smallest sensible; no tensors go through it
# Ray's own heartbeats: a node is dead after about 4 s of silence instead of 15.
RAY_HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "4"}


class Process(BaseModel):
    """A pid alone may be another process by the time one looks."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int
    start_time: float

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
    controller: Process | None = None


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


def connect(settings: Settings, url: str | None = None) -> Client:
    """A client of the yard at `url`, or of this home's.

    Raises:
        YardError: this home has no yard.
    """
    if url is not None:
        if settings.token is None:
            raise YardError("a yard elsewhere needs its token", code="no-token", hint="set TUNEYARD_TOKEN")
        return Client(url, settings.token.get_secret_value())
    record = read_yard(settings)
    if record is None:
        raise YardError(
            f"there is no yard in {settings.root}", hint="start one with `tuneyard up`, or use `tuneyard run`"
        )
    return Client(record.url, ensure_token(settings))


def is_up(settings: Settings, record: YardRecord | None) -> bool:
    """Whether the yard's controller lives and its API answers."""
    if record is None or record.controller is None or not record.controller.alive:
        return False
    try:
        with Client(record.url, ensure_token(settings), timeout=5) as client:
            return bool(client.health().get("ok"))
    except YardError:
        return False


def up(settings: Settings, nodes: int, executor: str) -> YardRecord:
    """Bring the yard up; what already runs is kept, so that this also restarts a controller that died, with the
    executor that the yard was made with.

    Raises:
        YardError: something did not start; its log is named.
    """
    record = read_yard(settings)
    if record is not None and is_up(settings, record):
        return record
    # Without Ray there is nothing but attempts beside the controller, and those are adopted.
    if record is None or (record.executor == "ray" and not any(process.alive for process in record.ray)):
        if record is not None:
            end_all(ENV_YARD, record.id)
        record = YardRecord(id=secrets.token_hex(6), url=_url(settings), executor=executor)
        if executor == "ray":
            record = _start_ray(settings, record, nodes)
            _save(settings, record)
    ensure_token(settings)
    record = record.model_copy(update={"controller": _start_controller(settings, record)})
    _save(settings, record)
    _wait_for_api(settings, record, nodes)
    return record


def down(settings: Settings, *, force: bool) -> YardRecord | None:
    """End every process of the yard. The database, logs and models stay.

    Returns:
        The yard that was ended; None if there was none.

    Raises:
        ConflictError: jobs are live and `force` is not given.
        YardError: a process could not be ended.
    """
    record = read_yard(settings)
    if record is None:
        return None
    if not force and is_up(settings, record):
        with connect(settings) as client:
            live = [job.id for job in client.jobs() if not job.state.final and job.state != JobState.PAUSED]
        if live:
            raise ConflictError(
                f"{len(live)} jobs are live: {', '.join(live[:5])}",
                code="jobs-live",
                hint="wait for them, cancel them, or `tuneyard down --force`: they start again with the next `up`",
            )
    if record.controller is not None and record.controller.alive:
        psutil.Process(record.controller.pid).send_signal(signal.SIGTERM)
        _wait_until(lambda: not (record.controller and record.controller.alive), STOP_S)
    left = end_all(ENV_YARD, record.id)
    if left:
        raise YardError(f"processes {left} could not be ended", code="not-ended", hint="look at them with `ps`")
    if record.ray_dir:
        shutil.rmtree(record.ray_dir, ignore_errors=True)
    (settings.root / FILE).unlink(missing_ok=True)
    return record


def _url(settings: Settings) -> str:
    return f"http://{settings.host}:{settings.port or free_port()}"


def _save(settings: Settings, record: YardRecord) -> None:
    write_atomically(settings.root / FILE, record.model_dump_json(indent=2))


def _start_ray(settings: Settings, record: YardRecord, nodes: int) -> YardRecord:
    """A head and `nodes - 1` more raylets on this machine, each a Ray node of its own."""
    ensure_secret(settings.root / RAY_TOKEN)
    port = free_port()
    # Unix sockets have short names: Ray's directory cannot lie deep.
    folder = Path(tempfile.mkdtemp(prefix="tuneyard-"))
    cores = os.cpu_count() or 1
    slots, memory = cpu_slots(cores, settings.cpu_slots), host_memory(settings.memory_gb) // nodes
    common = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        f"--num-cpus={slots}", f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    head = [
        *common, "--head", f"--port={port}", f"--node-ip-address={settings.host}", "--include-dashboard=false",
        f"--temp-dir={folder}/0",
    ]  # fmt: skip
    address = f"{settings.host}:{port}"
    record = record.model_copy(update={"ray_address": address, "ray_dir": str(folder)})
    processes = [_spawn(settings, record, "ray-0", [*head, _labels(0, cores, memory)])]
    _save(settings, record.model_copy(update={"ray": tuple(processes)}))
    marker = folder / "0" / "ray_current_cluster"
    _await(settings, processes[0], "Ray's head", lambda: marker.exists())
    for index in range(1, nodes):
        # Directories of their own: raylets of one host that start at once in one take each other's socket names.
        argv = [*common, f"--address={address}", f"--temp-dir={folder}/{index}", _labels(index, cores, memory)]
        processes.append(_spawn(settings, record, f"ray-{index}", argv))
    record = record.model_copy(update={"ray": tuple(processes)})
    _save(settings, record)
    return record


def _labels(index: int, cores: int, memory: int) -> str:
    return f"--labels={NAME_LABEL}=node-{index},{CORES_LABEL}={cores},{MEMORY_LABEL}={memory}"


def _start_controller(settings: Settings, record: YardRecord) -> Process:
    argv = [sys.executable, "-m", "orchestrator.serve", "--executor", record.executor]
    if record.ray_address:
        argv += ["--address", record.ray_address]
    return _spawn(settings, record, "controller", argv)


def environment(settings: Settings, record: YardRecord) -> dict[str, str]:
    """The environment of a yard's processes."""
    env = {**os.environ, ENV_YARD: record.id, "TUNEYARD_HOME": str(settings.root)}
    env |= {"TUNEYARD_HOST": settings.host, "TUNEYARD_PORT": record.url.rpartition(":")[2]}
    if record.executor == "ray":
        env |= RAY_HEALTH | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(settings.root / RAY_TOKEN)}
    return env


def _spawn(settings: Settings, record: YardRecord, name: str, argv: list[str]) -> Process:
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


def _wait_for_api(settings: Settings, record: YardRecord, nodes: int) -> None:
    assert record.controller is not None
    expected = nodes if record.executor == "ray" else 1

    def answers() -> bool:
        for process in record.ray:
            if not process.alive:
                raise _not_started(settings, process, f"{process.name} ended")
        if not is_up(settings, record):
            return False
        with connect(settings) as client:
            return len(client.nodes()) >= expected

    _await(settings, record.controller, "the controller", answers)


def _await(settings: Settings, process: Process, what: str, ready: Callable[[], bool]) -> None:
    """Wait for `ready`. Raises YardError if the process ends first or takes too long."""
    deadline = time.monotonic() + START_S
    while not ready():
        if not process.alive:
            raise _not_started(settings, process, f"{what} ended")
        if time.monotonic() > deadline:
            raise _not_started(settings, process, f"{what} was not ready after {START_S:.0f} s")
        time.sleep(0.05)


def _not_started(settings: Settings, process: Process, message: str) -> YardError:
    """An error with the last lines of the process's log."""
    log = log_file(settings, process.name)
    tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
    return YardError(f"{message}: {tail}", code="not-started", hint=f"see {log}, then `tuneyard down`")


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def as_json(record: YardRecord) -> dict[str, Any]:
    """For `-o json`."""
    data: dict[str, Any] = json.loads(record.model_dump_json())
    return data
