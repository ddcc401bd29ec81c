"""`tuneyard doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import typer
from rich.table import Table

from launch.instructions import SLOW_BF16, USE_FP32, multiplies_bf16, multiplies_int8
from orchestrator.cli.output import Format, Output, out, print_json, size
from orchestrator.settings import Settings

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "ray", "datasets", "peft")
MIN_DISK = 5 << 30
MIN_MEMORY = 4 << 30
MIN_SHM = 64 << 20


@dataclass(frozen=True)
class Finding:
    check: str
    level: str
    """ok, warn (something will be slower or missing) or fail (something will not work)"""
    found: str
    remedy: str | None = None


def doctor(output: Output = Format.TEXT) -> None:
    """Look at this machine: versions, GPUs, compiler, Ray, disk, and what to do about each. Exit 1 on a failure."""
    findings = list(examine(Settings()))
    if output == Format.JSON:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for finding in findings:
            mark = f"[{colours[finding.level]}]{finding.level}[/]"
            table.add_row(mark, finding.check, finding.found + (f"\n→ {finding.remedy}" if finding.remedy else ""))
        out.print(table)
    raise typer.Exit(1 if any(finding.level == "fail" for finding in findings) else 0)


def examine(settings: Settings) -> Iterator[Finding]:
    """What there is to say about this machine."""
    version = platform.python_version()
    enough = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if enough else "fail", version, None if enough else "use Python 3.11 or newer")
    yield from _packages()
    yield _compiler()
    yield _deepspeed_op()
    yield _gpus()
    yield _cpu()
    yield _memory()
    yield from _disks(settings)
    yield _database(settings)
    yield _yard(settings)


def _packages() -> Iterator[Finding]:
    wanted = {
        line.split("==")[0].split("[")[0].strip().lower(): line.split("==")[1].split(";")[0].strip()
        for line in importlib.metadata.requires("tuneyard") or ()
        if "==" in line and "extra" not in line
    }
    for name in PACKAGES:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name, "fail", "not installed", "run `make setup`, or pip install tuneyard with its constraints"
            )
            continue
        pinned = wanted.get(name)
        right = pinned is None or found.split("+")[0] == pinned
        remedy = None if right else f"tested with {pinned}: pip install {name}=={pinned}"
        yield Finding(name, "ok" if right else "warn", found, remedy)


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        return Finding(
            "compiler", "fail", "no C++ compiler", "install g++: DeepSpeed builds its CPU operations with it"
        )
    line = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return Finding("compiler", "ok", line[0] if line else compiler)


def _deepspeed_op() -> Finding:
    """Whether the op that ZeRO on CPU loads is built, so that no job waits for a compiler."""
    probe = (
        "import importlib.util as u,sys,pathlib,os;"
        "s=u.find_spec('deepspeed');"
        "here=[p for p in pathlib.Path(s.submodule_search_locations[0]).rglob('*.so')];"
        "cache=pathlib.Path(os.environ.get('TORCH_EXTENSIONS_DIR',pathlib.Path.home()/'.cache/torch_extensions'));"
        "here+=list(cache.rglob('deepspeed_shm_comm.so')) if cache.exists() else [];"
        "print(sum('shm_comm' in p.name for p in here))"
    )
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    if told.stdout.strip() not in ("", "0"):
        return Finding("deepspeed op", "ok", "the CPU communication op is built")
    return Finding(
        "deepspeed op", "warn", "not built yet", "`make setup` builds it; else the first ZeRO job on CPU does"
    )


def _gpus() -> Finding:
    from orchestrator.execute.gpus import local_gpus

    gpus = local_gpus()
    if not gpus:
        return Finding("gpus", "warn", "none: jobs run on the CPU", "on a GPU node check `nvidia-smi` and the driver")
    memory = f", {size(gpus[0].memory_bytes)} each" if gpus[0].memory_bytes else ""
    return Finding("gpus", "ok", f"{len(gpus)} × {gpus[0].type}{memory}")


def _cpu() -> Finding:
    bytes_, faster = "", ""
    if multiplies_int8():
        bytes_ = "; products of bytes (VNNI): `train.precision: int8`"
        faster = "; int8 is faster, and rounds products more coarsely"
    if multiplies_bf16():
        return Finding("cpu", "ok", f"bf16 in hardware{bytes_}")
    return Finding("cpu", "warn", f"{SLOW_BF16}{bytes_}", f"{USE_FP32}{faster}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{size(memory.available)} of {size(memory.total)} free, {os.cpu_count()} cores"
    if memory.available < MIN_MEMORY:
        return Finding("memory", "warn", found, "even a small model needs a few GiB a process: free some")
    return Finding("memory", "ok", found)


def _disks(settings: Settings) -> Iterator[Finding]:
    for name, path, least in (("disk", settings.root, MIN_DISK), ("/dev/shm", Path("/dev/shm"), MIN_SHM)):
        place = path
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
        writable = os.access(place, os.W_OK)
        if not writable:
            yield Finding(name, "fail", f"{path} is not writable", "choose another TUNEYARD_HOME")
        elif free < least:
            yield Finding(name, "warn", f"{size(free)} free at {path}", f"keep at least {size(least)} free there")
        else:
            yield Finding(name, "ok", f"{size(free)} free at {path}")


def _database(settings: Settings) -> Finding:
    from sqlalchemy.engine import make_url

    from orchestrator.errors import StoreError
    from orchestrator.store.store import Store

    if settings.database_url is None:
        return Finding("database", "ok", make_url(settings.url).render_as_string())  # made when it is needed
    try:
        store = Store(settings.url)
        store.prepare()
    except StoreError as problem:
        return Finding("database", "fail", problem.message, problem.hint)
    shown = store.engine.url.render_as_string(hide_password=True)
    store.close()
    return Finding("database", "ok", shown)


def _yard(settings: Settings) -> Finding:
    from orchestrator.errors import YardError
    from orchestrator.yard.home import is_up
    from orchestrator.yard.record import read_yard

    try:
        record = read_yard(settings)
    except YardError as problem:
        return Finding("yard", "fail", problem.message, problem.hint)
    if record is None:
        return Finding("yard", "ok", "none in this home; `tuneyard up` starts one")
    if not is_up(settings, record):
        return Finding("yard", "warn", f"{record.url} does not answer", "`tuneyard up` brings its controller back")
    dead = [process.name for process in record.ray if not process.alive]
    if dead:
        return Finding("yard", "warn", f"Ray nodes are gone: {', '.join(dead)}", "`tuneyard down`, then `tuneyard up`")
    return Finding(
        "yard", "ok", f"up at {record.url}" + (f", Ray at {record.ray_address}" if record.ray_address else "")
    )
