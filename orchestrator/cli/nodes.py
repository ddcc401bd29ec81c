"""`tuneyard nodes`."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from orchestrator.cli.output import Format, Output, out, print_json


def nodes(output: Output = Format.TEXT) -> None:
    """List the yard's nodes, what is free on them, and which of them get no new attempts."""
    from orchestrator.cli.yard import client

    with client() as yard:
        views = yard.nodes()
    if output == Format.JSON:
        print_json([view.model_dump(mode="json") for view in views])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("NODE", "ADDRESS", "CORES", "GPUS", "SLOTS", "FREE", "STANDBYS", "MARK"):
        table.add_column(heading)
    for view in views:
        gpus = f"{len(view.gpus)} × {view.gpus[0].type}" if view.gpus else "-"
        slots = len(view.gpus) or view.cpu_slots
        warm = f"{view.standbys.count} ({view.standbys.bytes >> 20} MiB)" if view.standbys.count else "-"
        mark = "-" if view.mark is None else f"[yellow]{view.mark}[/yellow]"
        if view.mark_reason:
            mark += f": {escape(view.mark_reason)}"
        table.add_row(view.name, view.address, str(view.cores), gpus, str(slots), str(view.free), warm, mark)
    out.print(table)
