"""Accelerate's trackers fed from the progress lines: one run a job, continued by every attempt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from launch.attempt import write_atomically
from launch.config import TrainSpec
from launch.contract import ProgressLine
from launch.errors import SpecError

LOSS_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "samples_per_s": "train/samples_per_s",
    "memory_bytes": "train/memory_bytes",
}
RUN_IDS = "runs.json"


def start_trackers(
    accelerator: Accelerator, spec: TrainSpec, job_id: str, folder: Path, step: int
) -> Callable[[ProgressLine], None]:
    """Start the job's trackers, or go on with its runs, and return what is to be given every progress line.

    `folder` is the job's, the same in every attempt: TensorBoard writes there, the others keep there what they need
    to find their run again. `step` is the one that this attempt goes on from; what an earlier attempt logged of later
    steps is lost work, and TensorBoard hides it.
    """
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    known = _known_runs(folder)
    settings: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1} if step else {},
        "wandb": {"id": job_id, "name": job_id, "resume": "allow", "dir": str(folder)},
        "mlflow": {"run_name": job_id, "run_id": known.get("mlflow")},
    }
    if "mlflow" in spec.trackers and "MLFLOW_TRACKING_URI" not in os.environ:
        # A directory of files beside the job's others, until a server is named.
        os.environ["MLFLOW_TRACKING_URI"] = (folder / "mlflow").as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    first = not known and not step
    try:
        accelerator.init_trackers(spec.name, config=dict(_flat(spec)) if first else None, init_kwargs=settings)
    except _refusals(spec.trackers) as problem:
        raise SpecError(
            f"a tracker could not be started: {(str(problem) or repr(problem)).splitlines()[0]}",
            code="tracker-not-started",
            field="trackers",
            hint="log in where the job runs, set WANDB_MODE: offline or MLFLOW_TRACKING_URI in env, or leave it out",
        ) from problem
    if accelerator.is_main_process:
        ids = {"wandb": job_id} if "wandb" in spec.trackers else {}
        if "mlflow" in spec.trackers:
            ids["mlflow"] = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
        write_atomically(folder / RUN_IDS, json.dumps(known | ids | {"tensorboard": spec.name}))

    def follow(line: ProgressLine) -> None:
        values = dict(values_of(line))
        if values:
            accelerator.log(values, step=line.step)

    return follow


def _refusals(trackers: tuple[str, ...]) -> tuple[type[Exception], ...]:
    """What trackers raise when they cannot be started."""
    found: list[type[Exception]] = [OSError]
    if "wandb" in trackers:
        from wandb.errors import Error

        found.append(Error)
    if "mlflow" in trackers:
        from mlflow.exceptions import MlflowException  # of the distribution mlflow-skinny

        found.append(MlflowException)
    return tuple(found)


def values_of(line: ProgressLine) -> Iterator[tuple[str, float]]:
    """What a tracker is told of a progress line: name and number."""
    if line.phase == "train":
        for field, name in LOSS_NAMES.items():
            value = getattr(line, field)
            if value is not None:
                yield name, value
    for name, number in (line.metrics or {}).items():
        yield f"eval/{name}", number


def _known_runs(folder: Path) -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads((folder / RUN_IDS).read_bytes())
    except FileNotFoundError:
        return {}
    return known


def _flat(spec: TrainSpec) -> Iterator[tuple[str, str | int | float | bool]]:
    """The job's keys with dots, as trackers take them: `train.learning_rate`."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, str | int | float | bool]]:
        if isinstance(value, dict):
            for key, inside in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inside)
        elif isinstance(value, list):
            yield prefix, ", ".join(str(one) for one in value)
        elif value is not None:
            yield prefix, value

    return walk("", spec.model_dump(mode="json"))
