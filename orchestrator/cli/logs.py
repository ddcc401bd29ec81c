"""`tuneyard logs`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from orchestrator.client import Client
    from orchestrator.outside.protocol import Outside

POLL_S, OUTSIDE_POLL_S = 0.5, 3.0


def logs(
    job: str = typer.Argument(help="The job's id."),
    follow: bool = typer.Option(False, "-f", "--follow", help="Go on until the job has ended."),
    rank: int | None = typer.Option(None, "--rank", min=0, help="A rank's own log (default: rank 0's)."),
    attempt: int | None = typer.Option(None, "--attempt", min=1, help="An earlier attempt's (default: the newest)."),
    launcher: bool = typer.Option(False, "--launcher", help="What the launcher printed, before and around the ranks."),
) -> None:
    """Print a rank's log."""
    from orchestrator.cli.yard import holder
    from orchestrator.client import Client

    wanted = None if launcher else (rank or 0)
    with holder(job) as place:
        if not follow:
            _print(place, job, wanted, attempt, 0)
            return
        pause = POLL_S if isinstance(place, Client) else OUTSIDE_POLL_S
        number, offset = attempt, 0
        while True:
            view = place.job(job)
            newest = attempt or view.attempts
            if newest and newest != number:
                number, offset = newest, 0
            if number:
                offset = _print(place, job, wanted, number, offset)
            if view.state.final:
                return
            time.sleep(pause)


def _print(place: Client | Outside, job: str, rank: int | None, attempt: int | None, offset: int) -> int:
    """Print the log from `offset` to its end, and return where that is."""
    while True:
        data, offset = place.log(job, rank=rank, attempt=attempt, offset=offset)
        if not data:
            return offset
        sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()
