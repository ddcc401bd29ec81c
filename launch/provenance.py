"""`run.json`: all that it takes to run a finished training again, and to say what is another now. Torch-free.

Rank 0 writes it into the model directory (`launch.witness` adds what torch knows); `tuneyard reproduce` reads it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

import launch
from launch.config import TrainSpec, exists
from launch.contract import ExecutionPlan, GitState, Record
from launch.errors import SpecError, SpecErrors
from launch.git import git_state

RECORD = "run.json"
FORMAT = 1
"""Raised when an older version could no longer run a newer record again."""
PACKAGES = (
    "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "tokenizers", "numpy", "safetensors",
)  # fmt: skip


class NodeUse(Record):
    """What a run used of one node; which one it was is nobody's business outside of the yard."""

    processes: int
    threads: int
    """CPU threads of each process, as they were asked for."""
    gpus: int = 0


class BaseWeights(Record):
    """Which weights the training began with."""

    files: dict[str, str] = {}
    """Of a local directory: SHA-256 of the configuration and of each weight file, by name."""
    commit: str | None = None
    """Of a hub id."""


class Surroundings(Record):
    """What a run ran on: all that can change its numbers beside the job, its data and its plan."""

    versions: dict[str, str]
    """Of the packages that take part, by name."""
    python: str
    system: str
    cpu: str
    cpu_capability: str | None = None
    """The instruction set that torch chose; null where torch was not asked."""
    gpus: tuple[str, ...] = ()
    """By rank; empty on a CPU."""
    tuneyard: GitState | None = None
    """Tuneyard's own, where it runs from a checkout."""


class RunRecord(Record):
    """One finished training."""

    format: int = FORMAT
    job: str
    """The job's ID."""
    spec: TrainSpec
    """The job, every default resolved and every path absolute."""
    seed: int
    """Of every random number: rank r draws from `seed` + r, new weights from `seed` and their names alone."""
    plan: ExecutionPlan
    nodes: tuple[NodeUse, ...]
    threads: tuple[int, ...]
    """CPU threads by rank, as torch used them."""
    env: tuple[str, ...] = ()
    """Names of the job's own environment variables. Their values may be secrets, and are not here."""
    data: dict[str, str]
    """Fingerprint of each part of the data, as it was trained on and measured on: tokenised, in its order."""
    base: BaseWeights
    job_file: GitState | None
    surroundings: Surroundings
    attempts: int
    """The attempt that finished; those before it had failed or were stopped."""
    resumed_at: int = 0
    """The step of the checkpoint from which the last attempt went on; 0 if it began from the start."""
    command: str
    """What runs it again."""


class Difference(Record):
    """Something that was one thing in a run and is another in its repetition."""

    what: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"


def versions() -> dict[str, str]:
    """Version by package; one that is not installed is left out."""
    found = {"tuneyard": launch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def surroundings() -> Surroundings:
    """This machine and this installation, as far as they are known without torch."""
    here = git_state(Path(launch.__file__))
    return Surroundings(
        versions=versions(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        # A package installed below somebody else's repository is not of it.
        tuneyard=here if here is not None and here.path is not None else None,
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def base_files(directory: Path) -> dict[str, str]:
    """SHA-256 by name of what decides a local model's weights: its configuration and weight files.

    Raises:
        OSError: one of them cannot be read.
    """
    weights = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    config = [path for path in (directory / "config.json",) if path.is_file()]
    return {path.name: _sha256(path) for path in (*config, *weights)}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_record(directory: Path) -> RunRecord:
    """The record of the run that wrote the model directory `directory`.

    Raises:
        SpecError: there is no such directory, no record in it, or none that this version can run again.
    """
    if not exists(directory) or not directory.is_dir():
        raise SpecError(
            f"{directory} is not a directory", code="file-not-found", hint="name the model directory of a finished job"
        )
    path = directory / RECORD
    try:
        told = json.loads(path.read_bytes())
        form = int(told["format"])
    except FileNotFoundError:
        raise SpecError(
            f"{directory} has no {RECORD}, so nothing says how it was made",
            code="no-record",
            file=path,
            hint="training jobs of this version leave one; run the job file again with `tuneyard run`",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise SpecError(
            f"{RECORD} cannot be read: {problem}",
            code="bad-record",
            file=path,
            hint="take an unchanged copy of the model directory",
        ) from problem
    if form > FORMAT:
        raise SpecError(
            f"{RECORD} is of format {form}, and this tuneyard {launch.__version__} knows formats up to {FORMAT}",
            code="newer-record",
            file=path,
            hint=f"install tuneyard {_wrote(told)}, which wrote it",
        )
    try:
        return RunRecord.model_validate_json(json.dumps(told))
    except ValidationError as problem:
        first = problem.errors(include_input=False)[0]
        raise SpecError(
            f"{RECORD} is not what this tuneyard {launch.__version__} would write: {first['msg']}",
            code="bad-record",
            field=".".join(str(part) for part in first["loc"]),
            file=path,
            hint=f"it was written by tuneyard {_wrote(told)}: install that version, or take an unchanged copy",
        ) from problem


def _wrote(told: dict[str, object]) -> str:
    """The version that wrote a record which may hold anything."""
    around = told.get("surroundings")
    found = around.get("versions") if isinstance(around, dict) else None
    return str(found.get("tuneyard", "of a newer version")) if isinstance(found, dict) else "of a newer version"


def check_inputs(record: RunRecord) -> None:
    """See that what the run read is still there, and that the base model is still the same.

    Whether the data are, their fingerprints say once they are tokenised.

    Raises:
        SpecErrors: all that is gone or changed.
    """
    found = [*_gone(record.spec), *_changed(record)]
    if found:
        raise SpecErrors(found)


def _gone(spec: TrainSpec) -> Iterator[SpecError]:
    named = [("model.name_or_path", spec.model.name_or_path), ("data.chat_template", spec.data.chat_template)]
    named += [
        (f"data.{part}", name) for part in ("train", "validation", "test") for name in getattr(spec.data, part) or ()
    ]
    for field, name in named:
        if name is not None and Path(name).is_absolute() and not exists(Path(name)):
            yield SpecError(
                f"{name} is gone; the run read it",
                code="file-not-found",
                field=field,
                hint="put it back there: the record names files by their absolute paths",
            )


def _changed(record: RunRecord) -> Iterator[SpecError]:
    directory = Path(record.spec.model.name_or_path)
    if not directory.is_absolute() or not exists(directory):
        return
    for name, digest in record.base.files.items():
        path = directory / name
        try:
            state = "is another file now" if _sha256(path) != digest else None
        except OSError as problem:
            state = f"cannot be read: {problem.strerror}"
        if state is not None:
            yield SpecError(
                f"the base model's {path} {state}",
                code="base-model-changed",
                field="model.name_or_path",
                hint=f"put back the one with the SHA-256 {digest}",
            )


def differences(then: Surroundings, now: Surroundings) -> list[Difference]:
    """What differs between two surroundings; what one of them does not know is passed over."""
    found = []
    for package in sorted({*then.versions, *now.versions}):
        found.append((package, then.versions.get(package, "absent"), now.versions.get(package, "absent")))
    found += [("Python", then.python, now.python), ("system", then.system, now.system), ("CPU", then.cpu, now.cpu)]
    if then.cpu_capability is not None and now.cpu_capability is not None:
        found.append(("CPU instructions", then.cpu_capability, now.cpu_capability))
    if then.gpus and now.gpus:
        found.append(("GPUs", ", ".join(then.gpus), ", ".join(now.gpus)))
    told = [Difference(what=what, then=before, now=after) for what, before, after in found if before != after]
    if then.tuneyard is not None and now.tuneyard is not None:
        before, after = _code(then.tuneyard), _code(now.tuneyard)
        if before != after or then.tuneyard.dirty or now.tuneyard.dirty:
            told.append(Difference(what="tuneyard's code", then=before, now=after))
    return told


def _code(git: GitState) -> str:
    return f"commit {git.commit[:12]}{' with changes' if git.dirty else ''}"
