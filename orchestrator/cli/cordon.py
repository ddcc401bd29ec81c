"""`tuneyard cordon`, `tuneyard drain` and `tuneyard uncordon`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from orchestrator.cli.output import Format, Output, out, print_json

Node = Annotated[str, typer.Argument(metavar="NODE", help="The node's name, as `tuneyard nodes` shows it.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; shown to all who ask.")]


def cordon(node: Node, reason: Reason = None, output: Output = Format.TEXT) -> None:
    """Let a node have no new attempts; those on it go on. It stays so if the node restarts."""
    _mark("cordon", node, reason, output)


def drain(node: Node, reason: Reason = None, output: Output = Format.TEXT) -> None:
    """Empty a node: it gets no new attempts, and those on it save and go on elsewhere."""
    _mark("drain", node, reason, output)


def uncordon(node: Node) -> None:
    """Let a node that was cordoned or drained have attempts again."""
    from orchestrator.cli.yard import client

    with client() as yard:
        yard.uncordon(node)
    out.print(f"node {node} takes attempts again")


def _mark(how: Literal["cordon", "drain"], node: str, reason: str | None, output: Format) -> None:
    from orchestrator.cli.yard import client

    with client() as yard:
        view = yard.mark_node(node, how, reason)
    if output == Format.JSON:
        print_json(view.model_dump(mode="json"))
    else:
        out.print(f"node {view.name} is {view.mark}")
