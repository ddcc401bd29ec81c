"""Follows a job on stderr until it ends: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.live import Live
from rich.text import Text

from orchestrator.cli.output import duration, err, out, size, state_text
from orchestrator.job.lifecycle import JobState
from orchestrator.views import JobView

PLAIN_STEPS = 10  # without a terminal: about so many lines of progress a job


def follow(views: Iterator[JobView], *, quiet: bool = False) -> JobView:
    """The job as it ended."""
    last: JobView | None = None
    if quiet:
        *_, last = views
    elif err.is_terminal:
        with Live(console=err, refresh_per_second=8, transient=True) as live:
            for last in views:
                live.update(Text.from_markup(line(last)))
    else:
        told = ""
        for last in views:
            mark = _mark(last)
            if mark != told:
                told = mark
                err.print(line(last))
    assert last is not None
    return last


def follow_array(looks: Iterator[list[JobView]], *, quiet: bool = False) -> list[JobView]:
    """The jobs of an array as they ended; a line whenever another one has begun or ended."""
    views: list[JobView] = []
    told = ""
    for views in looks:
        counts = Counter(view.state for view in views)
        now = ", ".join(f"{counts[state]} {state_text(state)}" for state in JobState if counts[state])
        if now != told and not quiet:
            told = now
            err.print(f"[bold]{views[0].array_id}[/bold] {now}")
    return views


def line(view: JobView) -> str:
    """`sms-spam-x1y2z running  step 50/150  loss 0.1234  230 samples/s  eta 12s`."""
    text = f"[bold]{view.id}[/bold] {state_text(view.state)}"
    progress = view.progress
    if view.state in (JobState.QUEUED, JobState.STOPPING, JobState.PAUSED) or progress is None:
        return f"{text}  {view.reason.sentence}"
    if progress.steps:
        text += f"  step {progress.step}/{progress.steps}"
    if progress.loss is not None:
        text += f"  loss {progress.loss:.4f}"
    if progress.samples_per_s:
        text += f"  {progress.samples_per_s:.0f} samples/s"
    if progress.eta_s is not None and view.state == JobState.RUNNING:
        text += f"  eta {duration(progress.eta_s)}"
    if view.checkpoint is not None:
        text += f"  saved at {view.checkpoint.step}"
    return f"{text}  {progress.phase}" if progress.phase != "train" else text


def _mark(view: JobView) -> str:
    """Changes when a plain line is due."""
    step = view.progress.step if view.progress else 0
    steps = (view.progress.steps if view.progress else None) or 0
    part = step * PLAIN_STEPS // steps if steps else 0
    phase = view.progress.phase if view.progress else ""
    sentence = view.reason.sentence if view.state != JobState.RUNNING else ""
    return f"{view.state} {view.attempts} {part} {phase} {sentence}"


def summary(view: JobView) -> None:
    """What a job left behind, on stdout."""
    out.print(f"[bold]{view.id}[/bold] {state_text(view.state)}: {view.reason.sentence}")
    if view.state != JobState.SUCCEEDED:
        error = view.error or {}
        if error.get("traceback"):
            out.print(str(error["traceback"]).rstrip(), markup=False)
        hint = error.get("hint") or view.reason.remedy
        if hint:
            out.print(f"  hint: {hint}", markup=False)
        return
    result = view.result or {}
    sharded = f"ZeRO stage {result['zero_stage']}, " if result.get("zero_stage") else ""
    out.print(f"  engine    {result.get('engine')} ({sharded}{result.get('world_size')} processes)")
    for name, value in sorted((result.get("metrics") or {}).items()):
        out.print(f"  {name:<9} {float(value):.4f}")  # what is no number is stored as text
    train = result.get("train")
    if train:
        out.print(
            f"  training  {train['steps']} steps, {train['samples']} samples, {train['samples_per_s']:.0f} samples/s"
        )
    if result.get("peak_bytes"):
        out.print(f"  memory    {', '.join(size(peak) for peak in result['peak_bytes'])} at most, by rank")
    out.print(f"  model     {result.get('output_dir')}")
