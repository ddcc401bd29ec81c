"""`tuneyard goodput`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import typer
from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from launch.errors import Refused
from orchestrator.cli.output import Format, Output, duration, out, print_json, state_text
from orchestrator.errors import SpecError
from orchestrator.job.fields import Duration
from orchestrator.views import AccountView, ClusterAccount, EnergyView, StintView, UseView

HOUR_S = 3600.0
BINS = 240
"""Of a picture of the cluster."""
NONE = "-"
CENTS = 0.1
"""Of less money, two digits are written wherever they stand."""


def goodput(
    job: str | None = typer.Argument(None, help="A job's id; without one, the whole cluster by queue."),
    since: str = typer.Option("24h", metavar="DURATION", help="Of the cluster: the last 90s, 30m, 24h or 7d."),
    plot: Path | None = typer.Option(None, "--plot", metavar="F.png", help="Write a timeline."),
    output: Output = Format.TEXT,
) -> None:
    """Where time went: queued, starting, training, saving, lost, recovering, idle; hours, and what they cost."""
    from orchestrator.cli.yard import client

    last_s = _duration(since)
    if plot is not None:
        from orchestrator.cli import timeline

        timeline.check_plot(plot)
    with client(job) as yard:
        view = yard.goodput(last_s, BINS if plot is not None else 0) if job is None else yard.goodput_of(job)
    if plot is not None:
        timeline.draw(plot, view)
    if output == Format.JSON:
        print_json(view.model_dump(mode="json"))
    elif isinstance(view, AccountView):
        _job(view)
    else:
        _cluster(view)


def _duration(text: str) -> float:
    try:
        seconds: float = TypeAdapter(Duration).validate_python(text)
    except (Refused, ValidationError) as problem:
        raise SpecError(
            f"`{text}` is not a duration", code="bad-duration", field="since", hint="write 90s, 30m, 24h or 7d"
        ) from problem
    return seconds


def _job(view: AccountView) -> None:
    lasted = f"{duration(view.wall_s)} since its submission" if not view.state.final else duration(view.wall_s)
    out.print(f"[bold]{view.job}[/bold] {state_text(view.state)}, queue {view.queue}: {lasted}")
    out.print(_categories(view.seconds, view.slot_seconds))
    if view.goodput is not None:
        out.print(f"goodput {percent(view.goodput)}: training, of the time since its first start")
    _totals(view, view.currency)
    if not view.attempts:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("ATTEMPT", "SLOTS", "LASTED", "TRAINING", "LOST", "STEPS", "ENDED"):
        table.add_column(heading, justify="left" if heading in ("SLOTS", "STEPS", "ENDED") else "right")
    for one in view.attempts:
        slots = ", ".join(f"{processes} {kind}" for kind, processes in one.kinds.items())
        seconds = (one.until - one.since, one.seconds["training"], one.seconds["lost"])
        ended = NONE if one.ended is None else escape(one.ended.splitlines()[0])
        table.add_row(str(one.number), slots, *(f"{value:.1f} s" for value in seconds), _steps(one), ended)
    out.print(table)


def _steps(one: StintView) -> str:
    """From which step to which an attempt came, and how far that has stayed."""
    if one.from_step is None:
        return NONE
    kept = "" if one.kept_step is None else f", kept {max(one.kept_step, one.from_step)}"
    return f"{one.from_step}..{one.step}{kept}"


def _cluster(view: ClusterAccount) -> None:
    begin = time.strftime("%Y-%m-%d %H:%M", time.localtime(view.since))
    out.print(f"the last {duration(view.until - view.since)}, since {begin}")
    table = Table(box=None, pad_edge=False)
    table.add_column("QUEUE")
    for heading in ("JOBS", "SLOT-H", "GPU-H", "USEFUL", "SAVING", "LOST", "START-UP", "COST", "KWH"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [(one.queue, one.jobs, one) for one in view.queues]
    for name, jobs, use in [*rows, ("all", sum(one.jobs for one in view.queues), view.total)]:
        held = math.fsum(use.slot_seconds.values())
        parts = (use.slot_seconds["saving"], use.slot_seconds["lost"], use.lost_to_startup_slot_s)
        shares = (percent(seconds / held) if held else NONE for seconds in parts)
        hours = (f"{sum(use.slot_hours.values()):.2f}", f"{use.gpu_hours:.2f}")
        useful = NONE if use.useful is None else percent(use.useful)
        table.add_row(name, str(jobs), *hours, useful, *shares, money(use.cost, view.currency), _kwh(use.energy))
    out.print(table)
    _idle(view)


def _idle(view: ClusterAccount) -> None:
    if view.known_since is None:
        out.print("idle: unknown, nobody has written down yet which slots there are")
        return
    if view.known_since > view.since:
        begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.known_since))
        out.print(f"idle: unknown before {begin}")
    for kind, offered in view.offered_slot_s.items():
        idle = view.idle_slot_s[kind]
        share = percent(idle / offered) if offered else NONE
        out.print(f"idle {kind}: {idle / HOUR_S:.2f} of {offered / HOUR_S:.2f} slot-hours, {share}")


def _categories(seconds: Mapping[str, float], slot_seconds: Mapping[str, float]) -> Table:
    """What there is of each category; the shares are of the sums."""
    table = Table(box=None, pad_edge=False)
    table.add_column("CATEGORY")
    for heading in ("SECONDS", "SHARE", "SLOT-SECONDS", "SHARE"):
        table.add_column(heading, justify="right")
    sums = math.fsum(seconds.values()), math.fsum(slot_seconds.values())
    rows = [(name, value, slot_seconds.get(name, 0.0)) for name, value in seconds.items() if value]
    for name, wall, slots in [*rows, ("total", *sums)]:
        shares = (percent(value / whole) if whole else NONE for value, whole in zip((wall, slots), sums, strict=True))
        of_wall, of_slots = shares
        table.add_row(name, f"{wall:.1f}", of_wall, f"{slots:.1f}" if slots else NONE, of_slots if slots else NONE)
    return table


def _totals(use: UseView, currency: str | None) -> None:
    if use.useful is not None:
        out.print(f"useful {percent(use.useful)}: training, of the slot-seconds it held")
    lost = (use.lost_to_failures_slot_s, use.lost_to_preemption_slot_s, use.lost_to_startup_slot_s)
    out.print("slot-seconds lost to failures {:.1f}, to pre-emption {:.1f}, to start-up {:.1f}".format(*lost))
    hours = ", ".join(f"{kind} {value:.3f}" for kind, value in use.slot_hours.items()) or "none"
    out.print(f"slot-hours: {hours}; GPU-hours {use.gpu_hours:.3f}; cost {money(use.cost, currency)}")
    energy = use.energy
    if energy.measured:
        out.print(f"energy {_kwh(energy)} kWh, of {energy.measured} of {energy.ended} attempts")
    else:
        out.print("energy: no reading")


def _kwh(energy: EnergyView) -> str:
    known = [value for value in (energy.gpu_kwh, energy.cpu_kwh) if value is not None]
    return f"{sum(known):.3f}" if known else NONE


def money(amount: float | None, currency: str | None) -> str:
    """`2.50 EUR`, `0.0021 EUR`, or that it is not known."""
    if amount is None:
        return NONE
    return (f"{amount:.2g}" if 0 < amount < CENTS else f"{amount:.2f}") + (f" {currency}" if currency else "")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
