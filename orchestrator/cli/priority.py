"""`tuneyard priority`."""

from __future__ import annotations

import re

import typer

from orchestrator.cli.output import Format, Output, job_json, out, print_json


def priority(
    job: str = typer.Argument(help="The job's id."),
    value: str = typer.Argument(metavar="low|normal|high|N", help="As in a job file; higher starts first."),
    output: Output = Format.TEXT,
) -> None:
    """Move a job that has not ended forward or back in the queue."""
    from orchestrator.cli.yard import client

    wanted = int(value) if re.fullmatch(r"[+-]?\d{1,9}", value) else value
    with client(job) as yard:
        view = yard.set_priority(job, wanted)
    if output == Format.JSON:
        print_json(job_json(view) | {"priority": view.priority})
    else:
        out.print(f"{view.id} has priority {view.priority}")
