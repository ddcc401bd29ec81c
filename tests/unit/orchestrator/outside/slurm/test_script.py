"""The batch script: what Slurm is told, and what its run reads of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.contract import ExecutionPlan
from orchestrator.cluster.model import Node
from orchestrator.errors import NotFoundError, SpecError
from orchestrator.job.spec import AnyJob, ArrayElement
from orchestrator.outside.record import Patience, Task, job_of, task_of
from orchestrator.outside.shape import Shape
from orchestrator.outside.slurm import record
from orchestrator.outside.slurm.commands import GRES_LABEL, Partition
from orchestrator.outside.slurm.options import SlurmOptions
from orchestrator.outside.slurm.record import Run
from orchestrator.outside.slurm.script import Times, script_of, times_of
from tests.builders import a_command_job

PLAN = ExecutionPlan(engine="ddp", world_size=4, device="cpu", micro_batch_size=1, gradient_accumulation_steps=1)
NODE = Node(id="", name="", address="", cores=4, cpu_slots=2)
SHAPE = Shape(processes=4, nodes=2, per_node=2, cpus=4, kind=None, memory_mb=None, node=NODE, like=NODE, plan=PLAN)
RUN = Run(
    root="/shared/my yard", home="/home/me", node=NODE, warning_s=300.0,
    patience=Patience(leash=30, leash_margin=5, stop_grace=60, tick=0.5),
)  # fmt: skip


def a_script(*jobs: AnyJob, shape: Shape = SHAPE, limit_s: float | None = None, **options: Any) -> str:
    some = jobs or (a_command_job(4),)
    tasks = [task_of(f"job-{number}", job, None, None) for number, job in enumerate(some)]
    return script_of(some, tasks, shape, RUN, SlurmOptions(**options), Times(limit_s, 300.0), "/venv/bin/python")


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_what_slurm_is_told() -> None:
    assert directives(a_script()) == [
        "--job-name=job", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--signal=B:USR1@300", "--requeue",
        '--chdir="/shared/my yard"', "--open-mode=append", '--output="/shared/my yard/slurm/%j.out"',
    ]  # fmt: skip


def test_what_is_said_to_slurm_alone() -> None:
    from dataclasses import replace

    like = NODE.model_copy(update={"labels": {GRES_LABEL: "gpu:h100:8"}})
    shape = replace(SHAPE, kind="H100", like=like, memory_mb=5000)
    told = directives(
        a_script(
            a_command_job(4, priority="low"), shape=shape, limit_s=7200, partition="gpu", account="lab-7", qos="high",
            constraint="a&b|c", dependency="afterok:12", exclusive=True, sbatch=("--mail-type=END",),
        )
    )  # fmt: skip
    for line in (
        "--partition=gpu", "--account=lab-7", "--qos=high", "--constraint=a&b|c", "--dependency=afterok:12",
        "--kill-on-invalid-dep=yes", "--gres=gpu:h100:2", "--mem=5000M", "--exclusive", "--time=02:00:00", "--nice=100",
    ):  # fmt: skip
        assert line in told
    assert told[-1] == "--mail-type=END"


def test_an_array_is_one_job_of_slurms() -> None:
    jobs = [
        a_command_job(4).model_copy(
            update={"name": f"sweep-{index}", "array_of": ArrayElement(id="sweep-x", index=index, at_once=2)}
        )
        for index in range(3)
    ]
    told = directives(a_script(*jobs))
    assert told[:2] == ["--job-name=sweep", "--array=0-2%2"]
    assert '--output="/shared/my yard/slurm/%A_%a.out"' in told


def test_a_run_reads_what_the_script_hands_to_it(tmp_path: Path) -> None:
    """Whatever the job says, the shell takes none of it for itself."""
    jobs = [a_command_job(4, run=["echo", text, "$HOME", "`id`", "END-OF-JOB", "\\n'\""]) for text in ("ä", "b\nc")]
    python = tmp_path / "py thon"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$SET" "$@" > {tmp_path}/argv\ncat > {tmp_path}/stdin\n')
    python.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(a_script(*jobs, python=str(python), setup=("export SET='a b'",)))
    subprocess.run(["bash", str(script)], check=True)
    assert (tmp_path / "argv").read_text() == "a b\n-m\norchestrator.serve.batch\n"
    run, tasks = record.parse_script_data((tmp_path / "stdin").read_text())
    assert run == RUN
    assert [job_of(task) for task in tasks] == jobs


@pytest.mark.parametrize(
    "options",
    [
        {"partition": "a b"}, {"account": "x\n#SBATCH --uid=0"}, {"constraint": "a b"}, {"sbatch": ("rm -rf /",)},
        {"sbatch": ("--a\n--b",)}, {"setup": ("",)}, {"directory": "relative"}, {"python": "python"}, {"nodes": 0},
        {"dependency": "afterok:1 --x"},
    ],
)  # fmt: skip
def test_what_is_no_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SlurmOptions(**options)


def times(job: AnyJob, limit_s: float | None = None, default_s: float | None = None, **options: Any) -> Times:
    there = Partition("main", (), limit_s, default_s if default_s is not None else limit_s)
    return times_of(job, SlurmOptions(**options), there, 600.0)


def test_time_and_warning() -> None:
    plain, short = a_command_job(), a_command_job(max_duration="1h")
    assert times(plain) == Times(None, 600.0)
    assert times(plain, limit_s=60.0) == Times(None, 15.0)
    assert times(plain, limit_s=86400.0, default_s=1200.0) == Times(None, 300.0)
    assert times(plain, time=7200.0) == Times(7200.0, 600.0)
    assert times(plain, time=7200.0, warning=120.0) == Times(7200.0, 120.0)
    # Enough to end by max_duration, before the warning comes; if the partition gives so much.
    assert times(short) == Times(3600 + 600 + 60, 600.0)
    assert times(short, limit_s=1800.0) == Times(1800.0, 450.0)


def test_more_time_than_there_is_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        times(a_command_job(), limit_s=3600.0, time=7200.0)
    assert caught.value.field == "time"


@pytest.mark.parametrize(
    "job", ["slurm:", "slurm:x", "slurm:1_", "slurm:1/../2", "slurm:../1", "slurm:1_2_3", "slurm:-1"]
)
def test_no_other_path_is_ever_read(job: str) -> None:
    with pytest.raises(NotFoundError):
        record.parse_id(job)


def test_ids() -> None:
    assert record.parse_id("slurm:12") == ("12", None)
    assert record.parse_id("slurm:12_3") == ("12", 3)


def test_what_was_handed_over_is_known_again(tmp_path: Path) -> None:
    handed = record.Handed(
        id="12", root="/r", job_ids=("a-1",), names=("a",), queue="q", priority=0, is_array=False, submitted_at=1.0
    )
    record.keep(tmp_path, handed)
    record.keep(tmp_path, handed.model_copy(update={"id": "9"}))
    assert record.recall(tmp_path, "12") == handed
    assert [one.id for one in record.recall_all(tmp_path)] == ["9", "12"]
    with pytest.raises(NotFoundError):
        record.recall(tmp_path, "13")
    assert list(record.recall_all(tmp_path / "none")) == []


def test_a_task_is_small() -> None:
    """A thousand of them must fit into a script, of which Slurm takes 4 MiB."""
    task: Task = task_of("job-1", a_command_job(4), None, None)
    assert len(task.model_dump_json()) < 2000
