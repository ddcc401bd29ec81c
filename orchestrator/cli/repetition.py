"""The run that `tuneyard reproduce` makes of a record: nothing about it is decided anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch.contract import ExecutionPlan, Origin, Pinned
from launch.provenance import RunRecord
from orchestrator.cli.embedded import run_here
from orchestrator.cluster.model import Node
from orchestrator.errors import ImpossibleGangError
from orchestrator.execute.local import LocalExecutor
from orchestrator.job.spec import Resources, Retry, TrainingJob
from orchestrator.settings import Settings
from orchestrator.views import JobView


def repeated(record: RunRecord, target: Path) -> Iterator[JobView]:
    """Run `record` again, to the model directory `target`; the job after every look at it, until it is final.

    All ranks run on this machine, however many nodes the original had.

    Raises:
        ImpossibleGangError: it ran on GPUs that this machine does not have.
    """
    executor = PinnedMachine(record.plan)
    used, here = record.plan.world_size, len(executor.nodes()[0].gpus)
    if record.plan.device == "cuda" and here < used:
        kinds = ", ".join(sorted(set(record.surroundings.gpus)))
        raise ImpossibleGangError(
            f"the run used {used} GPUs ({kinds}), and this machine has {here}",
            code="device-missing",
            hint="reproduce it on a machine with as many GPUs of that type: another device is another training",
        )
    pinned = Pinned(plan=record.plan, threads=record.threads, data=record.data)
    origin = Origin(git=record.job_file, pinned=pinned)
    return run_here(job_of(record, target), origin, Settings(), executor)


def job_of(record: RunRecord, target: Path) -> TrainingJob:
    """The job that was recorded, for the same number of processes. A hub's model is taken at the recorded commit."""
    spec = record.spec
    model = spec.model
    if record.base.commit is not None:
        model = model.model_copy(update={"revision": record.base.commit})
    return TrainingJob.model_validate(
        {name: getattr(spec, name) for name in type(spec).model_fields}
        | {
            "model": model,
            "output_dir": str(target),
            "resources": Resources(
                num_processes=record.plan.world_size,
                accelerator="gpu" if record.plan.device == "cuda" else "cpu",
            ),
            "retry": Retry(max_restarts=0),
        }
    )


class PinnedMachine(LocalExecutor):
    """This machine as a plan needs it: a slot for every rank, and no GPUs for a run that used none."""

    def __init__(self, plan: ExecutionPlan) -> None:
        super().__init__(plan.world_size, owned=True)
        self._device = plan.device

    def nodes(self) -> list[Node]:
        found = super().nodes()
        return found if self._device == "cuda" else [node.model_copy(update={"gpus": ()}) for node in found]
