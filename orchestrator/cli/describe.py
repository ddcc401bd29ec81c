"""`tuneyard describe`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby

import typer
from rich.markup import escape

from orchestrator.cli.ls import table_of
from orchestrator.cli.output import Format, Output, age, out, print_json, size, state_text
from orchestrator.views import AttemptView, EventView, JobView

COMMITTED = "checkpoint-committed"
SENTENCES = {
    "out-of-memory": "message",
    "next-rung": "sentence",
    "remembered": "sentence",
    "hung": "sentence",
    "slow-rank": "sentence",
}
"""Kinds of events of which one field says it all."""


def describe(
    job: str = typer.Argument(help="The job's id."),
    config: bool = typer.Option(False, "--config", help="Also the generated Accelerate and DeepSpeed configuration."),
    output: Output = Format.TEXT,
) -> None:
    """All about a job: plan, placement, attempts, what happened and why."""
    from orchestrator.cli.yard import holder
    from orchestrator.outside.protocol import Outside

    with holder(job) as place:
        if isinstance(place, Outside) and place.is_array(job):
            _array(place.jobs(array=job), output)
            return
        view = place.job(job)
        attempts = place.attempts(job)
        events = place.events(job)
    if output == Format.JSON:
        data = view.model_dump(mode="json")
        data["attempts"] = [attempt.model_dump(mode="json") for attempt in attempts]
        data["events"] = [event.model_dump(mode="json") for event in events]
        print_json(data)
        return
    _head(view)
    _checkpoints(view, events)
    for before, attempt in zip((None, *attempts), attempts, strict=False):
        _attempt(attempt)
        for line in story(before, attempt, events):
            out.print(f"  {line}", markup=False)
    out.print("[bold]events[/bold]")
    for line in lines(events):
        out.print(f"  {line}", markup=False)
    if config and attempts:
        for name, text in attempts[-1].launch.items():
            out.print(f"[bold]{name}[/bold]")
            out.print(text, markup=False)


def _array(views: Sequence[JobView], output: Format) -> None:
    """An array as a whole: a row an element, each of which has an id to be described by."""
    if output == Format.JSON:
        print_json([view.model_dump(mode="json", exclude={"spec", "plan"}) for view in views])
    else:
        out.print(table_of(views))


def _head(view: JobView) -> None:
    out.print(f"[bold]{view.id}[/bold] {state_text(view.state)}: {view.reason.sentence}")
    if view.reason.remedy:
        out.print(f"  {view.reason.remedy}", markup=False)
    array = f", of array {view.array_id}" if view.array_id else ""
    stops = f", stopped {view.preemptions} x for other jobs" if view.preemptions else ""
    out.print(f"  queue {view.queue}, priority {view.priority}, submitted {age(view.submitted_at)} ago{array}{stops}")
    if view.error:
        out.print(f"  error[{view.error.get('code')}] {view.error.get('message')}", markup=False)
        if view.error.get("traceback"):
            out.print(str(view.error["traceback"]).rstrip(), markup=False)


def _checkpoints(view: JobView, events: Sequence[EventView]) -> None:
    """The newest checkpoint, and whether saving works."""
    last = view.checkpoint
    if last is not None:
        out.print(f"  last checkpoint: step {last.step}, {age(last.time)} ago, {last.url}", markup=False)
    saves = [event for event in events if event.kind in (COMMITTED, "checkpoint-failed")]
    if saves and saves[-1].kind != COMMITTED:
        out.print(f"  [red]the last save failed[/red]: {escape(_note(saves[-1]))}")
        if saves[-1].data.get("hint"):
            out.print(f"    {saves[-1].data['hint']}", markup=False)


def lines(events: Sequence[EventView]) -> list[str]:
    """A line an event; of commits in a row one line, since there may be thousands."""
    found = []
    for (_, kind), group in groupby(events, key=lambda event: (event.attempt, event.kind)):
        several = list(group)
        shown = several[-1:] if kind == COMMITTED else several
        for event in shown:
            number = f" attempt {event.attempt}" if event.attempt else ""
            clock = time.strftime("%H:%M:%S", time.localtime(event.time))
            if kind in SENTENCES:
                told = str(event.data.get(SENTENCES[kind]))
            else:
                told = _note(event) if kind.startswith("checkpoint-") else _short(event.data)
            before = f", and {len(several) - 1} before" if len(several) > len(shown) else ""
            found.append(f"{clock}{number} {kind} {told}{before}")
    return found


def story(before: AttemptView | None, attempt: AttemptView, events: Sequence[EventView]) -> list[str]:
    """What an attempt's plan has otherwise than the one before, why, and whether it ran out of memory, too."""
    from orchestrator.memory.ladder import difference

    def told(kind: str, number: int) -> str | None:
        of = [event.data for event in events if event.kind == kind and event.attempt == number]
        return str(of[-1].get(SENTENCES[kind])) if of else None

    found = []
    if before is not None and before.plan != attempt.plan:
        rung = next(
            (one.data["rung"] for one in events if (one.kind, one.attempt) == ("next-rung", before.number)), None
        )
        why = f", the rung {rung}, because attempt {before.number} ran out of memory" if rung else ""
        found.append(f"other than before: {difference(before.plan, attempt.plan)}{why}")
    for line in (told("remembered", attempt.number), told("out-of-memory", attempt.number)):
        if line is not None:
            found.append(line)
    return found


def _note(event: EventView) -> str:
    """What became of a checkpoint: a CheckpointNote, as stored."""
    note = event.data
    text = str(note.get("id"))
    if note.get("source") == "memory":
        text += ", made of what the ranks before had left"
    if note.get("bytes"):
        text += f", {size(note['bytes'])}"
    if note.get("save_s") is not None:
        text += f" in {float(note['save_s']):.1f} s"
    if note.get("blocked_s") is not None:
        text += f", training waited {float(note['blocked_s']):.2f} s"
    return text if note.get("code") is None else f"{text}: [{note['code']}] {note.get('message')}"


def _attempt(attempt: AttemptView) -> None:
    plan = attempt.plan
    shares = ", ".join(f"{share.processes} on {share.address}" for share in attempt.nodes)
    out.print(
        f"[bold]attempt {attempt.number}[/bold] {attempt.state}" + (f", {attempt.outcome}" if attempt.outcome else "")
    )
    out.print(
        f"  {plan.engine} on {plan.world_size} × {plan.device}: {shares}; "
        f"{plan.micro_batch_size} rows × {plan.gradient_accumulation_steps}, {plan.precision}, offload {plan.offload}"
        + (f" to {plan.offload_path}" if plan.offload_path else "")
        + (", activation checkpointing" if plan.activation_checkpointing else "")
        + (", tight allocator" if plan.allocator == "tight" else "")
    )
    out.print(f"  files {attempt.run_dir}", markup=False)


def _short(data: dict[str, object]) -> str:
    text = ", ".join(f"{key}: {value}" for key, value in data.items() if key != "traceback" and value is not None)
    return text if len(text) <= 160 else text[:157] + "..."
