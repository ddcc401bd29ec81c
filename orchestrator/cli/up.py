"""`tuneyard up` and `down`: a yard on this machine."""

from __future__ import annotations

import enum

import typer

from orchestrator.cli.output import Format, Output, err, out, print_json


class ExecutorName(enum.StrEnum):
    RAY = "ray"
    LOCAL = "local"


def up(
    nodes: int = typer.Option(1, "--nodes", min=1, max=64, help="Ray nodes (raylets) to start on this machine."),
    executor: ExecutorName = typer.Option(ExecutorName.RAY, help="ray, or local: processes without Ray."),
    output: Output = Format.TEXT,
) -> None:
    """Start a yard on this machine: Ray, the controller and its API.

    What already runs is kept, so this also starts again what has died: nodes, Ray's head, the controller.
    """
    from orchestrator.settings import Settings
    from orchestrator.yard.home import up as start
    from orchestrator.yard.record import as_json

    settings = Settings()
    with err.status("starting the yard"):
        record = start(settings, nodes, executor.value)
    if output == Format.JSON:
        print_json(as_json(record))
        return
    out.print(f"the yard is up: API at {record.url}, home {settings.root}")
    out.print("next: `tuneyard submit FILE --wait`, `tuneyard ls`, `tuneyard down`")


def down(
    force: bool = typer.Option(False, "--force", help="Even if jobs are live; they start again with the next `up`."),
    output: Output = Format.TEXT,
) -> None:
    """End the yard's processes. The database, logs, checkpoints and models stay."""
    from orchestrator.settings import Settings
    from orchestrator.yard.home import down as end

    settings = Settings()
    record = end(settings, force=force)
    if output == Format.JSON:
        print_json({"ended": record is not None})
    else:
        out.print(f"the yard of {settings.root} is down" if record else f"there is no yard in {settings.root}")
