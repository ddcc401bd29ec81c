"""The batch script of a job: all that Slurm is told, and all that the run needs. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch import __version__
from orchestrator.errors import SpecError
from orchestrator.job.spec import AnyJob
from orchestrator.outside.record import Task
from orchestrator.outside.shape import Shape
from orchestrator.outside.slurm.commands import Partition, gres_of, time_text
from orchestrator.outside.slurm.options import SlurmOptions
from orchestrator.outside.slurm.record import Run, dump_script_data, folder_of

END = "END-OF-JOB"
MODULE = "orchestrator.serve.batch"
EARLY_S = 60.0
"""Slurm may warn so much sooner than it was asked to."""
MAX_WARNING_S = 65535


@dataclass(frozen=True)
class Times:
    """Of one run, in seconds."""

    limit_s: float | None
    """What is asked for; None for what the partition gives."""
    warning_s: float
    """How long before its limit Slurm warns it."""


def times_of(job: AnyJob, options: SlurmOptions, partition: Partition, pause_grace: float) -> Times:
    """How long a run is asked to take: what `--with time` says, else what max_duration needs, if that much is given.

    Raises:
        SpecError: the partition never gives so much.
    """
    most = partition.limit_s
    if options.time is not None and most is not None and options.time > most:
        raise SpecError(
            f"--with time asks for {time_text(options.time)}, and the partition {partition.name} gives at most "
            f"{time_text(most)} to a run",
            code="out-of-range",
            field="time",
            hint="a job that needs longer saves before the limit, is requeued and goes on: leave `time` out",
        )
    likely = options.time or (most if job.max_duration is not None else partition.default_s)
    warning = options.warning or min(pause_grace, likely / 4 if likely is not None else pause_grace)
    limit = options.time
    if limit is None and job.max_duration is not None:
        whole = job.max_duration + warning + EARLY_S  # so that it ends by max_duration, with its reason, where it can
        limit = whole if most is None else min(whole, most)
    return Times(limit, min(warning, MAX_WARNING_S))


def script_of(
    jobs: Sequence[AnyJob],
    tasks: Sequence[Task],
    shape: Shape,
    run: Run,
    options: SlurmOptions,
    times: Times,
    python: str,
) -> str:
    """A script that sbatch takes; `python` is the interpreter on the nodes, if the options name none."""
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Tuneyard {__version__}: {_told(jobs, shape)}",
            *(f"#SBATCH {line}" for line in _directives(jobs, shape, run, options, times)),
            "",
            "trap '' USR1  # a warning that comes before there is somebody to listen ends nothing",
            *options.setup,
            "# The controller of this one job: it starts the ranks by srun, and again after what another attempt may",
            "# mend, and before the time limit it saves and requeues. What follows is the job.",
            f"exec {shlex.quote(options.python or python)} -m {MODULE} <<'{END}'",
            dump_script_data(run, tasks),
            END,
            "",
        ]
    )


def _told(jobs: Sequence[AnyJob], shape: Shape) -> str:
    array = jobs[0].array_of
    what = f"job {jobs[0].name}" if array is None else f"array {array.id} of {len(jobs)} jobs"
    nodes = "1 node" if shape.nodes == 1 else f"{shape.nodes} nodes"
    return f"{what}, {shape.plan.engine} with {shape.processes} × {shape.plan.device} on {nodes}"


def _directives(jobs: Sequence[AnyJob], shape: Shape, run: Run, options: SlurmOptions, times: Times) -> Iterator[str]:
    first, array = jobs[0], jobs[0].array_of
    yield f"--job-name={first.name if array is None else first.name.removesuffix(f'-{array.index}')}"
    if array is not None:
        yield f"--array=0-{len(jobs) - 1}" + (f"%{array.at_once}" if array.at_once is not None else "")
    for name in ("partition", "account", "qos", "reservation", "constraint", "dependency"):
        value = getattr(options, name)
        if value is not None:
            yield f"--{name}={value}"
    if options.dependency is not None:
        yield "--kill-on-invalid-dep=yes"
    yield f"--nodes={shape.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={shape.cpus}"
    if (gres := gres_of(shape.like, shape.kind, shape.per_node)) is not None:
        yield f"--gres={gres}"
    if shape.memory_mb is not None:
        yield f"--mem={shape.memory_mb}M"
    if options.exclusive:
        yield "--exclusive"
    if times.limit_s is not None:
        yield f"--time={time_text(times.limit_s)}"
    yield f"--signal=B:USR1@{times.warning_s:.0f}"
    yield "--requeue"
    if first.priority < 0:
        yield f"--nice={-first.priority}"
    yield f'--chdir="{run.root}"'
    yield "--open-mode=append"
    name = "%j" if array is None else "%A_%a"
    yield f'--output="{str(folder_of(run.root)).replace("%", "%%")}/{name}.out"'
    yield from options.sbatch
