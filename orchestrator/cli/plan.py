"""`tuneyard plan`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import typer
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from launch.contract import Device
from launch.document import Document, read_document
from launch.footprint_record import Footprint
from launch.instructions import multiplies_bf16
from launch.shape import ModelShape, read_shape
from orchestrator.cli.files import JobFile, Overrides, told_where
from orchestrator.cli.output import Format, Output, out, print_json, size
from orchestrator.cli.status import NOT_POSSIBLE
from orchestrator.cluster.model import Node
from orchestrator.cluster.spec import NodeKind, kind_of, load_cluster
from orchestrator.errors import ImpossibleGangError, SpecError
from orchestrator.job.spec import TrainingJob, load_job
from orchestrator.memory.analytic import footprint
from orchestrator.memory.estimate import Side
from orchestrator.memory.nearest import Change, nearest
from orchestrator.memory.search import Candidate, Choice, search, told, why_not

TRACE_SECONDS = 600
BAR = 48
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "white")


@dataclass(frozen=True)
class Planned:
    """All that the verb shows."""

    choice: Choice
    footprint: Footprint
    change: Change | None


def plan(
    file: JobFile,
    cluster: Path | None = typer.Option(None, "--cluster", help="A file that lists nodes; without it, this machine."),
    set_: Overrides = None,
    trace: bool = typer.Option(False, "--trace", help="Trace the model instead of working its memory out: slower."),
    output: Output = Format.TEXT,
) -> None:
    """Show how a job would fit: what a process would hold, which plan is taken and why. Exit 4 if nothing fits.

    Neither data nor weights are read: a model's config.json is enough.
    """
    document = read_document(file, set_ or ())
    job = load_job(document)
    if not isinstance(job, TrainingJob):
        raise SpecError(
            "what a `run:` job needs is known to its command alone",
            code="not-a-training-job",
            field="run",
            file=file,
            hint="plan a job with `model`, `data` and `train`",
        )
    kinds = load_cluster(read_document(cluster)) if cluster is not None else (this_machine(),)
    planned = plan_job(job, document, kinds, file if trace else None, set_ or ())
    if output == Format.JSON:
        print_json(as_json(job, planned))
    else:
        show(job, planned)
    if not planned.choice.fits:
        raise typer.Exit(NOT_POSSIBLE)


def plan_job(
    job: TrainingJob, document: Document, kinds: Sequence[NodeKind], traced: Path | None, overrides: Sequence[str]
) -> Planned:
    """The plan of `job` on `kinds`; `traced` is the job file, if its model is to be traced.

    Raises:
        SpecError: the model is not known, or no kind of node takes such a job.
    """
    with told_where(document):
        shape = _shape(job, traced)
    devices = {kind.device for kind in kinds if kind.takes(job.resources.accelerator)}
    choices = []
    for device in sorted(devices, reverse=True):  # cuda first
        there = [kind for kind in kinds if kind.device == device]
        found = trace(traced, overrides, device) if traced is not None else None
        if isinstance(found, Footprint):
            needs = found
        elif shape is not None:
            needs = footprint(shape, job, device, reason=found)
        else:
            raise SpecError(
                found or "",
                code="not-traced",
                field="model.name_or_path",
                hint="see `tuneyard plan` of a model whose architecture is known",
            )
        choice = search(job, shape, needs, there)
        if choice is not None:
            choices.append((choice, needs))
    if not choices:
        raise impossible(job, document, kinds)
    choice, needs = min(choices, key=lambda one: (not one[0].fits, one[0].best.rank if one[0].fits else ()))
    change = None if choice.fits else _nearest(job, shape, kinds)
    return Planned(choice, needs, change)


def _shape(job: TrainingJob, traced: Path | None) -> ModelShape | None:
    """The shape; None where only tracing can tell of the architecture, and is to."""
    try:
        return read_shape(job.model)
    except SpecError as problem:
        if traced is None or problem.code != "unknown-architecture":
            raise
        return None


def _nearest(job: TrainingJob, shape: ModelShape | None, kinds: Sequence[NodeKind]) -> Change | None:
    """By formulas alone, since many changes are tried."""
    if shape is None:
        return None
    devices: tuple[Device, ...] = ("cuda", "cpu")
    for device in devices:
        there = [kind for kind in kinds if kind.device == device]
        found = nearest(job, shape, there, partial(footprint, shape, device=device)) if there else None
        if found is not None:
            return found
    return None


def impossible(job: TrainingJob, document: Document, kinds: Sequence[NodeKind]) -> SpecError:
    most = max((kind.most for kind in kinds if kind.takes(job.resources.accelerator)), default=0)
    wanted = f"{job.resources.num_processes} processes on `{job.resources.accelerator}`"
    at = document.error(("resources",), "", code="")
    return ImpossibleGangError(
        f"the job asks for {wanted}, and the nodes take {most} such processes",
        field="resources",
        file=at.file,
        line=at.line,
        hint="ask for fewer, or for another accelerator; or plan for a larger cluster",
    )


def this_machine() -> NodeKind:
    """This machine, with what is free of its memory now."""
    from orchestrator.execute.gpus import local_gpus
    from orchestrator.execute.local import cpu_slots
    from orchestrator.settings import Settings

    cores = len(os.sched_getaffinity(0))
    return kind_of(
        Node(
            id="here",
            name=socket.gethostname(),
            address="127.0.0.1",
            cores=cores,
            cpu_slots=cpu_slots(cores, Settings().cpu_slots),
            memory_bytes=psutil.virtual_memory().available,
            gpus=local_gpus(),
            bf16=multiplies_bf16(),
        )
    )


def trace(file: Path, overrides: Sequence[str], device: str) -> Footprint | str:
    """The traced footprint, or why tracing failed. In a process of its own: it needs torch."""
    flags = [flag for one in overrides for flag in ("--set", one)]
    argv = [sys.executable, "-m", "launch.footprint", "--config", str(file), "--device", device, *flags, "-o", "json"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TRACE_SECONDS)
        return Footprint.model_validate_json(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"not traced: it took longer than {TRACE_SECONDS} s"
    except (IndexError, ValidationError):
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        return f"not traced: {next((line for line in lines if line.startswith('error[')), lines[-1])}"


# What is shown.


def as_json(job: TrainingJob, planned: Planned) -> dict[str, Any]:
    tokens = job.model.task == "causal-lm"
    choice, best = planned.choice, planned.choice.best
    change = planned.change
    return {
        "fits": choice.fits,
        **_plan_json(best, tokens),
        "predicted": {"device": _side(best.predicted.device), "host": _side(best.predicted.host)},
        "needed": {"device_bytes": best.needed.device, "host_bytes": best.needed.host},
        "available": {"device_bytes": best.room.device, "host_bytes": best.room.host},
        "margin": {"static": choice.margin.static, "dynamic": choice.margin.dynamic},
        "alternatives": [
            {**_plan_json(one, tokens), "fits": one.fits, "why_not": why_not(one, best)} for one in choice.others
        ],
        "reason": choice.reason,
        "nearest_change": None
        if change is None
        else {"change": change.change, "sentence": change.sentence, "plan": _plan_json(change.choice.best, tokens)},
        "source": planned.footprint.source,
        "source_reason": planned.footprint.reason,
        "parameters": planned.footprint.parameters,
        "trainable": planned.footprint.trainable,
    }


def _plan_json(one: Candidate, tokens: bool) -> dict[str, Any]:
    """`tokens`: whether each token has a loss, so that there is a choice of how it is made."""
    plan = one.plan
    return {
        "strategy": plan.engine,
        "offload": plan.offload,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "activation_checkpointing": plan.activation_checkpointing,
        "loss_mode": plan.loss if tokens else None,
        "allocator": plan.allocator,
        "precision": plan.precision,
        "world_size": plan.world_size,
        "device": plan.device,
        "node": one.kind.name,
        "step_seconds": one.seconds.total,
    }


def _side(side: Side) -> dict[str, Any]:
    return {"peak_bytes": side.peak_bytes, "moment": side.moment, "breakdown": side.breakdown}


def show(job: TrainingJob, planned: Planned) -> None:
    choice, best = planned.choice, planned.choice.best
    plan, needs = best.plan, planned.footprint
    out.print(f"model      {job.model.name_or_path}: {needs.parameters:,} parameters, {needs.trainable:,} trained")
    nodes = -(-plan.world_size // best.kind.slots)
    where = f"{plan.world_size} × {best.kind.gpu.name if best.kind.gpu else 'cpu'}, {nodes} × {best.kind.name}"
    verdict = "[green]fits[/]" if choice.fits else "[red]does not fit[/]"
    out.print(f"plan       {verdict}: {plan.engine} on {where}, {plan.precision}")
    out.print(f"micro      {plan.micro_batch_size} rows × {plan.gradient_accumulation_steps} accumulated")
    how = [f"offload {plan.offload}", f"activation checkpointing {'on' if plan.activation_checkpointing else 'off'}"]
    how += [f"loss {plan.loss}"] * (job.model.task == "causal-lm") + [f"allocator {plan.allocator}"]
    out.print(f"saving     {', '.join(how)}")
    out.print(f"why        {choice.reason}")
    if planned.change is not None:
        out.print(f"instead    [yellow]{planned.change.sentence}[/]")
    elif not choice.fits:
        out.print("instead    no change that was tried makes it fit")
    for title, side, room, wanted in _sides(best):
        shared = ", without code, which processes share," if side.breakdown.get("code") else ""
        counted = f"with margin{shared} {size(wanted)} of {size(room)}"
        out.print(f"\n{title}: {size(side.peak_bytes)}; {counted} (worst: {side.moment})")
        out.print(bar(side, max(room, wanted)))
        out.print(breakdown(side))
    if choice.others:
        out.print()
        out.print(alternatives(choice))
    told_by = "traced" if needs.source == "traced" else "by formulas (docs/memory.md)"
    out.print(
        f"\n{told_by}{'; ' + needs.reason if needs.reason else ''}; a step takes about {best.seconds.total:.2g} s"
    )


def _sides(best: Candidate) -> Iterator[tuple[str, Side, int, int]]:
    one, two = best.predicted.device, best.predicted.host
    if best.plan.device == "cpu":
        both = Side(peak_bytes=one.peak_bytes + two.peak_bytes, moment=one.moment, breakdown=merged(one, two))
        yield "memory a process", both, best.room.host, best.needed.host
    else:
        yield "GPU memory a process", one, best.room.device, best.needed.device
        yield "host memory a process", two, best.room.host, best.needed.host


def merged(one: Side, two: Side) -> dict[str, int]:
    names = [*one.breakdown, *(name for name in two.breakdown if name not in one.breakdown)]
    return {name: one.breakdown.get(name, 0) + two.breakdown.get(name, 0) for name in names}


def bar(side: Side, room: int) -> Text:
    """What there is, filled in with what it would hold."""
    text, drawn, summed = Text("  "), 0, 0
    for index, count in enumerate(sorted(side.breakdown.values(), reverse=True)):
        summed += count
        end = min(BAR, round(BAR * summed / max(1, room)))
        text.append("█" * (end - drawn), style=COLOURS[min(index, len(COLOURS) - 1)])
        drawn = max(drawn, end)
    text.append("░" * (BAR - drawn), style="dim")
    return text


def breakdown(side: Side) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for index, (name, count) in enumerate(sorted(side.breakdown.items(), key=lambda item: -item[1])):
        mark = f"[{COLOURS[min(index, len(COLOURS) - 1)]}]█[/]"
        table.add_row(f"  {mark} {name.replace('_', ' ')}", size(count), f"{count / max(1, side.peak_bytes):.0%}")
    return table


def alternatives(choice: Choice) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("NEXT BEST", "NODE", "STEP", "A PROCESS", "WHY NOT"):
        table.add_column(heading, overflow="fold")
    for one in choice.others:
        peak = one.predicted.device.peak_bytes + (one.predicted.host.peak_bytes if one.plan.device == "cpu" else 0)
        row = (told(one.plan), one.kind.name, f"{one.seconds.total:.2g} s", size(peak), why_not(one, choice.best))
        table.add_row(*row)
    return table
