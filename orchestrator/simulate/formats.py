"""Public traces of GPU clusters, as workloads. Nobody wrote them for us: jobs that lack something are left out.

- philly: `cluster_job_log` of github.com/msr-fiddle/philly-traces (Jeon et al., ATC 2019), JSON.
- pai: `pai_task_table.csv` of github.com/alibaba/clusterdata, cluster-trace-gpu-v2020 (Weng et al., NSDI 2022), and
  `pai_job_table.csv` beside it; with or without a line of names, which is published as a file of its own.
- crux: `job.csv` of github.com/alibaba/alibaba-lingjun-dataset-2023 (Cao et al., SIGCOMM 2024), and `worker.csv` beside
  it. Its README names no columns, and its data are not in the stored copy that this was written from; those read here
  are the ones on which several independent programs that use the dataset agree.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.simulate.workload import SimulatedJob, Workload, from_first, read_csv, read_rows, read_text

NO_TIME = "never began, or no end is recorded"
NO_GPU = "asked for no GPU"
NO_LENGTH = "ended when it began"


def read_trace(path: Path, kind: str | None = None) -> Workload:
    """The workload in a file of a kind of FORMATS; None looks at the file. Raises SpecError."""
    return FORMATS[kind or guess(path)](path)


def guess(path: Path) -> str:
    """By name and first line; our own CSV if in doubt, whose reader says what it misses."""
    if path.suffix == ".json" or path.name.startswith("cluster_job_log"):
        return "philly"
    if path.name.startswith("pai_"):
        return "pai"
    if not path.is_file():
        return "csv"
    with path.open(encoding="utf-8", errors="replace") as stream:
        first = stream.readline(10_000)
    if first.startswith(("[", "{")):
        return "philly"
    names = first.strip().split(",")
    return "crux" if "gmt_job_running" in names else "pai" if "inst_num" in names else "csv"


# Philly.


def read_philly(path: Path) -> Workload:
    """GPUs are those of a job's largest attempt, run time that of all attempts, the tenant is the virtual cluster."""
    try:
        entries = json.loads(read_text(path))
    except ValueError as problem:
        raise _unlike(path, "philly", f"not JSON: {problem}") from None
    if not isinstance(entries, list):
        raise _unlike(path, "philly", "not a list of jobs")
    jobs, skipped = [], Counter[str]()
    for number, entry in enumerate(entries):
        try:
            attempts = [_philly_attempt(attempt) for attempt in entry["attempts"]]
            submitted = _moment(entry["submitted_time"], PHILLY_TIME)
            name, tenant = str(entry["jobid"]), str(entry["vc"])
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise _unlike(path, "philly", f"entry {number} is not of the published form ({problem!r})") from None
        lengths = [length for _, length in attempts if length is not None]
        gpus = max((gpus for gpus, _ in attempts), default=0)
        if not lengths or submitted is None:
            skipped[NO_TIME] += 1
        elif not gpus:
            skipped[NO_GPU] += 1
        elif sum(lengths) <= 0:
            skipped[NO_LENGTH] += 1
        else:
            jobs.append(SimulatedJob(name, submitted, sum(lengths), gpus, tenant))
    return _workload(path, jobs, skipped)


PHILLY_TIME = ("%Y-%m-%d %H:%M:%S",)


def _philly_attempt(attempt: Mapping[str, Any]) -> tuple[int, float | None]:
    """Its GPUs, and its seconds if both ends are known."""
    gpus = sum(len(detail["gpus"]) for detail in attempt["detail"])
    begun, ended = (_moment(attempt.get(key), PHILLY_TIME) for key in ("start_time", "end_time"))
    return gpus, None if begun is None or ended is None else max(0.0, ended - begun)


# Alibaba PAI.

PAI_TASK = (
    "job_name", "task_name", "inst_num", "status", "start_time", "end_time", "plan_cpu", "plan_mem", "plan_gpu",
    "gpu_type",
)  # fmt: skip
PAI_JOB = ("job_name", "inst_id", "user", "status", "start_time", "end_time")


@dataclass(frozen=True)
class _Tasks:
    """What the tasks of a job that have GPUs ask for and took, together."""

    gpus: int
    begun: float
    ended: float

    def and_(self, other: _Tasks) -> _Tasks:
        return _Tasks(self.gpus + other.gpus, min(self.begun, other.begun), max(self.ended, other.ended))


def read_pai(path: Path) -> Workload:
    """A job is the gang of all instances of its tasks with `plan_gpu` (hundredths of a GPU, rounded up to whole ones).

    It runs from the first start of such a task to their last end. Who submitted it and when is in the table of jobs;
    without that, it is `default`'s and was submitted when it started.
    """
    skipped = Counter[str]()
    jobs: dict[str, _Tasks] = {}
    seen: dict[str, str] = {}
    for row in _table(path, "pai", PAI_TASK):
        name = row["job_name"]
        count, share = _number(row["inst_num"]), _number(row["plan_gpu"])
        if not count or not share:
            seen.setdefault(name, NO_GPU)
            continue
        begun, ended = _number(row["start_time"]), _number(row["end_time"])
        if begun is None or ended is None:
            seen[name] = NO_TIME
            continue
        tasks = _Tasks(int(count) * math.ceil(share / 100), begun, ended)
        jobs[name] = jobs[name].and_(tasks) if name in jobs else tasks
        seen.setdefault(name, "")
    table = path.with_name(path.name.replace("pai_task_table", "pai_job_table"))
    users: dict[str, tuple[str, float | None]] = {}
    if table != path and table.is_file():
        users = {row["job_name"]: (row["user"], _number(row["start_time"])) for row in _table(table, "pai", PAI_JOB)}
    found = []
    for name, why in seen.items():
        one = jobs.get(name)
        if one is None or why == NO_TIME:
            skipped[why] += 1
        elif one.ended <= one.begun:
            skipped[NO_LENGTH] += 1
        else:
            user, submitted = users.get(name, ("default", None))
            found.append(
                SimulatedJob(name, one.begun if submitted is None else submitted, one.ended - one.begun, one.gpus, user)
            )
    return _workload(path, found, skipped)


# Crux.

CRUX_JOB = ("job_name", "gmt_job_submitted", "gmt_job_running", "gmt_job_finished")
CRUX_WORKER = ("job_name", "RES")
CRUX_TIME = ("%Y/%m/%d %H:%M", "%Y-%m-%d %H:%M:%S")
CRUX_GPU = "nvidia.com/gpu"


def read_crux(path: Path) -> Workload:
    """GPUs are those of all workers (`RES`, JSON); it runs from `gmt_job_running` to `gmt_job_finished`, or `_stopped`.

    Times are whole minutes. The tenant is `tenant_id`, if there is such a column.
    """
    workers = path.with_name("worker.csv")
    gpus = Counter[str]()
    for row in _table(workers, "crux", CRUX_WORKER):
        try:
            asked = json.loads(row["RES"] or "{}")
            gpus[row["job_name"]] += int(float(asked.get(CRUX_GPU) or 0))
        except (ValueError, AttributeError):
            continue
    jobs, skipped = [], Counter[str]()
    for row in _table(path, "crux", CRUX_JOB):
        submitted, begun = (_moment(row[key], CRUX_TIME) for key in ("gmt_job_submitted", "gmt_job_running"))
        ended = _moment(row["gmt_job_finished"], CRUX_TIME)
        if ended is None:
            ended = _moment(row.get("gmt_job_stopped"), CRUX_TIME)
        if submitted is None or begun is None or ended is None or begun < submitted:
            skipped[NO_TIME] += 1
        elif not gpus[row["job_name"]]:
            skipped[NO_GPU] += 1
        elif ended <= begun:
            skipped[NO_LENGTH] += 1
        else:
            tenant = row.get("tenant_id") or "default"
            jobs.append(SimulatedJob(row["job_name"], submitted, ended - begun, gpus[row["job_name"]], tenant))
    return _workload(path, jobs, skipped)


FORMATS: Mapping[str, Callable[[Path], Workload]] = {
    "csv": read_csv,
    "philly": read_philly,
    "pai": read_pai,
    "crux": read_crux,
}


# What they share.


def _table(path: Path, kind: str, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows by the names of their columns; a file without a line of names has all of `names`, in that order."""
    header: Sequence[str] | None = None
    for line, row in read_rows(path):
        if header is None:
            header = names
            if names[0] in row:
                header = row
                missing = [name for name in names if name not in row]
                if missing:
                    raise _unlike(path, kind, f"no column {', '.join(missing)}", line)
                continue
        if len(row) < len(header):
            raise _unlike(path, kind, f"{len(row)} cells instead of {len(header)}", line)
        yield dict(zip(header, row, strict=False))


def _workload(path: Path, jobs: Sequence[SimulatedJob], skipped: Mapping[str, int]) -> Workload:
    if not jobs:
        told = "; ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise SpecError(
            f"{path} has no job that can be simulated" + (f" ({told})" if told else ""),
            code="empty-trace",
            file=path,
            hint="is this the right file, and unpacked? see --format",
        )
    count = Counter[str]()
    named = []
    for job in jobs:  # such files do hold the same name twice
        count[job.job_id] += 1
        again = count[job.job_id]
        named.append(job if again == 1 else replace(job, job_id=f"{job.job_id}-{again}"))
    return Workload(from_first(named), str(path), dict(skipped))


def _moment(text: object, formats: Sequence[str]) -> float | None:
    """Seconds since 1970, as if all clocks were in one zone without summer time; None if there is no time."""
    if not isinstance(text, str):
        return None
    for form in formats:
        try:
            return (datetime.strptime(text.strip(), form) - datetime(1970, 1, 1)).total_seconds()
        except ValueError:
            continue
    return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _unlike(path: Path, kind: str, message: str, line: int | None = None) -> SpecError:
    return SpecError(
        f"{path} is no trace of kind {kind}: {message}",
        code="bad-trace",
        file=path,
        line=line,
        hint="see docs/simulate.md for what is read of each kind; --format names another",
    )
