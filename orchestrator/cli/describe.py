"""`tuneyard describe`."""

from __future__ import annotations

import time

import typer

from orchestrator.cli.output import Format, Output, age, out, print_json, state_text
from orchestrator.views import AttemptView, JobView


def describe(
    job: str = typer.Argument(help="The job's id."),
    config: bool = typer.Option(False, "--config", help="Also the generated Accelerate and DeepSpeed configuration."),
    output: Output = Format.TEXT,
) -> None:
    """All about a job: plan, placement, attempts, what happened and why."""
    from orchestrator.cli.yard import client

    with client() as yard:
        view = yard.job(job)
        attempts = yard.attempts(job)
        events = yard.events(job)
    if output == Format.JSON:
        data = view.model_dump(mode="json")
        data["attempts"] = [attempt.model_dump(mode="json") for attempt in attempts]
        data["events"] = [event.model_dump(mode="json") for event in events]
        print_json(data)
        return
    _head(view)
    for attempt in attempts:
        _attempt(attempt)
    out.print("[bold]events[/bold]")
    for event in events:
        number = f" attempt {event.attempt}" if event.attempt else ""
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        out.print(f"  {clock}{number} {event.kind} {_short(event.data)}", markup=False)
    if config and attempts:
        for name, text in attempts[-1].launch.items():
            out.print(f"[bold]{name}[/bold]")
            out.print(text, markup=False)


def _head(view: JobView) -> None:
    out.print(f"[bold]{view.id}[/bold] {state_text(view.state)}: {view.reason.sentence}")
    if view.reason.remedy:
        out.print(f"  {view.reason.remedy}", markup=False)
    out.print(f"  queue {view.queue}, priority {view.priority}, submitted {age(view.submitted_at)} ago")
    if view.error:
        out.print(f"  error[{view.error.get('code')}] {view.error.get('message')}", markup=False)
        if view.error.get("traceback"):
            out.print(str(view.error["traceback"]).rstrip(), markup=False)


def _attempt(attempt: AttemptView) -> None:
    plan = attempt.plan
    shares = ", ".join(f"{share.processes} on {share.address}" for share in attempt.nodes)
    out.print(
        f"[bold]attempt {attempt.number}[/bold] {attempt.state}" + (f", {attempt.outcome}" if attempt.outcome else "")
    )
    out.print(
        f"  {plan.engine} on {plan.world_size} × {plan.device}: {shares}; "
        f"{plan.micro_batch_size} rows × {plan.gradient_accumulation_steps}, {plan.precision}, offload {plan.offload}"
    )
    out.print(f"  files {attempt.run_dir}", markup=False)


def _short(data: dict[str, object]) -> str:
    text = ", ".join(f"{key}: {value}" for key, value in data.items() if key != "traceback" and value is not None)
    return text if len(text) <= 160 else text[:157] + "..."
