"""Reads the job file that a verb was given."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from launch.document import Document, path_of, read_document
from launch.git import git_state
from orchestrator.errors import SpecError, SpecErrors
from orchestrator.job.array import Element, expand, is_array
from orchestrator.job.check import check_job
from orchestrator.job.spec import AnyJob, TrainingJob, load_job
from orchestrator.outside.protocol import Order

JobFile = Annotated[Path, typer.Argument(metavar="FILE", help="The job file (YAML); write one with `tuneyard init`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as train.seed=1. Repeatable."),
]


def read_job(file: Path, overrides: list[str] | None) -> tuple[AnyJob, Document]:
    """The validated job, all that it names looked at, and the file it was read from.

    Raises:
        SpecError: a fault of the file, of an override, or of what the file names; a file with an `array`.
    """
    document = read_document(file, overrides or ())
    return checked_job(document), document


def checked_job(document: Document) -> AnyJob:
    """The job of a file that has been read, otherwise as read_job."""
    job = load_job(document)
    check_job(job, document)
    return job


def read_array(document: Document) -> list[Element]:
    """All jobs of a file with an `array`, otherwise as read_job."""
    suffix = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(5))
    elements = expand(document, suffix)
    faults: dict[str, SpecError] = {}
    for element in _distinct(elements).values():
        try:
            check_job(element.job, element.document)
        except SpecErrors as problem:
            faults |= {str(error): error for error in problem.errors}
    if faults:
        raise SpecErrors(sorted(faults.values(), key=lambda error: error.line or 0))
    return elements


def read_order(file: Path, document: Document, options: Sequence[str]) -> Order:
    """All that a system outside is given of a file that has been read; otherwise as checked_job and read_array."""
    jobs = [one.job for one in read_array(document)] if is_array(document) else [checked_job(document)]
    return Order(tuple(jobs), tuple(_sized(jobs)), git_state(file), tuple(options))


def read_sizings(elements: Iterable[Element]) -> list[str | None]:
    """What the model of each element needs of memory, as read_sizing."""
    return _sized([element.job for element in elements])


def _sized(jobs: Sequence[AnyJob]) -> list[str | None]:
    found = {asks: read_sizing(job) for asks, job in {_asks(job): job for job in jobs}.items()}
    return [found[_asks(job)] for job in jobs]


def _distinct(elements: Iterable[Element]) -> dict[str, Element]:
    """One element of all that differ in their place in the array alone."""
    return {_asks(element.job): element for element in elements}


def _asks(job: AnyJob) -> str:
    return job.model_copy(update={"name": "element", "array_of": None}).model_dump_json()


def read_sizing(job: AnyJob) -> str | None:
    """What the job's model needs of memory, as JSON, from files that are here; None where that is not known: then it
    is placed by numbers of processes alone."""
    if not isinstance(job, TrainingJob):
        return None
    from launch.shape import read_shape
    from orchestrator.memory.sizing import sizing_of

    try:
        return sizing_of(job, read_shape(job.model)).model_dump_json()
    except SpecError:
        return None


@contextmanager
def told_where(document: Document) -> Iterator[None]:
    """Adds file and line to a SpecError of a yard, which knows fields alone."""
    try:
        yield
    except SpecErrors as problem:
        raise SpecErrors([_located(error, document) for error in problem.errors]) from problem
    except SpecError as problem:
        raise _located(problem, document) from problem


def _located(problem: SpecError, document: Document) -> SpecError:
    if problem.field is None or problem.file is not None:
        return problem
    at = document.error(path_of(problem.field), problem.message, code=problem.code)
    return type(problem)(
        problem.message, code=problem.code, field=problem.field, file=at.file, line=at.line, hint=problem.hint
    )
