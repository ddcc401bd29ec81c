"""`tuneyard cancel`."""

from __future__ import annotations

import typer

from orchestrator.cli.output import Format, Output, job_json, out, print_json


def cancel(
    job: str = typer.Argument(help="The job's id."),
    wait: bool = typer.Option(False, "--wait", help="Until no process of it is left."),
    output: Output = Format.TEXT,
) -> None:
    """Stop a job: its ranks end at their next step boundary, and are ended if they take too long."""
    from orchestrator.cli.yard import client

    with client() as yard:
        view = yard.cancel(job)
        if wait:
            *_, view = yard.follow(job)
    if output == Format.JSON:
        print_json(job_json(view))
    else:
        out.print(f"{view.id} {view.state}" if view.state.final else f"{view.id} is being cancelled")
