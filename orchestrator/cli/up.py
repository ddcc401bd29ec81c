"""`tuneyard up` and `down`: a yard on this machine."""

from __future__ import annotations

import enum
import shlex
import signal

import typer

from orchestrator.cli.output import Format, Output, err, out, print_json
from orchestrator.errors import SpecError


class ExecutorName(enum.StrEnum):
    RAY = "ray"
    LOCAL = "local"


def up(
    nodes: int = typer.Option(1, "--nodes", min=1, max=64, help="Ray nodes (raylets) to start on this machine."),
    executor: ExecutorName = typer.Option(ExecutorName.RAY, help="ray, or local: processes without Ray."),
    hosts: list[str] | None = typer.Option(
        None, "--hosts", metavar="HOST,...", help="Machines that join by ssh; TUNEYARD_HOST is this one's address."
    ),
    ssh: str = typer.Option("ssh -o BatchMode=yes", "--ssh", help="The command that reaches them."),
    remote: str = typer.Option("tuneyard", "--remote-command", help="What `tuneyard` is on them, such as its path."),
    new_controller: bool = typer.Option(
        False, "--new-controller", help="Of the code that is installed now, in place of the one that runs; jobs go on."
    ),
    in_slurm: bool = typer.Option(
        False, "--in-slurm", help="On all nodes of the Slurm allocation that this is said in."
    ),
    block: bool = typer.Option(
        False, "--block", help="Stay, and start again what dies, as a service does. Ended, it leaves the yard up."
    ),
    output: Output = Format.TEXT,
) -> None:
    """Start a yard on this machine: Ray, the controller and its API.

    What already runs is kept, so this also starts again what has died: nodes, Ray's head, the controller, machines of
    --hosts. `tuneyard node join` is the same by hand.
    """
    from orchestrator.settings import Settings
    from orchestrator.yard.home import keep_up
    from orchestrator.yard.home import up as start
    from orchestrator.yard.record import as_json
    from orchestrator.yard.remote import Remote

    settings = Settings()
    if in_slurm:
        if hosts or executor is not ExecutorName.RAY or nodes != 1 or new_controller:
            raise SpecError(
                "--in-slurm takes the allocation's nodes, as they are",
                code="usage",
                field="in-slurm",
                hint="leave --nodes, --hosts, --executor and --new-controller out",
            )
        from orchestrator.yard.allocation import settings_here, up_in_slurm

        settings = settings_here(settings)
    names = [name for group in hosts or () for name in group.split(",") if name]
    remotes = [Remote(host=name, ssh=tuple(shlex.split(ssh)), command=tuple(shlex.split(remote))) for name in names]
    with err.status("starting the yard"):
        if in_slurm:
            record = up_in_slurm(settings)
        else:
            record = start(settings, nodes, executor.value, remotes, new_controller=new_controller)
    if output == Format.JSON:
        print_json(as_json(record))
    else:
        out.print(f"the yard is up: API at {record.url}, home {settings.root}")
        out.print("next: `tuneyard submit FILE --wait`, `tuneyard ls`, `tuneyard down`")
    if block:
        ended = False

        def end(*_: object) -> None:
            nonlocal ended
            ended = True

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        keep_up(settings, record, lambda: ended)


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
