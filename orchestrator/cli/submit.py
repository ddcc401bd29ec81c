"""`tuneyard submit`."""

from __future__ import annotations

import typer

from launch.git import git_state
from orchestrator.cli.files import JobFile, Overrides, read_job, read_sizing, told_where
from orchestrator.cli.output import Format, Output, job_json, out, print_json
from orchestrator.cli.progress import follow, summary
from orchestrator.cli.status import of_job


def submit(
    file: JobFile,
    set_: Overrides = None,
    wait: bool = typer.Option(False, "--wait", help="Follow the job to its end; exit 1 if it fails."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show plan and placement; store nothing."),
    output: Output = Format.TEXT,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="With --wait: no progress on stderr."),
) -> None:
    """Queue a job file on the yard.

    The file, and all that it names, is checked here first: a job that cannot run is refused and nothing is stored.
    """
    job, document = read_job(file, set_)
    sizing = read_sizing(job)
    from orchestrator.cli.yard import client

    with client() as yard, told_where(document):
        if dry_run:
            answer = yard.dry_run(job, sizing)
            if output == Format.JSON:
                print_json(answer.model_dump(mode="json"))
                return
            plan = answer.plan
            out.print(f"plan       {plan.engine} on {plan.world_size} × {plan.device}, {plan.precision}")
            out.print(f"offload    {plan.offload}" + (f" to {plan.offload_path}" if plan.offload_path else ""))
            out.print(f"micro      {plan.micro_batch_size} rows × {plan.gradient_accumulation_steps} accumulated")
            if answer.placement is not None:
                shares = ", ".join(f"{share.processes} on {share.node[:12]}" for share in answer.placement.shares)
                out.print(f"placement  {shares}, now")
            else:
                out.print(f"placement  none yet: {answer.waits}")
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
