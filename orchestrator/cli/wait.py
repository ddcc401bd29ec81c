"""`tuneyard wait`."""

from __future__ import annotations

import typer

from orchestrator.cli.output import Format, Output, job_json, print_json
from orchestrator.cli.progress import follow, follow_array, summary
from orchestrator.cli.status import of_job, of_jobs


def wait(
    job: str = typer.Argument(help="The job's id."),
    timeout: float | None = typer.Option(None, "--timeout", min=0, help="Give up after so many seconds."),
    output: Output = Format.TEXT,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="No progress on stderr."),
) -> None:
    """Follow a job to its end and print what came of it; exit 1 if it failed."""
    from orchestrator.cli.yard import holder
    from orchestrator.outside.protocol import Outside

    with holder(job) as place:
        if isinstance(place, Outside) and place.is_array(job):
            views = follow_array(place.follow_array(job, timeout), quiet=quiet)
            if output == Format.JSON:
                print_json({"array": job, "jobs": [job_json(view) for view in views]})
            else:
                for view in views:
                    summary(view)
            raise typer.Exit(of_jobs(view.state for view in views))
        view = follow(place.follow(job, timeout), quiet=quiet)
    if output == Format.JSON:
        print_json(job_json(view))
    else:
        summary(view)
    raise typer.Exit(of_job(view.state))
