"""`tuneyard ls`."""

from __future__ import annotations

from collections.abc import Iterable

import typer
from rich.table import Table

from orchestrator.cli.output import Format, Output, age, out, print_json, state_text
from orchestrator.outside.protocol import System
from orchestrator.views import JobView


def ls(
    on: System | None = typer.Option(None, "--on", help="Jobs that were handed over to this system, not the yard's."),
    all_: bool = typer.Option(False, "-a", "--all", help="Ended jobs too, not only live ones and the last ten."),
    output: Output = Format.TEXT,
) -> None:
    """List jobs: state, progress, and why what waits is waiting."""
    from orchestrator.cli.yard import client, outside

    with client() if on is None else outside(on) as place:
        views = place.jobs(limit=10_000)
    if output == Format.JSON:
        print_json([view.model_dump(mode="json", exclude={"spec", "plan"}) for view in views])
        return
    if not all_:
        recent = {view.id for view in [view for view in views if view.state.final][-10:]}
        views = [view for view in views if not view.state.final or view.id in recent]
    out.print(table_of(views))


def table_of(views: Iterable[JobView]) -> Table:
    """A row a job."""
    table = Table(box=None, pad_edge=False)
    for heading in ("JOB", "STATE", "QUEUE", "ATTEMPT", "AGE", "WHY"):
        table.add_column(heading, overflow="fold")
    for view in views:
        table.add_row(
            view.id, state_text(view.state), view.queue, str(view.attempts or "-"),
            age(view.submitted_at, view.finished_at), view.reason.sentence,
        )  # fmt: skip
    return table
