"""What is to run: jobs with their time of submission, true run time and size; and our own CSV of them."""

from __future__ import annotations

import csv
import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.cluster.capacity import Capacity
from orchestrator.errors import ImpossibleGangError, SpecError, SpecErrors
from orchestrator.schedule.place import fit, largest_gang

MOST_FAULTS = 20
"""Of a file, so many are told at once."""


@dataclass(frozen=True, slots=True)
class SimulatedJob:
    """One job of a workload. Seconds; GPUs stand for ranks."""

    job_id: str
    submit_s: float
    duration_s: float
    """How long it runs on `num_gpus`, undisturbed."""
    num_gpus: int
    tenant: str = "default"
    priority: int = 0
    min_gpus: int = 0
    """Bounds of an elastic job; 0 for num_gpus."""
    max_gpus: int = 0
    name: str = ""
    """What runs of the same job have in common; empty for what the tenant's have."""
    line: int | None = field(default=None, compare=False)
    """Where it was read."""

    @property
    def least(self) -> int:
        return self.min_gpus or self.num_gpus

    @property
    def most(self) -> int:
        return self.max_gpus or self.num_gpus


@dataclass(frozen=True)
class Workload:
    """Jobs in order of submission, and what was left out of the file they come from."""

    jobs: tuple[SimulatedJob, ...]
    source: str
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Jobs by the reason for which they were left out."""


def check_fits(workload: Workload, idle: Capacity, accelerator: str, *, consolidate: bool, elastic: bool) -> None:
    """Raises ImpossibleGangError for the first job that would wait for ever, even if nothing else ran."""
    fits: dict[int, bool] = {}
    for job in workload.jobs:
        size = job.least if elastic else job.num_gpus
        if size not in fits:
            fits[size] = bool(fit(idle, size, accelerator, consolidate=consolidate))
        if not fits[size]:
            raise ImpossibleGangError(
                f"job {job.job_id} needs {size} GPUs, which these nodes could not give it even if nothing else ran: "
                f"{len(idle.nodes)} nodes with {largest_gang(idle, accelerator)} GPUs",
                field="num_gpus",
                file=workload.source,
                line=job.line,
                hint="simulate more nodes or larger ones, or --placement count; or take the job out of the trace",
            )


# Our own format.


def _whole(text: str, least: int) -> int:
    number = int(text)
    if number < least:
        raise ValueError
    return number


def _seconds(text: str, *, positive: bool) -> float:
    number = float(text)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError
    return number


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text.strip()


@dataclass(frozen=True)
class _Column:
    read: Callable[[str], str | float | int]
    wanted: str
    required: bool = True


COLUMNS: Mapping[str, _Column] = {
    "job_id": _Column(_name, "a name that no other job has"),
    "submit_s": _Column(lambda text: _seconds(text, positive=False), "seconds, 0 or more"),
    "duration_s": _Column(lambda text: _seconds(text, positive=True), "seconds, more than 0"),
    "num_gpus": _Column(lambda text: _whole(text, 1), "a whole number, 1 or more"),
    "tenant": _Column(_name, "a name"),
    "priority": _Column(lambda text: _whole(text, -1000), "a whole number", required=False),
    "min_gpus": _Column(lambda text: _whole(text, 1), "a whole number, 1 or more", required=False),
    "max_gpus": _Column(lambda text: _whole(text, 1), "a whole number, 1 or more", required=False),
    "name": _Column(_name, "a name", required=False),
}
"""The columns of a trace. The last four are optional: class of priority, bounds of an elastic job, name."""


def read_csv(path: Path) -> Workload:
    """The trace at `path`, in the columns of COLUMNS.

    Raises:
        SpecError: no such file, not text, no such columns.
        SpecErrors: the faults of its rows, each with line, column and remedy.
    """
    rows = read_rows(path)
    header = next(rows, (0, []))[1]
    _check_header(path, header)
    faults: list[SpecError] = []
    jobs: list[SimulatedJob] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        if len(faults) >= MOST_FAULTS:
            break
        if not row:
            continue
        try:
            job = _job(path, line, header, row)
        except SpecErrors as problem:
            faults += problem.errors
            continue
        before = seen.setdefault(job.job_id, line)
        if before != line:
            faults.append(_fault(path, line, "job_id", f"job {job.job_id} is listed twice", f"see line {before}"))
        elif jobs and job.submit_s < jobs[-1].submit_s:
            faults.append(
                _fault(
                    path, line, "submit_s",
                    f"job {job.job_id} was submitted at {job.submit_s:g} s, before the job of the line above",
                    "sort the file by submit_s",
                )
            )  # fmt: skip
        else:
            jobs.append(job)
    if faults:
        raise SpecErrors(faults)
    if not jobs:
        raise SpecError(f"{path} has no jobs", code="empty-trace", file=path, hint="is this the right file?")
    return Workload(tuple(jobs), str(path))


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and cells of each row of a CSV file. Raises SpecError if it cannot be read as text."""
    number = 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            yield number, next(csv.reader([line], strict=True), [])
        except csv.Error as problem:
            raise _fault(path, number, None, f"not a row of CSV: {problem}", "check the quotes of this line") from None


def read_text(path: Path) -> str:
    """The text of a file. Raises SpecError."""
    try:
        if not path.is_file():
            near = difflib.get_close_matches(path.name, _names(path.parent), n=1, cutoff=0.6)
            hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path, or use --generate"
            kind = "is a directory" if path.is_dir() else "does not exist"
            raise SpecError(f"the trace {path} {kind}", code="file-not-found", file=path, hint=hint)
        return path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise SpecError(
            f"cannot read {path}: {problem.strerror}", code="file-unreadable", file=path, hint="check its permissions"
        ) from problem
    except UnicodeDecodeError as problem:
        raise SpecError(
            f"{path} is not UTF-8 text (byte {problem.start})", code="not-text", file=path, hint="unpack it first?"
        ) from problem


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _check_header(path: Path, header: Sequence[str]) -> None:
    missing = [name for name, column in COLUMNS.items() if column.required and name not in header]
    if missing:
        raise SpecError(
            f"the trace has no column {', '.join(missing)}",
            code="missing-column",
            field=missing[0],
            file=path,
            line=1,
            hint=f"its first line must name {', '.join(name for name, one in COLUMNS.items() if one.required)}; "
            "for public traces see --format",
        )
    repeated = [name for name, count in Counter(header).items() if count > 1]
    unknown = [name for name in header if name not in COLUMNS]
    if repeated or unknown:
        name = (repeated or unknown)[0]
        near = difflib.get_close_matches(name, COLUMNS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(COLUMNS)}"
        raise SpecError(
            f"the column {name!r} {'stands there twice' if repeated else 'is not known'}",
            code="duplicate-column" if repeated else "unknown-column",
            field=name,
            file=path,
            line=1,
            hint="remove one of them" if repeated else remedy,
        )


def _job(path: Path, line: int, header: Sequence[str], row: Sequence[str]) -> SimulatedJob:
    if len(row) != len(header):
        raise SpecErrors(
            [_fault(path, line, None, f"{len(row)} cells, where the first line names {len(header)}", "see the commas")]
        )
    values: dict[str, str | float | int] = {}
    faults = []
    for name, text in zip(header, row, strict=True):
        column = COLUMNS[name]
        if not column.required and not text.strip():
            continue
        try:
            values[name] = column.read(text)
        except ValueError:
            faults.append(_fault(path, line, name, f"{name} is {text!r}; it must be {column.wanted}", "correct it"))
    if not faults:
        job = SimulatedJob(**values, line=line)  # type: ignore[arg-type]
        if job.least <= job.num_gpus <= job.most:
            return job
        bounds = f"{job.least}..{job.most}"
        faults.append(_fault(path, line, "min_gpus", f"num_gpus {job.num_gpus} is not in {bounds}", "correct either"))
    raise SpecErrors(faults)


def _fault(path: Path, line: int, column: str | None, message: str, hint: str) -> SpecError:
    return SpecError(message, code="bad-trace", field=column, file=path, line=line, hint=hint)


def from_first(jobs: Iterable[SimulatedJob]) -> tuple[SimulatedJob, ...]:
    """In order of submission, which is counted from the first."""
    ordered = sorted(jobs, key=lambda job: job.submit_s)
    return tuple(replace(job, submit_s=job.submit_s - ordered[0].submit_s) for job in ordered)
