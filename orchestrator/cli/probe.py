"""`tuneyard probe`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.output import Format, Output, out, print_json

Nodes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NODE]...", help="Names as `tuneyard nodes` shows them; all nodes if none is given."),
]


def probe(nodes: Nodes = None, output: Output = Format.TEXT) -> None:
    """Find out whether nodes compute, remember, store and send what they should. Jobs on them go on.

    Each is probed by itself (matrix products, memory, disk, what GPUs count of errors), then with a neighbour
    (all-reduce). Exit 1 if one fails.
    """
    from orchestrator.cli.yard import client

    with client() as yard:
        views = yard.probe(nodes or ())
    if output == Format.JSON:
        print_json([view.model_dump(mode="json") for view in views])
    else:
        table = Table(box=None, pad_edge=False)
        for heading in ("NODE", "CHECK", "", "FOUND", "SPEED"):
            table.add_column(heading)
        for view in views:
            for check in view.checks:
                mark = "[green]ok[/green]" if check.ok else "[red]fail[/red]"
                speed = "-" if check.value is None else f"{check.value:.3g} {check.unit}"
                table.add_row(view.name, check.name, mark, escape(check.told), speed)
        out.print(table)
        bad = [view.name for view in views if not view.ok]
        if bad:
            out.print(f"→ [red]{', '.join(bad)}[/red]: `tuneyard drain NODE` moves its jobs elsewhere")
    raise typer.Exit(0 if all(view.ok for view in views) else 1)
