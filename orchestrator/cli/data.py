"""`tuneyard data`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from rich.table import Table

from orchestrator.cli.files import JobFile, Overrides, read_job
from orchestrator.cli.output import Format, Output, out, print_json
from orchestrator.errors import SpecError
from orchestrator.job.spec import TrainingJob


def data(file: JobFile, set_: Overrides = None, output: Output = Format.TEXT) -> None:
    """Look at a job's data before a step is paid for: sizes, lengths, classes, repeats, leakage, what is cut."""
    job, _ = read_job(file, set_)
    if not isinstance(job, TrainingJob):
        raise SpecError("a `run:` job reads its data itself", code="not-a-training-job", field="run", file=file)
    told = _survey(file, set_ or [])
    if output == Format.JSON:
        print_json(told)
    else:
        _show(told)


def _survey(file: JobFile, overrides: list[str]) -> dict[str, Any]:
    """The survey of `launch.survey`, in a process of its own: it needs the tokenizer, and so transformers.

    Raises:
        SpecError: the data is not fit to be trained on.
    """
    # How the job is spread over processes is none of the data's business; `auto` needs a planner.
    flags = [flag for one in [*overrides, "strategy=single", "offload=none"] for flag in ("--set", one)]
    argv = [sys.executable, "-m", "launch.survey", "--config", str(file), *flags]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:
        told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        tail = done.stderr.strip().splitlines()[-1:] or ["no word"]
        raise SpecError(f"the data could not be read: {tail[0]}", code="bad-data", file=file) from None
    if "error" in told:
        error = told["error"]
        raise SpecError(
            error["message"], code=error["code"], field=error["field"], file=error["file"] or file,
            line=error["line"], hint=error["hint"],
        )  # fmt: skip
    return told


def _show(told: dict[str, Any]) -> None:
    out.print(f"{told['rows_read']} rows read, {told['repeated_rows']} of them repeats")
    table = Table(box=None, pad_edge=False)
    for heading in ("PART", "ROWS", "TOKENS median / 95 % / most", "CUT", "IN TRAIN", "CLASSES"):
        table.add_column(heading, overflow="fold")
    for name, part in told["parts"].items():
        classes = ", ".join(f"{label} {count}" for label, count in list((part["classes"] or {}).items())[:8]) or "-"
        lengths = f"{part['tokens_median']} / {part['tokens_p95']} / {part['tokens_max']}"
        table.add_row(
            name, str(part["rows"]), lengths, f"{part['truncated_share']:.1%}", str(part["also_in_train"]), classes
        )
    out.print(table)
    out.print(f"{told['vocabulary_used']} of the {told['vocabulary']} tokens of the vocabulary occur")
    for warning in told["warnings"]:
        out.print(f"[yellow]warn[/yellow]  {warning}")
