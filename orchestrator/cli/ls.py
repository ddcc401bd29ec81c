"""`tuneyard ls`."""

from __future__ import annotations

import typer
from rich.table import Table

from orchestrator.cli.output import Format, Output, age, out, print_json, state_text


def ls(
    all_: bool = typer.Option(False, "-a", "--all", help="Ended jobs too, not only live ones and the last ten."),
    output: Output = Format.TEXT,
) -> None:
    """List jobs: state, progress, and why what waits is waiting."""
    from orchestrator.cli.yard import client

    with client() as yard:
        views = yard.jobs(limit=10_000)
    if output == Format.JSON:
        print_json([view.model_dump(mode="json", exclude={"spec", "plan"}) for view in views])
        return
    if not all_:
        recent = {view.id for view in [view for view in views if view.state.final][-10:]}
        views = [view for view in views if not view.state.final or view.id in recent]
    table = Table(box=None, pad_edge=False)
    for heading in ("JOB", "STATE", "QUEUE", "ATTEMPT", "AGE", "WHY"):
        table.add_column(heading, overflow="fold")
    for view in views:
        table.add_row(
            view.id, state_text(view.state), view.queue, str(view.attempts or "-"),
            age(view.submitted_at, view.finished_at), view.reason.sentence,
        )  # fmt: skip
    out.print(table)
