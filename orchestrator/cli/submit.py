"""`tuneyard submit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from launch.document import Document, read_document
from launch.git import git_state
from orchestrator.cli.files import (
    JobFile,
    Overrides,
    checked_job,
    read_array,
    read_order,
    read_sizing,
    read_sizings,
    told_where,
)
from orchestrator.cli.output import Format, Output, job_json, out, print_json
from orchestrator.cli.progress import follow, follow_array, summary
from orchestrator.cli.render import With
from orchestrator.cli.status import of_job, of_jobs
from orchestrator.errors import SpecError
from orchestrator.job.array import Element, is_array
from orchestrator.outside.protocol import System
from orchestrator.views import DryRun


def submit(
    file: JobFile,
    set_: Overrides = None,
    wait: bool = typer.Option(False, "--wait", help="Follow the job, or all of an array, to the end; 1 if one fails."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show plan and placement; store nothing."),
    to: System | None = typer.Option(None, "--to", help="Hand it over to this system instead of a yard."),
    with_: With = None,
    output: Output = Format.TEXT,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="With --wait: no progress on stderr."),
) -> None:
    """Queue a job file on the yard, or on a system that queues jobs itself; one with an `array` makes several jobs.

    The file, and all that it names, is checked here first: a job that cannot run is refused and nothing is stored.
    """
    document = read_document(file, set_ or ())
    if to is not None:
        _hand_over(to, file, document, with_ or (), wait=wait, dry_run=dry_run, output=output, quiet=quiet)
        return
    if with_:
        raise SpecError(
            "`--with` is for systems outside, and the job goes to a yard",
            code="usage",
            field="with",
            hint="say which system: --to slurm; what the job itself says is changed by --set",
        )
    if is_array(document):
        _submit_array(file, document, wait=wait, dry_run=dry_run, output=output, quiet=quiet)
        return
    job = checked_job(document)
    sizing = read_sizing(job)
    from orchestrator.cli.yard import client

    with client() as yard, told_where(document):
        if dry_run:
            answer = yard.dry_run(job, sizing)
            if output == Format.JSON:
                print_json(answer.model_dump(mode="json"))
            else:
                _tell(answer)
            return
        view = yard.submit(job, git_state(file), sizing)
        if not wait:
            if output == Format.JSON:
                print_json(job_json(view))
            else:
                out.print(f"{view.id} {view.state}")
            return
        view = follow(yard.follow(view.id), quiet=quiet)
    if output == Format.JSON:
        print_json(job_json(view))
    else:
        summary(view)
    raise typer.Exit(of_job(view.state))


def _hand_over(
    to: System,
    file: Path,
    document: Document,
    options: Sequence[str],
    *,
    wait: bool,
    dry_run: bool,
    output: Format,
    quiet: bool,
) -> None:
    from orchestrator.cli.yard import outside

    with outside(to) as place, told_where(document):
        order = read_order(file, document, options)
        if dry_run:
            text = place.render(order)
            if output == Format.JSON:
                print_json({"system": to.value, "text": text})
            else:
                typer.echo(text, nl=False)
            return
        views = place.submit(order)
        array = views[0].array_id
        if wait and array is not None:
            views = follow_array(place.follow_array(array), quiet=quiet)
        elif wait:
            views = [follow(place.follow(views[0].id), quiet=quiet)]
    if output == Format.JSON:
        jobs = [job_json(view) for view in views]
        print_json(jobs[0] if array is None else {"array": array, "jobs": jobs})
    else:
        for view in views:
            if wait:
                summary(view)
            else:
                out.print(f"{view.id} {view.state}", markup=False)
    if wait:
        raise typer.Exit(of_jobs(view.state for view in views))


def _submit_array(file: Path, document: Document, *, wait: bool, dry_run: bool, output: Format, quiet: bool) -> None:
    elements = read_array(document)
    sizings = read_sizings(elements)
    from orchestrator.cli.yard import client

    with client() as yard, told_where(document):
        if dry_run:
            answers = [yard.dry_run(one.job, sizing) for one, sizing in zip(elements, sizings, strict=True)]
            if output == Format.JSON:
                print_json([answer.model_dump(mode="json") for answer in answers])
                return
            for one, answer in zip(elements, answers, strict=True):
                out.print(f"{one.job.name}{_values(one)}", markup=False)
                _tell(answer)
            return
        views = yard.submit_array([one.job for one in elements], git_state(file), sizings)
        array = views[0].array_id
        assert array is not None
        made = {view.id: one for view, one in zip(views, elements, strict=True)}
        if wait:
            views = [view for view in follow_array(yard.follow_array(array), quiet=quiet) if view.id in made]
    if output == Format.JSON:
        jobs = [job_json(view) | {"values": made[view.id].values} for view in views]
        print_json({"array": array, "jobs": jobs})
    else:
        for view in views:
            if wait:
                summary(view)
            else:
                out.print(f"{view.id} {view.state}{_values(made[view.id])}", markup=False)
    if wait:
        raise typer.Exit(of_jobs(view.state for view in views))


def _values(element: Element) -> str:
    """What an element has of the file's lists, behind its name."""
    return "".join(f"  {key}={value}" for key, value in element.values.items())


def _tell(answer: DryRun) -> None:
    plan = answer.plan
    out.print(f"plan       {plan.engine} on {plan.world_size} × {plan.device}, {plan.precision}")
    out.print(f"offload    {plan.offload}" + (f" to {plan.offload_path}" if plan.offload_path else ""))
    out.print(f"micro      {plan.micro_batch_size} rows × {plan.gradient_accumulation_steps} accumulated")
    if answer.placement is not None:
        shares = ", ".join(f"{share.processes} on {share.node[:12]}" for share in answer.placement.shares)
        out.print(f"placement  {shares}, now")
    else:
        out.print(f"placement  none yet: {answer.waits}")
