"""Reads the job file that a verb was given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.document import read_document
from orchestrator.job.check import check_job
from orchestrator.job.spec import AnyJob, load_job

JobFile = Annotated[Path, typer.Argument(metavar="FILE", help="The job file (YAML); write one with `tuneyard init`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as train.seed=1. Repeatable."),
]


def read_job(file: Path, overrides: list[str] | None) -> AnyJob:
    """The validated job, all that it names looked at. Raises SpecError or SpecErrors."""
    document = read_document(file, overrides or ())
    job = load_job(document)
    check_job(job, document)
    return job
