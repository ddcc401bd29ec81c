"""Opens what a job file names, where the files are: on the client. Nothing heavy is imported for it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from difflib import get_close_matches
from pathlib import Path

from launch.config import HUB_ID, exists
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
    found += _checkpoints(job, document)
    if found:
        raise SpecErrors(found)


def _command(job: CommandJob, document: Document) -> list[SpecError]:
    folder = Path(job.working_dir or ".")
    if not exists(folder) or not folder.is_dir():
        message = f"{folder} is not a directory"
        return [document.error(("working_dir",), message, code="file-not-found", hint="make it, or name another")]
    errors = []
    if not _is_command(folder, job.run[0]):
        words = job.run[0].split()
        if len(words) > 1:
            hint = f"run is a list of the program and its arguments: [{', '.join(words)}]"
        elif exists(folder / job.run[0]):
            hint = f"it is not executable: chmod +x {folder / job.run[0]}, or run: [python, {job.run[0]}]"
        else:
            hint = "is it installed, and on the PATH? run is a list: [python, train.py]"
        errors.append(
            document.error(("run", 0), f"the command {job.run[0]} is not found", code="command-not-found", hint=hint)
        )
    for index, argument in enumerate(job.run[1:], start=1):
        if argument.endswith(".py") and not exists(folder / argument):
            errors.append(
                document.error(
                    ("run", index),
                    f"{folder / argument} does not exist",
                    code="file-not-found",
                    hint=_near(folder / argument) or "the command runs in the job file's directory",
                )
            )
    return errors


def _is_command(folder: Path, name: str) -> bool:
    """Whether the launcher would find the program: on the PATH, beside this Python, or as a path from `folder`."""
    if "/" in name:
        path = folder / name
        return exists(path) and path.is_file() and os.access(path, os.X_OK)
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])) is not None


def _training(job: TrainingJob, document: Document) -> list[SpecError]:
    return [*_model(job, document), *_data(job, document), *_chat_template(job, document)]


def _model(job: TrainingJob, document: Document) -> list[SpecError]:
    name = job.model.name_or_path
    where: FieldPath = ("model", "name_or_path")
    if HUB_ID.match(name):
        return []  # on a hub: known when it is loaded
    folder = Path(name)
    if not exists(folder):
        hint = _near(folder) or "paths are relative to the job file; a hub id looks like org/name"
        return [document.error(where, f"the model directory {folder} does not exist", code="file-not-found", hint=hint)]
    config = folder / MODEL_CONFIG
    try:
        architecture = json.loads(config.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        architecture = None
    if architecture is None:
        return [
            document.error(
                where,
                f"{folder} is not a model directory: it has no {MODEL_CONFIG} with a model_type",
                code="not-a-model",
                hint=_models_in(folder) or "name a directory that save_pretrained wrote",
            )
        ]
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return [
            document.error(
                where, f"{folder} holds no weights", code="not-a-model", hint="copy model.safetensors into it"
            )
        ]
    return []


def _models_in(folder: Path) -> str | None:
    """A hint at the model directories one level down."""
    found = sorted(path.parent for path in folder.glob(f"*/{MODEL_CONFIG}"))
    return f"did you mean {found[0]}?" if found else None


def _data(job: TrainingJob, document: Document) -> list[SpecError]:
    errors = []
    for part in ("train", "validation", "test"):
        columns = columns_of(job, part)
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


def _chat_template(job: TrainingJob, document: Document) -> list[SpecError]:
    if job.data.chat_template is None:
        return []
    path = Path(job.data.chat_template)
    if exists(path) and path.is_file():
        return []
    return [
        document.error(
            ("data", "chat_template"),
            f"the chat template {path} does not exist",
            code="file-not-found",
            hint=_near(path) or "name a file with a Jinja template, relative to the job file",
        )
    ]


def _checkpoints(job: AnyJob, document: Document) -> list[SpecError]:
    """Whether checkpoints can go where the job says; whether the store answers, the ranks find out."""
    directory = job.checkpoint.directory
    if directory is None or "://" not in directory:
        return []
    from fsspec.registry import known_implementations  # few jobs need it

    where: FieldPath = ("checkpoint", "directory")
    scheme = directory.partition("://")[0]
    if scheme not in known_implementations:
        near = get_close_matches(scheme, known_implementations, n=1, cutoff=0.6)
        hint = (f"did you mean {near[0]}://? " if near else "") + "write a directory, or s3://bucket/prefix"
        return [document.error(where, f"no store of the kind {scheme}:// is known", code="unknown-storage", hint=hint)]
    package = known_implementations[scheme]["class"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        install = "pip install 'tuneyard[s3]'" if package == "s3fs" else f"pip install {package}"
        message = f"checkpoints in {scheme}:// need the package {package}, which is not installed"
        return [document.error(where, message, code="storage-not-installed", hint=f"{install}, here and on every node")]
    return []


def _source(path: Path, columns: dict[str, str]) -> None:
    """Raises DataError unless `path` is a hub id, a saved datasets directory, or a file with `columns`."""
    if not exists(path):
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
    if not exists(path.parent) or not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.5)
    return f"did you mean {path.with_name(near[0])}?" if near else None
