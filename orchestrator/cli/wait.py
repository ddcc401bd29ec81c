"""`tuneyard wait`."""

from __future__ import annotations

import typer

from orchestrator.cli.output import Format, Output, job_json, print_json
from orchestrator.cli.progress import follow, summary
from orchestrator.cli.status import of_job


def wait(
    job: str = typer.Argument(help="The job's id."),
    timeout: float | None = typer.Option(None, "--timeout", min=0, help="Give up after so many seconds."),
    output: Output = Format.TEXT,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="No progress on stderr."),
) -> None:
    """Follow a job to its end and print what came of it; exit 1 if it failed."""
    from orchestrator.cli.yard import client

    with client() as yard:
        view = follow(yard.follow(job, timeout), quiet=quiet)
    if output == Format.JSON:
        print_json(job_json(view))
    else:
        summary(view)
    raise typer.Exit(of_job(view.state))
