"""JobSpec: what the user asked for, validated and frozen. Pure: `check` is what opens the files that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, field_validator, model_validator

from launch.config import CheckpointSpec, Section, TrainSpec, local_path, resolve_paths, validate
from launch.document import Document, FieldPath, is_text
from launch.errors import Refused, SpecError, SpecErrors
from launch.explain import unknown_key

PRIORITIES = {"low": -100, "normal": 0, "high": 100}
MAX_PROCESSES = 65536
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"


def _seconds(value: Any) -> Any:
    """`2h`, `30m`, `90s`, `1d` or a number of seconds."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", value.strip())
        if match is None:
            raise Refused(f"`{value}` is not a duration", code="bad-duration", hint="write 90s, 30m, 2h or 1d")
        return float(match[1]) * UNITS[match[2]]
    return value


def _priority(value: Any) -> Any:
    if isinstance(value, str):
        if value not in PRIORITIES:
            near = get_close_matches(value, PRIORITIES, n=1, cutoff=0.5)
            raise Refused(
                f"`{value}` is not a priority",
                code="unknown-value",
                hint=(f"did you mean `{near[0]}`? " if near else "") + "write low, normal, high or a whole number",
            )
        return PRIORITIES[value]
    return value


DURATION = r"^\d+(\.\d+)?\s*[smhd]$"
Written = Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=DURATION)]
Duration = Annotated[float, Field(gt=0), BeforeValidator(_seconds, json_schema_input_type=Written)]
Priority = Annotated[
    int,
    Field(ge=-1000, le=1000),
    BeforeValidator(
        _priority, json_schema_input_type=Annotated[int, Field(ge=-1000, le=1000)] | Literal["low", "normal", "high"]
    ),
]


class Resources(Section):
    """The gang: all of it starts together or nothing does."""

    num_processes: Annotated[int, Field(ge=1, le=MAX_PROCESSES)] | Annotated[str, Field(pattern=r"^\d+\.\.\d+$")] = 1
    """One process a GPU. The string `2..8` lets the yard choose within the bounds."""
    accelerator: str = Field("any", pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._/-]*$")
    """any, cpu, gpu, or a GPU type such as H100."""

    @field_validator("num_processes", mode="before")
    @classmethod
    def _is_a_number_or_bounds(cls, value: Any) -> Any:
        ordered = False
        if isinstance(value, str):
            match = re.fullmatch(r"(\d{1,5})\.\.(\d{1,5})", value)
            ordered = match is not None and 1 <= int(match[1]) <= int(match[2]) <= MAX_PROCESSES
        if ordered or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_PROCESSES):
            return value
        raise Refused(
            f"`{'null' if value is None else value}` is no number of processes",
            code="out-of-range" if isinstance(value, int | str) and not isinstance(value, bool) else "wrong-type",
            hint="write a whole number of at least 1, or bounds in ascending order such as 2..8",
        )

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most processes."""
        if isinstance(self.num_processes, int):
            return self.num_processes, self.num_processes
        low, high = self.num_processes.split("..")
        return int(low), int(high)


class Retry(Section):
    """What a crash or a lost node costs."""

    max_restarts: int = Field(3, ge=0)
    """How often the job is started again after a failure that was not its own fault."""


class FromEnvironment(Section):
    """A value that is looked up where the job runs, so that it is never stored."""

    from_env: Annotated[str, Field(pattern=ENV_NAME)]
    """Name of a variable in the environment of the node's agent."""


class JobSpec(Section):
    """What every job file may say to the orchestrator; a TrainingJob or a CommandJob says what runs."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    """Lower-case letters, digits and hyphens, at most 63 characters."""
    queue: str = Field("default", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """The tenant whose share is used."""
    priority: Priority = 0
    """low, normal, high or a whole number; higher starts first."""
    resources: Resources = Resources()
    retry: Retry = Retry()
    max_duration: Duration | None = None
    """Time the job may run over all its attempts; then it is stopped and fails."""
    env: dict[Annotated[str, Field(pattern=ENV_NAME)], str | FromEnvironment] = {}
    """Environment variables. A secret is given as {from_env: NAME}, never by value."""
    checkpoint: CheckpointSpec = CheckpointSpec()

    @field_validator("env", mode="before")
    @classmethod
    def _is_text(cls, env: Any) -> Any:
        for name, value in env.items() if isinstance(env, dict) else ():
            if not isinstance(value, str | dict | FromEnvironment):
                shown = json.dumps(value, default=str)
                raise Refused(
                    f"`env.{name}` is {shown}; the environment holds text",
                    at=(name,),
                    code="wrong-type",
                    hint=f'put it in quotes: "{shown}"' if isinstance(value, int | float) else "write it as text",
                )
        return env

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str | FromEnvironment]) -> dict[str, str | FromEnvironment]:
        for name, value in env.items():
            if name.startswith("TUNEYARD_"):
                raise Refused(
                    f"`{name}` is the yard's own: it sets every variable that starts with TUNEYARD_",
                    at=(name,),
                    code="reserved-name",
                    hint="choose another name",
                )
            if isinstance(value, str) and SECRET_NAME.search(name):
                raise Refused(
                    f"`env.{name}` looks like a secret, and a job file is stored",
                    at=(name,),
                    code="secret-by-value",
                    hint=f"write `{name}: {{from_env: {name}}}` and set {name} where the yard runs",
                )
        return env


class TrainingJob(TrainSpec, JobSpec):
    """A job that `launch` trains."""

    @model_validator(mode="after")
    def _gang_fits_strategy(self) -> TrainingJob:
        low, high = self.resources.bounds
        if self.strategy == "single" and low > 1:
            raise Refused(
                f"`strategy: single` is one process, and the job asks for {self.resources.num_processes}",
                at=("resources", "num_processes"),
                hint="ask for 1, or take strategy ddp, zero1, zero2, zero3 or auto",
            )
        if self.train.precision == "fp16" and self.resources.accelerator == "cpu":
            raise Refused(
                "`train.precision: fp16` needs a GPU, and the job asks for `accelerator: cpu`",
                at=("train", "precision"),
                hint="on a CPU take bf16 or fp32",
            )
        if high > self.train.global_batch_size:
            rows = self.train.global_batch_size
            raise Refused(
                f"{high} processes cannot share a `train.global_batch_size` of {rows}: each needs a row a step",
                at=("resources", "num_processes"),
                hint=f"ask for at most {rows} processes, or raise train.global_batch_size to {high}",
            )
        return self

    def train_spec(self) -> TrainSpec:
        """The part that the ranks are given."""
        return TrainSpec.model_validate({name: getattr(self, name) for name in TrainSpec.model_fields})


class CommandJob(JobSpec):
    """A job that runs the user's own command once per process, with RANK, WORLD_SIZE and a rendezvous set."""

    run: tuple[str, ...] = Field(min_length=1)
    """The command and its arguments, as a list; it runs in the job file's directory."""
    strategy: Literal["auto", "single", "ddp"] = "auto"
    """How the launcher sets the processes up; a script that uses DeepSpeed configures it itself."""
    working_dir: str | None = None
    """Directory the command runs in; null means the job file's."""


AnyJob = TrainingJob | CommandJob
_stored: TypeAdapter[AnyJob] = TypeAdapter(AnyJob)


def load_job(document: Document) -> AnyJob:
    """The job that a file describes, its paths absolute against the file's directory.

    Raises:
        SpecErrors: every fault of the file at once.
    """
    base = (document.path or Path("job.yaml")).absolute().parent
    if _kind(document) is CommandJob:
        job = validate(CommandJob, document)
        return job.model_copy(
            update={
                "working_dir": str(local_path(base, job.working_dir or ".")),
                "checkpoint": job.checkpoint.resolved(base),
            }
        )
    spec = validate(TrainingJob, document)
    resolved = resolve_paths(spec, base)
    assert isinstance(resolved, TrainingJob)
    return resolved


def _kind(document: Document) -> type[TrainingJob] | type[CommandJob]:
    """What kind of job a file describes. Raises SpecError if both or neither."""
    training = [key for key in ("model", "data", "train") if key in document.data]
    if "run" in document.data and training:
        raise document.error(
            ("run",),
            f"a job either runs a command or trains a model; this one has both `run` and `{training[0]}`",
            code="run-and-model",
            hint=f"remove `run`, or remove `{'`, `'.join(training)}`",
        )
    if "run" not in document.data and not training:
        raise SpecErrors(list(_nothing_to_do(document)))
    return TrainingJob if training else CommandJob


def _nothing_to_do(document: Document) -> Iterator[SpecError]:
    yield document.error(
        (),
        "nothing to do: a job either trains a model (`model`, `data`, `train`) or runs a command (`run`)",
        code="nothing-to-do",
        hint="add the one or the other; `tuneyard init` writes a file of either kind",
    )
    known = {*TrainingJob.model_fields, *CommandJob.model_fields}
    for key in document.data:
        if key not in known:
            yield unknown_key(
                TrainingJob if get_close_matches(key, TrainingJob.model_fields) else CommandJob, document, (key,)
            )


def check_submission(data: dict[str, Any]) -> AnyJob:
    """A job that came over the network, from a client that has already made its paths absolute.

    Raises:
        SpecErrors: every fault at once, each with its field.
    """
    document = Document(path=None, data=data)
    for where, text in _texts(data):
        if not is_text(text):
            raise document.error(where, "a character that is no text", code="not-text", hint="remove it")
    return validate(CommandJob, document) if _kind(document) is CommandJob else validate(TrainingJob, document)


def _texts(data: dict[str, Any]) -> Iterator[tuple[FieldPath, str]]:
    """Every text in JSON data, keys too, with the path of the nearest key that is whole."""
    left: list[tuple[FieldPath, Any]] = [((), data)]
    while left:
        where, value = left.pop()
        if isinstance(value, str):
            yield where, value
        elif isinstance(value, dict):
            for key, inside in value.items():
                yield where, key
                left.append(((*where, key), inside))
        elif isinstance(value, list):
            left += [((*where, index), inside) for index, inside in enumerate(value)]


def dump_job(job: AnyJob) -> str:
    """`job` as JSON that parse_job reads back."""
    return job.model_dump_json()


def parse_job(text: str | bytes) -> AnyJob:
    """A stored job. Raises pydantic.ValidationError: it was validated when it was stored."""
    return _stored.validate_json(text, strict=False)


def job_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a job file, for editors."""
    schema = _stored.json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Tuneyard job file"
    return schema
