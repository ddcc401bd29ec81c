"""`tuneyard pause` and `tuneyard resume`."""

from __future__ import annotations

import typer

from orchestrator.cli.output import Format, Output, job_json, out, print_json
from orchestrator.cli.status import of_job
from orchestrator.job.lifecycle import JobState


def pause(
    job: str = typer.Argument(help="The job's id."),
    wait: bool = typer.Option(False, "--wait", help="Until it has saved and no process of it is left."),
    output: Output = Format.TEXT,
) -> None:
    """Stop a job so that it can go on: it saves a checkpoint, ends, and waits for `tuneyard resume`.

    A job that is still queued leaves the queue. Pausing uses up none of the job's restarts.
    """
    from orchestrator.cli.yard import client

    with client(job) as yard:
        view = yard.pause(job)
        if wait:
            *_, view = yard.follow(job, until=(JobState.PAUSED,))
    if output == Format.JSON:
        print_json(job_json(view))
    elif view.state == JobState.PAUSED or view.state.final:
        out.print(f"{view.id} {view.state}: {view.reason.sentence}")
    else:
        out.print(f"{view.id} is being paused")
    if view.state.final:  # it was faster
        raise typer.Exit(of_job(view.state))


def resume(job: str = typer.Argument(help="The job's id."), output: Output = Format.TEXT) -> None:
    """Put a paused job back into the queue; it goes on from its newest checkpoint."""
    from orchestrator.cli.yard import client

    with client(job) as yard:
        view = yard.resume(job)
    if output == Format.JSON:
        print_json(job_json(view))
    else:
        out.print(f"{view.id} goes back to the queue")
