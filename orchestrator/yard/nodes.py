"""The Ray nodes of a yard on this machine: started, mended, ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from launch.instructions import multiplies_bf16
from orchestrator.cluster.model import BF16_LABEL, CORES_LABEL, MEMORY_LABEL, NAME_LABEL, START_LABEL
from orchestrator.execute.local import cpu_slots, free_port
from orchestrator.execute.memory import host_memory
from orchestrator.execute.processes import carrying, children_of, end_all, kill
from orchestrator.serve.secret import RAY_TOKEN, ensure_secret
from orchestrator.settings import Settings
from orchestrator.yard.record import ENV_YARD, Process, YardRecord, await_ready, save, spawn

LEAVE_S = 15.0  # time that agents have to end their ranks and say how, once their raylets are gone
OBJECT_STORE_BYTES = 100_000_000  # Ray's smallest sensible; no tensors go through it
FORGET_S = 10.0


def start_ray(settings: Settings, record: YardRecord, nodes: int) -> YardRecord:
    """A head and `nodes - 1` more raylets on this machine, each a Ray node of its own."""
    ensure_secret(settings.root / RAY_TOKEN)
    # Unix sockets have short names: Ray's directory cannot lie deep.
    folder = tempfile.mkdtemp(prefix="tuneyard-")
    record = record.model_copy(update={"ray_address": f"{settings.host}:{free_port()}", "ray_dir": folder})
    processes: list[Process] = []
    for index in range(nodes):
        processes.append(_start_node(settings, record, index, nodes))
        save(settings, record.model_copy(update={"ray": tuple(processes)}))
    return record.model_copy(update={"ray": tuple(processes)})


def mend_ray(settings: Settings, record: YardRecord) -> YardRecord:
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
            save(settings, record.model_copy(update={"ray": tuple(processes)}))
    return record.model_copy(update={"ray": tuple(processes)})


def _remake_ray(settings: Settings, record: YardRecord) -> YardRecord:
    if record.controller is not None and record.controller.alive:
        psutil.Process(record.controller.pid).kill()
    raylets = [found for index in range(len(record.ray)) for found in _ray_servers(record, index)]
    agents = [child for raylet in raylets for child in children_of(raylet.pid) if is_agent(child)]
    for index in range(len(record.ray)):
        _end_node(record, index)
    # Agents end their ranks and say so, which is quicker than to wait for the ranks' leash.
    psutil.wait_procs(agents, LEAVE_S)
    end_all(ENV_YARD, record.id)
    if record.ray_dir:
        shutil.rmtree(record.ray_dir, ignore_errors=True)
    return start_ray(settings, record.model_copy(update={"controller": None}), len(record.ray))


def _start_node(settings: Settings, record: YardRecord, index: int, nodes: int) -> Process:
    """Node `index`, of which nothing is left alive before; the first is the head, and is waited for."""
    _end_node(record, index)
    # Directories of their own: raylets of one host that start at once in one take each other's socket names.
    folder, label = Path(record.ray_dir or "") / str(index), secrets.token_hex(4)
    argv = ray_start(settings, folder, {NAME_LABEL: f"node-{index}", START_LABEL: label}, share=nodes)
    if index:
        process = spawn(settings, record, f"ray-{index}", [*argv, f"--address={record.ray_address}"])
        return process.model_copy(update={"label": label})
    host, _, port = (record.ray_address or "").rpartition(":")
    marker = folder / "ray_current_cluster"
    marker.unlink(missing_ok=True)
    head = [*argv, "--head", f"--port={port}", f"--node-ip-address={host}", "--include-dashboard=false"]
    process = spawn(settings, record, "ray-0", head)
    await_ready(settings, process, "Ray's head", marker.exists)
    return process.model_copy(update={"label": label})


def ray_start(settings: Settings, folder: Path, labels: Mapping[str, str], *, share: int = 1) -> list[str]:
    """The command that runs a node of Ray until it is ended; `share` nodes have this machine's memory together."""
    cores = os.cpu_count() or 1
    slots, memory = cpu_slots(cores, settings.cpu_slots), host_memory(settings.memory_gb) // share
    known = {CORES_LABEL: str(cores), MEMORY_LABEL: str(memory), BF16_LABEL: str(multiplies_bf16()).lower(), **labels}
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        f"--num-cpus={slots}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        "--labels=" + ",".join(f"{name}={value}" for name, value in known.items()),
    ]  # fmt: skip


def forget(redis: str, yard: str) -> None:
    """Remove what Ray's head has kept of a yard; a Redis that is away keeps it, which nobody reads again."""
    host, _, port = redis.rpartition(":")
    clean = f"cleanup_redis_storage({host!r}, {port}, '', False, {yard!r})"
    program = f"from ray._private.gcs_utils import cleanup_redis_storage; {clean}"
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=FORGET_S,
            check=False,
        )  # fmt: skip


def is_agent(process: psutil.Process) -> bool:
    """Whether it is a node agent, by the title that Ray gives its process; Ray's idle workers outlive a raylet, too."""
    return process.name().startswith("ray::NodeAgent")


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
