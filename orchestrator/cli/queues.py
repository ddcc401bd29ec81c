"""`tuneyard queues`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.output import Format, Output, out, print_json
from orchestrator.errors import SpecError
from orchestrator.views import QueueView

NONE = "none"

app = typer.Typer(
    help="List queues: their shares, their jobs and what those hold.", invoke_without_command=True,
    rich_markup_mode="markdown",
)  # fmt: skip

Name = Annotated[str, typer.Argument(metavar="NAME", help="The queue, as job files name it.")]


@app.callback()
def queues(context: typer.Context, output: Output = Format.TEXT) -> None:
    if context.invoked_subcommand is not None:
        return
    from orchestrator.cli.yard import client

    with client() as yard:
        views = yard.queues()
    if output == Format.JSON:
        print_json([view.model_dump(mode="json") for view in views])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("QUEUE", "WEIGHT", "GUARANTEED", "CEILING", "LENDABLE", "RUNNING", "WAITING", "PROCESSES"):
        table.add_column(heading, overflow="fold")
    for view in views:
        table.add_row(*_cells(view))
    out.print(table)


@app.command("set")
def set_(
    name: Name,
    weight: float | None = typer.Option(None, "--weight", help="Share of what queues compete for, beside the others'."),
    guaranteed: str | None = typer.Option(
        None, "--guaranteed", metavar="N|none", help="Processes (GPUs, or CPU slots) that are its own."
    ),
    ceiling: str | None = typer.Option(
        None, "--ceiling", metavar="N|none", help="Most processes that it may hold, with what it borrows."
    ),
    lendable: bool | None = typer.Option(
        None, "--lendable/--no-lendable", help="Whether others may have what it leaves idle of its own."
    ),
    output: Output = Format.TEXT,
) -> None:
    """Change the share of a queue; what is not named stays as it is."""
    from orchestrator.cli.yard import client

    changes: dict[str, Any] = {"weight": weight, "lendable": lendable}
    changes = {key: value for key, value in changes.items() if value is not None}
    changes |= {
        key: _number(key, text) for key, text in (("guaranteed", guaranteed), ("ceiling", ceiling)) if text is not None
    }
    if not changes:
        raise SpecError(
            "nothing is to be changed",
            code="nothing-to-do",
            hint="give --weight, --guaranteed, --ceiling or --lendable",
        )
    with client() as yard:
        view = yard.set_queue(name, changes)
    if output == Format.JSON:
        print_json(view.model_dump(mode="json"))
    else:
        headings = ("weight", "guaranteed", "ceiling", "lendable")
        told = ", ".join(f"{heading} {cell}" for heading, cell in zip(headings, _cells(view)[1:], strict=False))
        out.print(f"queue {view.name}: {told}")


@app.command("rm")
def rm(name: Name) -> None:
    """Let a queue have the defaults again. Its jobs stay."""
    from orchestrator.cli.yard import client

    with client() as yard:
        yard.delete_queue(name)
    out.print(f"queue {name} has the defaults")


def _number(option: str, text: str) -> int | None:
    if text == NONE:
        return None
    try:
        return int(text)
    except ValueError:
        raise SpecError(
            f"--{option} {text} is no number of processes",
            code="wrong-type",
            field=option,
            hint=f"write a whole number, or `{NONE}`",
        ) from None


def _cells(view: QueueView) -> list[str]:
    return [
        view.name, f"{view.weight:g}", _or_dash(view.guaranteed), _or_dash(view.ceiling),
        "yes" if view.lendable else "no", str(view.running), str(view.waiting), str(view.held),
    ]  # fmt: skip


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)
