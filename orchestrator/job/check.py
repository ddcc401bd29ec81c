"""Opens what a job file names, where the files are: on the client. Nothing heavy is imported for it."""

from __future__ import annotations

import json
import shutil
from difflib import get_close_matches
from pathlib import Path

from launch.config import HUB_ID
from launch.document import Document, FieldPath
from launch.errors import DataError
from launch.header import check_columns, columns_of, read_header
from orchestrator.errors import SpecError, SpecErrors
from orchestrator.job.spec import AnyJob, CommandJob, TrainingJob

MODEL_CONFIG = "config.json"


def check_job(job: AnyJob, document: Document) -> None:
    """Look at every file, directory and command that the job names, by its head.

    Raises:
        SpecErrors: each thing that is absent or is not what the job says, with the line that names it.
    """
    found = list(_command(job, document)) if isinstance(job, CommandJob) else list(_training(job, document))
    if found:
        raise SpecErrors(found)


def _command(job: CommandJob, document: Document) -> list[SpecError]:
    folder = Path(job.working_dir or ".")
    if not folder.is_dir():
        return [
            document.error(
                ("working_dir",), f"{folder} is not a directory", code="file-not-found", hint="make it, or name another"
            )
        ]
    if shutil.which(job.run[0]) is None and not (folder / job.run[0]).exists():
        return [
            document.error(
                ("run", 0),
                f"the command {job.run[0]} is not found",
                code="command-not-found",
                hint="run is a list of the program and its arguments: [python, train.py]",
            )
        ]
    errors = []
    for index, argument in enumerate(job.run[1:], start=1):
        if argument.endswith(".py") and not (folder / argument).exists():
            errors.append(
                document.error(
                    ("run", index),
                    f"{folder / argument} does not exist",
                    code="file-not-found",
                    hint=_near(folder / argument) or "the command runs in the job file's directory",
                )
            )
    return errors


def _training(job: TrainingJob, document: Document) -> list[SpecError]:
    return [*_model(job, document), *_data(job, document)]


def _model(job: TrainingJob, document: Document) -> list[SpecError]:
    name = job.model.name_or_path
    where: FieldPath = ("model", "name_or_path")
    if HUB_ID.match(name):
        return []  # on a hub: known when it is loaded
    folder = Path(name)
    if not folder.exists():
        hint = _near(folder) or "paths are relative to the job file; a hub id looks like org/name"
        return [document.error(where, f"the model directory {folder} does not exist", code="file-not-found", hint=hint)]
    config = folder / MODEL_CONFIG
    try:
        architecture = json.loads(config.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        architecture = None
    if architecture is None:
        return [
            document.error(
                where,
                f"{folder} is not a model directory: it has no readable {MODEL_CONFIG} with a model_type",
                code="not-a-model",
                hint="name a directory that save_pretrained wrote",
            )
        ]
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return [
            document.error(
                where, f"{folder} holds no weights", code="not-a-model", hint="copy model.safetensors into it"
            )
        ]
    return []


def _data(job: TrainingJob, document: Document) -> list[SpecError]:
    errors = []
    columns = columns_of(job)
    for part in ("train", "validation", "test"):
        for index, name in enumerate(getattr(job.data, part) or ()):
            written = document.data.get("data", {}).get(part)
            where: FieldPath = ("data", part, index) if isinstance(written, list) else ("data", part)
            try:
                _source(Path(name), columns)
            except DataError as problem:
                if problem.field:
                    where = tuple(problem.field.split("."))
                errors.append(document.error(where, problem.message, code=problem.code, hint=problem.hint))
    return errors


def _source(path: Path, columns: dict[str, str]) -> None:
    """Raises DataError unless `path` is a hub id, a saved datasets directory, or a file with `columns`."""
    if not path.exists():
        if HUB_ID.match(str(path)):
            return
        raise DataError(
            f"{path} does not exist", code="file-not-found", hint=_near(path) or "paths are relative to the job file"
        )
    if path.is_dir():
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            raise DataError(
                f"the directory {path} was not written by datasets.save_to_disk",
                code="not-a-dataset",
                hint="name the files in it instead",
            )
        return
    try:
        header = read_header(path)
    except OSError as problem:
        raise DataError(
            f"{path} cannot be read: {problem.strerror}", code="file-unreadable", hint="check its permissions"
        ) from problem
    if not header:
        raise DataError(f"{path} is empty", code="empty-data", hint="is it the right file?")
    check_columns(str(path), header, columns)


def _near(path: Path) -> str | None:
    """`did you mean …?` with the nearest name that does exist beside `path`."""
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.5)
    return f"did you mean {path.with_name(near[0])}?" if near else None
