"""`tuneyard cancel`."""

from __future__ import annotations

import typer

from orchestrator.cli.output import Format, Output, job_json, out, print_json


def cancel(
    job: str = typer.Argument(help="The job's id; with a system outside also that of an array."),
    wait: bool = typer.Option(False, "--wait", help="Until no process of it is left."),
    output: Output = Format.TEXT,
) -> None:
    """Stop a job: its ranks end at their next step boundary, and are ended if they take too long."""
    from orchestrator.cli.yard import holder

    with holder(job) as place:
        asked = place.cancel(job)
        views = asked if isinstance(asked, list) else [asked]
        if wait:
            views = [[*place.follow(view.id)][-1] for view in views]
    if output == Format.JSON:
        found = [job_json(view) for view in views]
        print_json(found[0] if len(found) == 1 else {"array": job, "jobs": found})
        return
    for view in views:
        out.print(f"{view.id} {view.state}" if view.state.final else f"{view.id} is being cancelled")
