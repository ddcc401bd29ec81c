"""How verbs print: tables and sentences for people on stdout, one JSON value with `-o json`, progress on stderr."""

from __future__ import annotations

import enum
import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator.cli.status import of_error
from orchestrator.errors import SpecErrors, TuneyardError
from orchestrator.job.lifecycle import JobState
from orchestrator.views import JobView


class Format(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


Output = Annotated[Format, typer.Option("-o", "--output", help="text for people, json for programs.")]

COLOURS = {
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "yellow",
    JobState.RUNNING: "cyan",
    JobState.STARTING: "cyan",
    JobState.STOPPING: "yellow",
    JobState.PAUSED: "magenta",
}

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def show_error(problem: TuneyardError, *, as_json: bool) -> int:
    """Print an error, on stdout too where a program reads it; returns the exit status."""
    sys.stderr.write(f"{problem}\n")
    if as_json:
        errors = problem.errors if isinstance(problem, SpecErrors) else [problem]
        print_json({"errors": [error.as_dict() for error in errors]})
    return of_error(problem)


def state_text(state: JobState) -> str:
    colour = COLOURS.get(state)
    return f"[{colour}]{state}[/{colour}]" if colour else str(state)


def age(since: float | None, until: float | None = None) -> str:
    """Time since a Unix time, until another or now."""
    if since is None:
        return "-"
    return duration((time.time() if until is None else until) - since)


def duration(seconds: float) -> str:
    """`4m 10s`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s"
    return f"{whole // 3600}h {whole % 3600 // 60}m"


def size(count: float | None) -> str:
    """`1.4 GiB`."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def job_json(view: JobView) -> dict[str, Any]:
    """A job as one flat object: its result's fields stand beside its state."""
    data: dict[str, Any] = {"job": view.id, "state": view.state.value, "attempts": view.attempts}
    data["reason"] = view.reason.model_dump(mode="json")
    if view.error is not None:
        data["error"] = view.error
    if view.checkpoint is not None:
        data["checkpoint"] = view.checkpoint.model_dump(mode="json")
    return data | (view.result or {})
