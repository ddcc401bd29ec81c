"""`tuneyard render`."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.document import read_document
from orchestrator.cli.files import JobFile, Overrides, read_order, told_where
from orchestrator.outside.protocol import System

With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="KEY=VALUE", help="For the system alone, such as partition=gpu. Repeatable."),
]


def render(
    system: Annotated[System, typer.Argument(metavar="SYSTEM", help=", ".join(System))],
    file: JobFile,
    set_: Overrides = None,
    with_: With = None,
) -> None:
    """Print what `submit --to SYSTEM` would hand over; submit it by hand if you like."""
    from orchestrator.cli.yard import outside

    document = read_document(file, set_ or ())
    with outside(system) as place, told_where(document):
        typer.echo(place.render(read_order(file, document, with_ or ())), nl=False)
