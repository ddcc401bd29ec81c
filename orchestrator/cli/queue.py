"""`tuneyard queue` and `tuneyard why`."""

from __future__ import annotations

import time

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.output import Format, Output, out, print_json
from orchestrator.schedule.explain import duration
from orchestrator.views import EtaView, ReservationView


def queue(output: Output = Format.TEXT) -> None:
    """The jobs that wait, in the order in which they come, when each is expected to start, and the queues' shares."""
    from orchestrator.cli.yard import client

    with client() as yard:
        look = yard.queue()
    if output == Format.JSON:
        print_json(look.model_dump(mode="json"))
        return
    if not look.turns:
        out.print("nothing waits")
    else:
        table = Table(box=None, pad_edge=False)
        for heading in ("#", "JOB", "QUEUE", "PRIORITY", "PROCESSES", "LEVEL", "WAITED", "STARTS", "WHY"):
            table.add_column(heading)
        for turn in look.turns:
            low, high = turn.processes
            table.add_row(
                str(turn.position),
                turn.job,
                turn.queue,
                str(turn.priority),
                str(low) if low == high else f"{low}..{high}",
                str(turn.level),
                duration(turn.waited_s),
                starts(turn.eta, look.time),
                escape(turn.reason.sentence),
            )
        out.print(table)
    if look.reservation is not None:
        out.print(f"\n{reserved(look.reservation, look.time)}")
    shares = Table(box=None, pad_edge=False)
    for heading in ("QUEUE", "WEIGHT", "GUARANTEED", "CEILING", "HELD", "RUNNING", "WAITING"):
        shares.add_column(heading)
    for one in look.queues:
        guaranteed, ceiling = ("-" if number is None else str(number) for number in (one.guaranteed, one.ceiling))
        shares.add_row(
            one.name, f"{one.weight:g}", guaranteed, ceiling, str(one.held), str(one.running), str(one.waiting)
        )
    if look.queues:
        out.print()
        out.print(shares)


def why(job: str = typer.Argument(help="The job's id."), output: Output = Format.TEXT) -> None:
    """Why a job is where it is, what would let it start, and when that is expected."""
    from orchestrator.cli.yard import client

    with client(job) as yard:
        view = yard.why(job)
    if output == Format.JSON:
        print_json(view.model_dump(mode="json"))
        return
    out.print(f"{view.job} is {view.state}: {escape(view.reason.sentence)} ({view.reason.code})")
    if view.reason.remedy:
        out.print(f"  {escape(view.reason.remedy)}")
    if view.turn is None:
        return
    now = time.time()
    out.print(f"  expected to start: {starts(view.turn.eta, now)}")
    before = f", after {', '.join(view.ahead)}" + (", …" if view.jobs_ahead > len(view.ahead) else "")
    out.print(f"  place in the queue: {view.turn.position}{before if view.ahead else ''}")
    for sentence in view.story:
        out.print(f"  {escape(sentence)}")
    if view.reservation is not None:
        out.print(f"  {reserved(view.reservation, now)}")


def starts(eta: EtaView, now: float) -> str:
    """`in 12 min (5 min to 1.2 h)`, or that nobody knows."""
    if eta.expected is None:
        return "nobody knows: too few jobs have ended here, and none has a max_duration"
    middle = _until(eta.expected, now)
    low = "now" if eta.low is None else _until(eta.low, now)
    high = "later than is in sight" if eta.high is None else _until(eta.high, now)
    return middle if low == middle == high else f"{middle} ({low} to {high})"


def _until(at: float, now: float) -> str:
    return "now" if at - now < 1 else f"in {duration(at - now)}"


def reserved(reservation: ReservationView, now: float) -> str:
    """Whom slots are kept for."""
    where = ", ".join(f"{ranks} on {node}" for node, ranks in reservation.slots.items())
    when = "when running jobs end" if reservation.at is None else f"{_until(reservation.at, now)} at the latest"
    return f"reserved for {reservation.job}: {where}, {when}"
