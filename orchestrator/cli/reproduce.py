"""`tuneyard reproduce`: a finished training again, and whether it comes to the same weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from launch.config import exists, local_path
from launch.provenance import RECORD, RunRecord, check_inputs, differences, read_record, surroundings
from orchestrator.cli.output import Format, Output, err, job_json, out, print_json
from orchestrator.cli.progress import follow, summary
from orchestrator.cli.status import JOB_FAILED, of_job
from orchestrator.errors import SpecError
from orchestrator.job.lifecycle import JobState

if TYPE_CHECKING:
    from launch.compare import Comparison

SHOWN = 10  # tensors and metrics that are named to a person; programs get all

ModelDir = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The model directory that a training job left.")]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output-dir", metavar="DIR", help="Where the new model directory goes; MODEL_DIR-reproduced if left out."
    ),
]


def reproduce(
    model_dir: ModelDir,
    output_dir: OutputDir = None,
    output: Output = Format.TEXT,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="No progress on stderr."),
) -> None:
    """Train a finished job again on this machine, and compare the weights bit by bit.

    The run.json in its model directory says how it was made. Same plan, threads, seed and data; what is another now
    (versions, CPU, Tuneyard's commit) is told on stderr. Exits with 0 if every tensor is the same, with 1 if not.
    """
    # Imported late: the other verbs need neither numpy, database nor executor.
    from launch.compare import compare, read_tensors
    from orchestrator.cli.repetition import repeated

    record = read_record(model_dir)
    target = new_directory(model_dir, output_dir)
    read_tensors(model_dir)
    check_inputs(record)
    for warning in warnings(record):
        err.print(f"[yellow]warn[/yellow]  {escape(warning)}")

    view = follow(repeated(record, target), quiet=quiet)
    if view.state != JobState.SUCCEEDED:
        _refuse_inputs(view.error or {})
        if output == Format.JSON:
            print_json(job_json(view))
        else:
            summary(view)
        raise typer.Exit(of_job(view.state))

    compared = compare(model_dir, target)
    reasons = [] if compared.same else likely_reasons(record, read_record(target))
    if output == Format.JSON:
        told = {"bitwise_same": compared.same, "original": str(model_dir.resolve()), "reasons": reasons}
        compared_json: dict[str, Any] = compared.model_dump(mode="json")
        differing = compared_json.pop("metrics")
        told |= {**compared_json, "largest_difference": compared.largest, "different_metrics": differing}
        print_json(job_json(view) | told)
    else:
        _show(compared, reasons, target)
    raise typer.Exit(of_job(view.state) if compared.same else JOB_FAILED)


def warnings(record: RunRecord) -> list[str]:
    """What is known to be another before the run starts."""
    found = [str(one) for one in differences(record.surroundings, surroundings())]
    unset = [name for name in record.env if name not in os.environ]
    if unset:
        found.append(
            f"the job set {', '.join(unset)}, whose values are not recorded: export what matters, and start again"
        )
    return found


def likely_reasons(then: RunRecord, now: RunRecord) -> list[str]:
    """Why the weights may differ, from what the two runs tell of themselves; never empty."""
    return list(_reasons(then, now)) or [
        f"nothing that {RECORD} tells differs: were the weights, or the record, changed after the run?"
    ]


def _reasons(then: RunRecord, now: RunRecord) -> Iterator[str]:
    yield from (str(one) for one in differences(then.surroundings, now.surroundings))
    if then.threads != now.threads:
        yield f"CPU threads by rank: {then.threads} then, {now.threads} now"
    if then.env:
        yield f"the job set {', '.join(then.env)}; their values are not recorded"
    if then.resumed_at:
        yield f"attempt {then.attempts} of the original went on from a checkpoint at step {then.resumed_at}"
    elif then.attempts > 1:
        yield f"the original took {then.attempts} attempts"
    if len(then.nodes) > 1:
        yield f"the original ran on {len(then.nodes)} nodes: between them, sums may be taken in another order"
    if then.plan.device == "cuda" and not then.spec.train.deterministic:
        yield "GPU kernels may take sums in any order, unless the job says `train.deterministic: true`"


def new_directory(model_dir: Path, wanted: Path | None) -> Path:
    """The new model directory's path.

    Raises:
        SpecError: it is taken, or cannot be written.
    """
    original = model_dir.resolve()
    target = original.with_name(f"{original.name}-reproduced")
    if wanted is not None:
        target = local_path(Path.cwd(), str(wanted))
        if target == original or target in original.parents:
            raise SpecError(
                f"{target} holds the original, which would be replaced",
                code="output-exists",
                field="--output-dir",
                hint="name another directory",
            )
    if exists(target) and (wanted is None or not _may_be_replaced(target)):
        raise SpecError(
            f"{target} exists already",
            code="output-exists",
            field="--output-dir",
            hint="remove it, or name another with --output-dir DIR"
            if wanted is None
            else f"name one that is empty, absent, or of an earlier run (has a {RECORD})",
        )
    parent = next(folder for folder in target.parents if exists(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SpecError(
            f"{target} cannot be made: {parent} is not writable",
            code="output-not-writable",
            field="--output-dir",
            hint="name a place that you may write to with --output-dir DIR",
        )
    return target


def _may_be_replaced(directory: Path) -> bool:
    return directory.is_dir() and ((directory / RECORD).is_file() or not any(directory.iterdir()))


def _refuse_inputs(error: dict[str, Any]) -> None:
    """Raises SpecError where the ranks found what they read to be unfit: the inputs are at fault, not the run."""
    from launch.attempt import ExitCode

    if error.get("exit_code") in (ExitCode.DATA_ERROR, ExitCode.USER_ERROR):
        raise SpecError(error["message"], code=error["code"], field=error.get("field"), hint=error.get("hint"))


def _show(compared: Comparison, reasons: list[str], target: Path) -> None:
    if compared.same:
        out.print(f"[green]bitwise the same[/green]: {compared.tensors} tensors")
    else:
        unequal = len(compared.different) + len(compared.only_then) + len(compared.only_now)
        far = f", by at most {compared.largest:.3g}" if compared.largest is not None else ""
        out.print(f"[red]not the same[/red]: {unequal} of {compared.tensors} tensors differ{far}")
        lines = [
            f"{one.name}  {'no number' if one.largest is None else f'{one.largest:.3g}'}" for one in compared.different
        ]
        lines += [f"{name}  in the original alone" for name in compared.only_then]
        lines += [f"{name}  in the new one alone" for name in compared.only_now]
        for line in _first(lines):
            out.print(f"  {line}", markup=False)
        out.print("likely reasons")
        for reason in reasons:
            out.print(f"  {reason}", markup=False)
    if compared.metrics:
        out.print("metrics differ")
        for line in _first([f"{one.name}  {one.then} then, {one.now} now" for one in compared.metrics]):
            out.print(f"  {line}", markup=False)
    out.print(f"model      {target}", markup=False)


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
