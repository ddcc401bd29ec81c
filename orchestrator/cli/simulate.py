"""`tuneyard simulate`."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from orchestrator.cli.files import Overrides
from orchestrator.cli.output import Format, Output, err, out, print_json
from orchestrator.errors import SpecError

if TYPE_CHECKING:
    from orchestrator.cluster.model import Node
    from orchestrator.simulate.conditions import Conditions
    from orchestrator.simulate.engine import Outcome
    from orchestrator.simulate.policy import Forecast
    from orchestrator.simulate.report import Group, Report
    from orchestrator.simulate.workload import Workload


class Placement(enum.StrEnum):
    CONSOLIDATE = "consolidate"
    COUNT = "count"


class TraceFormat(enum.StrEnum):
    AUTO = "auto"
    CSV = "csv"
    PHILLY = "philly"
    PAI = "pai"
    CRUX = "crux"


class PolicyName(enum.StrEnum):
    YARD = "yard"
    FIFO = "fifo"
    FIRST_FIT = "first-fit"
    EASY = "easy"
    EASY_STRICT = "easy-strict"
    SJF = "sjf"
    SRTF = "srtf"
    QSSF = "qssf"
    TIRESIAS = "tiresias"


DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
FORECASTS = 100
"""Of the yard's own starts, at most so many are foretold: each plays all of its queue forward."""
SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def simulate(
    trace: Path | None = typer.Option(None, "--trace", help="Jobs to run: a CSV, or a public trace."),
    generate: str | None = typer.Option(
        None, "--generate", metavar="jobs=N,load=L,...", help="Draw jobs at random instead; see docs/simulate.md."
    ),
    kind: TraceFormat = typer.Option(TraceFormat.AUTO, "--format", help="What kind of trace it is."),
    nodes: int | None = typer.Option(None, "--nodes", min=1, max=100_000, help="Nodes, all alike."),
    gpus: int = typer.Option(8, "--gpus-per-node", min=1, max=64, help="GPUs of each."),
    cluster: Path | None = typer.Option(None, "--cluster", help="A file that lists nodes, instead of --nodes."),
    policy: list[PolicyName] = typer.Option(
        [PolicyName.YARD], "--policy", help="Who decides; the yard's own scheduler, or another to compare. Repeatable."
    ),
    placement: Placement = typer.Option(
        Placement.CONSOLIDATE,
        "--placement",
        help="consolidate: what a node could hold waits for one node, larger gangs for whole ones; count: any GPUs do.",
    ),
    preemption_cost: str = typer.Option("60s", "--preemption-cost", help="Work to do again after each planned stop."),
    startup: str = typer.Option("0s", "--startup", help="From each start to the first step."),
    checkpoint_every: str | None = typer.Option(None, "--checkpoint-every", help="Time between two commits of a job."),
    mtbf: str | None = typer.Option(None, "--mtbf", help="Mean time between two failures of a node, such as 30d."),
    repair: str = typer.Option("1h", "--repair", help="How long a node that failed is gone."),
    failures: Path | None = typer.Option(None, "--failures", help="A file of failures at known times."),
    speedup: float = typer.Option(0.9, "--speedup", min=0, max=1, help="Elastic jobs: speed is ranks to this power."),
    oracle: bool = typer.Option(False, "--oracle", help="Let policies know how long jobs will run."),
    queues: Path | None = typer.Option(
        None, "--queues", help="A file of queues: weights and guarantees by tenant. Each tenant is a queue then."
    ),
    tenants_as_queues: bool = typer.Option(False, "--tenants-as-queues", help="The same with the defaults for all."),
    seed: int = typer.Option(0, "--seed", help="Of --generate, and of failures."),
    set_: Overrides = None,
    plot: Path | None = typer.Option(None, "--plot", metavar="F.png", help="Write a picture."),
    output: Output = Format.TEXT,
) -> None:
    """Run a trace on a cluster that need not exist, on a virtual clock, with the scheduler that runs a real yard.

    What if we buy 8 nodes, or change a quota: run it twice. `--set rules.FIELD=VALUE` changes the scheduler's numbers.
    """
    from orchestrator.schedule.gang import Rules
    from orchestrator.simulate.conditions import Conditions, read_failures, read_queues, with_overrides
    from orchestrator.simulate.engine import simulate as run
    from orchestrator.simulate.peers import POLICIES
    from orchestrator.simulate.plot import check_plot
    from orchestrator.simulate.plot import plot as draw
    from orchestrator.simulate.report import report

    if plot is not None:
        check_plot(plot)
    conditions = Conditions(
        preemption_cost_s=_seconds("preemption-cost", preemption_cost),
        startup_s=_seconds("startup", startup),
        checkpoint_s=None if checkpoint_every is None else _seconds("checkpoint-every", checkpoint_every, above=True),
        mtbf_s=None if mtbf is None else _seconds("mtbf", mtbf, above=True),
        repair_s=_seconds("repair", repair),
        speedup=speedup,
        seed=seed,
        oracle=oracle,
        tenants_as_queues=tenants_as_queues or queues is not None,
    )
    rules = with_overrides(Rules(consolidate=placement is Placement.CONSOLIDATE), set_ or ())
    shares = read_queues(queues) if queues is not None else ()
    there = _nodes(nodes, gpus, cluster)
    workload = _workload(trace, generate, kind, there, seed)
    conditions = dataclasses.replace(
        conditions,
        forecast_every=max(1, len(workload.jobs) // FORECASTS),
        failures=read_failures(failures, there) if failures is not None else (),
    )
    for reason, count in workload.skipped.items():
        err.print(f"left out: {count:,} jobs: {reason}")
    outcomes = []
    for name in dict.fromkeys(policy):
        with err.status(f"simulating {len(workload.jobs):,} jobs under {name}"):
            outcomes.append(
                run(there, workload, POLICIES[name](), conditions, rules=rules, queues=shares, forecast=_forecast(name))
            )
    reports = [report(outcome) for outcome in outcomes]
    if plot is not None:
        draw(plot, outcomes)
    if output == Format.JSON:
        print_json(_as_json(reports, workload, conditions, placement))
    else:
        _show(reports, outcomes, workload)


def _nodes(count: int | None, gpus: int, cluster: Path | None) -> tuple[Node, ...]:
    from launch.document import read_document
    from orchestrator.cluster.spec import load_cluster
    from orchestrator.simulate.conditions import alike_nodes, nodes_of

    if (count is None) == (cluster is None):
        raise SpecError(
            "which nodes?" if count is None else "--nodes and --cluster exclude each other",
            code="which-cluster",
            field="nodes",
            hint="give --nodes N, with --gpus-per-node, or --cluster FILE",
        )
    return alike_nodes(count, gpus) if count is not None else nodes_of(load_cluster(read_document(cluster or Path())))


def _workload(
    trace: Path | None, generate: str | None, kind: TraceFormat, nodes: Sequence[Node], seed: int
) -> Workload:
    from orchestrator.simulate.formats import read_trace
    from orchestrator.simulate.generate import generate as drawn
    from orchestrator.simulate.generate import parse_generation

    if (trace is None) == (generate is None):
        raise SpecError(
            "which jobs?" if trace is None else "--trace and --generate exclude each other",
            code="which-jobs",
            field="trace",
            hint="give --trace FILE, or --generate jobs=1000,load=0.9",
        )
    if trace is not None:
        return read_trace(trace, None if kind is TraceFormat.AUTO else kind)
    slots = sum(len(node.gpus) for node in nodes) or sum(node.cpu_slots for node in nodes)
    return drawn(parse_generation(generate or ""), slots, seed)


def _forecast(policy: PolicyName) -> Forecast | None:
    """The yard's own forecast of starts; nobody else makes any."""
    from orchestrator.schedule.forecast import forecast

    return forecast if policy is PolicyName.YARD else None


def _seconds(option: str, text: str, *, above: bool = False) -> float:
    match = DURATION.fullmatch(text.strip())
    value = float(match[1]) * SECONDS[match[2]] if match is not None else -1.0
    if value < 0 or (above and value == 0):
        raise SpecError(
            f"--{option} {text} is no time{' above 0' if above else ''}",
            code="wrong-type",
            field=option,
            hint="write seconds, or a number with s, m, h or d, such as 30m",
        )
    return value


# What is shown.


def _as_json(
    reports: Sequence[Report], workload: Workload, conditions: Conditions, placement: Placement
) -> dict[str, Any]:
    """The report itself for one policy; for several, each by its name."""
    common = {
        "workload": workload.source,
        "skipped": dict(workload.skipped),
        "placement": placement.value,
        "conditions": {
            **dataclasses.asdict(conditions),
            "failures": [failure.model_dump() for failure in conditions.failures],
        },
    }
    if len(reports) == 1:
        return reports[0].as_json() | common
    return {"policies": {one.policy: one.as_json() for one in reports}} | common


def _share(share: float) -> str:
    return f"{share:.1%}"


def _count(count: float) -> str:
    return f"{count:,.0f}"


ROWS: tuple[tuple[str, Callable[[Report], float | None], Callable[[float], str]], ...] = (
    ("average JCT, s", lambda one: one.avg_jct_s, _count),
    ("median JCT, s", lambda one: one.p50_jct_s, _count),
    ("p99 JCT, s", lambda one: one.p99_jct_s, _count),
    ("average wait, s", lambda one: one.avg_wait_s, _count),
    ("p99 wait, s", lambda one: one.p99_wait_s, _count),
    ("p99.9 wait, s", lambda one: one.p999_wait_s, _count),
    ("makespan, s", lambda one: one.makespan_s, _count),
    ("worst fairness", lambda one: one.worst_ftf, lambda rho: f"{rho:.1f}"),
    ("unfairly treated", lambda one: one.unfair_fraction, _share),
    ("GPUs held", lambda one: one.utilisation, _share),
    ("free while jobs wait", lambda one: one.idle_while_waiting, _share),
    ("of these, fragments", lambda one: one.fragmentation, _share),
    ("jobs waiting, mean", lambda one: one.avg_queue, _count),
    ("pre-emptions", lambda one: one.preemptions, _count),
    ("most of one job", lambda one: one.max_preemptions_of_a_job, _count),
    ("resizes", lambda one: one.resizes, _count),
    ("nodes lost", lambda one: one.failures, _count),
    ("goodput", lambda one: one.goodput, _share),
    ("lost, GPU-hours", lambda one: one.lost_gpu_s / 3600, _count),
    ("error of forecasts", lambda one: one.eta_mape, _share),
    ("simulated in, s", lambda one: one.wall_s, lambda seconds: f"{seconds:.1f}"),
)
ALWAYS = 10
"""So many rows are shown even if all of them are zero."""


def _show(reports: Sequence[Report], outcomes: Sequence[Outcome], workload: Workload) -> None:
    first = reports[0]
    out.print(
        f"{first.jobs:,} jobs of {workload.source} on {first.nodes:,} nodes with {first.gpus:,} "
        f"{'GPUs' if any(node.gpus for node in outcomes[0].nodes) else 'slots'}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True, min_width=20)
    for one in reports:
        table.add_column(one.policy.upper(), justify="right")
    for number, (name, value, form) in enumerate(ROWS):
        values = [value(one) for one in reports]
        if number < ALWAYS or any(values):
            table.add_row(name, _cell(values[0], None, form), *(_cell(one, values[0], form) for one in values[1:]))
    out.print(table)
    if len(reports) > 1:
        out.print(f"JCT: from submission to end. ×: beside {first.policy}")
        return
    for title, groups in (("GPUS", first.by_size), ("TENANT", first.by_tenant)):
        if len(groups) > 1:
            out.print()
            out.print(_groups(title, groups))


def _cell(value: float | None, base: float | None, form: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    ratio = f" [dim]×{value / base:.2f}[/dim]" if base else ""
    return form(value) + ratio


MOST_GROUPS = 20


def _groups(title: str, groups: dict[str, Group]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for heading in ("JOBS", "AVG JCT", "MEDIAN JCT", "P99 JCT", "AVG WAIT", "P99 WAIT", "PRE-EMPTIONS"):
        table.add_column(heading, justify="right")
    for name, group in list(groups.items())[:MOST_GROUPS]:
        times = (group.avg_jct_s, group.p50_jct_s, group.p99_jct_s, group.avg_wait_s, group.p99_wait_s)
        table.add_row(name, _count(group.jobs), *map(_count, times), _count(group.preemptions))
    if len(groups) > MOST_GROUPS:
        table.add_row(f"and {len(groups) - MOST_GROUPS} more: -o json")
    return table
