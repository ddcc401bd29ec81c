"""A yard on this machine: Ray's processes, the controller and its API, each detached, all found again by `yard.json`.

Every process of a yard carries its id in the environment, so that `down` ends what is left by that, not by name.
"""

from __future__ import annotations

import contextlib
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
from orchestrator.cluster.model import CORES_LABEL, MEMORY_LABEL, NAME_LABEL, START_LABEL
from orchestrator.errors import ConflictError, TuneyardError, YardError
from orchestrator.execute.local import cpu_slots, free_port
from orchestrator.execute.memory import host_memory
from orchestrator.execute.processes import carrying, children_of, end_all, is_alive, kill
from orchestrator.job.lifecycle import JobState
from orchestrator.serve.secret import RAY_TOKEN, ensure_secret, ensure_token
from orchestrator.settings import Settings

FILE = "yard.json"
ENV_YARD = "TUNEYARD_YARD"
START_S = 120.0  # a loaded machine takes long over three raylets
STOP_S = 10.0
NODE_RETRIES = 3
LEAVE_S = 15.0  # time that agents have to end their ranks and say how, once their raylets are gone
OBJECT_STORE_BYTES = 100_000_000  # Ray's smallest sensible; no tensors go through it
# Ray's own heartbeats: a node is dead after about 4 s of silence instead of 15. And a node may take long to start.
RAY_WAITS = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "4"}
RAY_WAITS |= {"RAY_raylet_start_wait_time_s": "100", "RAY_agent_register_timeout_ms": "100000"}
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

    @property
    def whole(self) -> bool:
        """Whether no node has to be started again."""
        return all(process.alive for process in self.ray)


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
    """Bring the yard up; what already runs is kept, so that this also starts again what has died of it, with as many
    nodes and the executor that the yard was made with.

    Raises:
        YardError: something did not start; its log is named.
    """
    record = read_yard(settings)
    if record is not None and record.whole and is_up(settings, record):
        return record
    ensure_token(settings)
    if record is None:
        record = YardRecord(id=secrets.token_hex(6), url=_url(settings), executor=executor, redis=settings.redis)
        if executor == "ray":
            record = _start_ray(settings, record, nodes)
    elif not record.whole:
        record = _mend_ray(settings, record)
    # Without Ray there is nothing but attempts beside the controller, and those are adopted.
    if record.controller is None or not record.controller.alive:
        record = record.model_copy(update={"controller": _start_controller(settings, record)})
    _save(settings, record)
    return _wait_for_api(settings, record)


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
    if record.redis is not None:
        _forget(record.redis, record.id)
    (settings.root / FILE).unlink(missing_ok=True)
    return record


def _url(settings: Settings) -> str:
    return f"http://{settings.host}:{settings.port or free_port()}"


def _save(settings: Settings, record: YardRecord) -> None:
    write_atomically(settings.root / FILE, record.model_dump_json(indent=2))


def _start_ray(settings: Settings, record: YardRecord, nodes: int) -> YardRecord:
    """A head and `nodes - 1` more raylets on this machine, each a Ray node of its own."""
    ensure_secret(settings.root / RAY_TOKEN)
    # Unix sockets have short names: Ray's directory cannot lie deep.
    folder = tempfile.mkdtemp(prefix="tuneyard-")
    record = record.model_copy(update={"ray_address": f"{settings.host}:{free_port()}", "ray_dir": folder})
    processes: list[Process] = []
    for index in range(nodes):
        processes.append(_start_node(settings, record, index, nodes))
        _save(settings, record.model_copy(update={"ray": tuple(processes)}))
    return record.model_copy(update={"ray": tuple(processes)})


def _mend_ray(settings: Settings, record: YardRecord) -> YardRecord:
    """Start again the nodes that have died.

    Without Redis a new head knows nothing of the cluster, and the old nodes are not let into it: then all is made anew,
    the controller too. Attempts end with their nodes, and their jobs go on from their checkpoints.
    """
    if not record.ray[0].alive and record.redis is None:
        return _remake_ray(settings, record)
    processes = list(record.ray)
    for index, process in enumerate(processes):
        if not process.alive:
            processes[index] = _start_node(settings, record, index, len(processes))
            _save(settings, record.model_copy(update={"ray": tuple(processes)}))
    return record.model_copy(update={"ray": tuple(processes)})


def _remake_ray(settings: Settings, record: YardRecord) -> YardRecord:
    if record.controller is not None and record.controller.alive:
        psutil.Process(record.controller.pid).kill()
    raylets = [found for index in range(len(record.ray)) for found in _ray_servers(record, index)]
    agents = [child for raylet in raylets for child in children_of(raylet.pid) if child.name().startswith("ray::")]
    for index in range(len(record.ray)):
        _end_node(record, index)
    # Agents end their ranks and say so, which is quicker than to wait for the ranks' leash.
    psutil.wait_procs(agents, LEAVE_S)
    end_all(ENV_YARD, record.id)
    if record.ray_dir:
        shutil.rmtree(record.ray_dir, ignore_errors=True)
    return _start_ray(settings, record.model_copy(update={"controller": None}), len(record.ray))


def _start_node(settings: Settings, record: YardRecord, index: int, nodes: int) -> Process:
    """Node `index`, of which nothing is left alive before; the first is the head, and is waited for."""
    _end_node(record, index)
    cores = os.cpu_count() or 1
    slots, memory = cpu_slots(cores, settings.cpu_slots), host_memory(settings.memory_gb) // nodes
    # Directories of their own: raylets of one host that start at once in one take each other's socket names.
    folder, label = Path(record.ray_dir or "") / str(index), secrets.token_hex(4)
    argv = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        f"--num-cpus={slots}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        _labels(index, cores, memory, label),
    ]  # fmt: skip
    if index:
        process = _spawn(settings, record, f"ray-{index}", [*argv, f"--address={record.ray_address}"])
        return process.model_copy(update={"label": label})
    host, _, port = (record.ray_address or "").rpartition(":")
    marker = folder / "ray_current_cluster"
    marker.unlink(missing_ok=True)
    head = [*argv, "--head", f"--port={port}", f"--node-ip-address={host}", "--include-dashboard=false"]
    process = _spawn(settings, record, "ray-0", head)
    _await(settings, process, "Ray's head", marker.exists)
    return process.model_copy(update={"label": label})


def _labels(index: int, cores: int, memory: int, label: str) -> str:
    known = {NAME_LABEL: f"node-{index}", CORES_LABEL: cores, MEMORY_LABEL: memory, START_LABEL: label}
    return "--labels=" + ",".join(f"{name}={value}" for name, value in known.items())


def _forget(redis: str, yard: str) -> None:
    """Remove what Ray's head has kept of a yard; a Redis that is away keeps it, which nobody reads again."""
    host, _, port = redis.rpartition(":")
    clean = f"cleanup_redis_storage({host!r}, {port}, '', False, {yard!r})"
    program = f"from ray._private.gcs_utils import cleanup_redis_storage; {clean}"
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=STOP_S,
            check=False,
        )  # fmt: skip


def _end_node(record: YardRecord, index: int) -> None:
    """End Ray on node `index`; the node's agent sees it, ends its ranks and leaves."""
    process = record.ray[index] if index < len(record.ray) else None
    if process is not None and process.alive:
        psutil.Process(process.pid).kill()
    kill(_ray_servers(record, index))


def _ray_servers(record: YardRecord, index: int) -> list[psutil.Process]:
    """The raylet of node `index`, and of the head its server, whether or not who started them is alive."""
    folder, servers = f"{record.ray_dir}/{index}/", []
    for found in carrying(ENV_YARD, record.id):
        with contextlib.suppress(psutil.Error):
            if found.name() in ("raylet", "gcs_server") and any(folder in part for part in found.cmdline()):
                servers.append(found)
    return servers


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
        env |= RAY_WAITS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(settings.root / RAY_TOKEN)}
        if record.redis is not None:
            env |= RAY_PATIENCE | {"RAY_REDIS_ADDRESS": record.redis, "RAY_external_storage_namespace": record.id}
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


def _wait_for_api(settings: Settings, record: YardRecord) -> YardRecord:
    """The record, once all nodes are there. On a loaded machine a raylet may give up starting, and is started again."""
    assert record.controller is not None
    retries = NODE_RETRIES

    def answers() -> bool:
        nonlocal record, retries
        ended = [process for process in record.ray if not process.alive]
        if ended:
            if record.ray[0] in ended or not retries:
                raise _not_started(settings, ended[0], f"{ended[0].name} ended")
            retries -= 1
            record = _mend_ray(settings, record)
            _save(settings, record)
        if not is_up(settings, record):
            return False
        try:
            with connect(settings) as client:
                nodes = client.nodes()
                there = {node.labels.get(START_LABEL) for node in nodes}
                return bool(nodes) and all(process.label in {None, *there} for process in record.ray)
        except TuneyardError:
            return False  # a controller that was there before finds a new head in its own time

    _await(settings, record.controller, "the controller", answers)
    return record


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
