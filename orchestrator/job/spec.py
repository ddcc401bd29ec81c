"""JobSpec: what the user asked for, validated and frozen. Pure: `check` is what opens the files that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from launch.config import CheckpointSpec, Section, TrainSpec, local_path, resolve_paths, validate
from launch.document import Document, FieldPath, is_text
from launch.errors import Refused, SpecError, SpecErrors
from launch.explain import unknown_key
from orchestrator.job.fields import MAX_ELEMENTS, SLUG, AtOnce, Duration, Elements, JobId, Priority

MAX_PROCESSES = 65536
MAX_AFTER = 1000
MAX_RULES = 20
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
ENV_ARRAY_INDEX = "TUNEYARD_ARRAY_INDEX"


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


class RetryRule(Section):
    """How a failure is taken that is known by its exit status, or by what the end of the failed rank's log says."""

    exit_code: Annotated[int, Field(ge=1, le=255)] | None = None
    log: Annotated[str, Field(min_length=3, max_length=200)] | None = None
    """What a line contains; * stands for anything."""
    then: Literal["fail", "retry", "elsewhere"]
    """fail: no restart; retry: a restart after a while; elsewhere: one at once, on other nodes if they will do."""

    @model_validator(mode="after")
    def _is_told_by_one_thing(self) -> RetryRule:
        if (self.exit_code is None) == (self.log is None):
            raise Refused(
                "a rule holds for an exit code or for a line of the log",
                code="conflict",
                hint="write either `exit_code: 75` or `log: uncorrectable ECC error`, and what `then` follows",
            )
        return self


class Retry(Section):
    """What a crash or a lost node costs."""

    max_restarts: int = Field(3, ge=0)
    """How often the job is started again after a failure that was not its own fault."""
    hang_after: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Seconds for which a rank may stay in one part of a step, or in one batch of an evaluation, before the training's
    gang is ended and started again. `auto`: two minutes, five for evaluations, and ten times the longest before.
    Loading and saving have longer ones of their own. 0: nothing is ever ended for it."""
    restarts: dict[Literal["crashed", "killed", "node-lost", "hung"], Annotated[int, Field(ge=0)]] = {}
    """Causes with a budget of their own; all others share max_restarts."""
    rules: Annotated[tuple[RetryRule, ...], Field(max_length=MAX_RULES)] = ()
    """What else than usual is to follow from a failure: the first that holds counts."""

    @property
    def log_patterns(self) -> tuple[str, ...]:
        return tuple(rule.log for rule in self.rules if rule.log is not None)


class FromEnvironment(Section):
    """A value that is looked up where the job runs, so that it is never stored."""

    from_env: Annotated[str, Field(pattern=ENV_NAME)]
    """Name of a variable in the environment of the node's agent."""


class ArrayElement(Section):
    """The place of a job in the array that it was made for."""

    id: JobId
    """The same for all elements."""
    index: int = Field(ge=0, lt=MAX_ELEMENTS)
    at_once: AtOnce | None = None
    """How many elements may run at the same time; the same for all."""


class JobSpec(Section):
    """What every job file may say to the orchestrator; a TrainingJob or a CommandJob says what runs."""

    name: Annotated[str, Field(pattern=SLUG)]
    """Lower-case letters, digits and hyphens, at most 63 characters."""
    queue: str = Field("default", pattern=SLUG)
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
    after: tuple[JobId, ...] = ()
    """Ids of jobs that must have succeeded before this one starts; if one fails or is cancelled, this one fails."""
    array: Elements | None = None
    """Several jobs from one file: how many copies, or lists of values by dotted key, of which all combinations run."""
    array_at_once: AtOnce | None = None
    """How many jobs of the array may run at the same time; null for as many as find room."""
    array_of: SkipJsonSchema[ArrayElement | None] = None
    """Which element of which array it is; never in a file."""

    @field_validator("after")
    @classmethod
    def _once_each(cls, after: tuple[str, ...]) -> tuple[str, ...]:
        if len(after) > MAX_AFTER:
            raise Refused(
                f"`after` names {len(after)} jobs; the most is {MAX_AFTER}",
                code="out-of-range",
                hint="let one job come after them all, and others after that",
            )
        for index, job_id in enumerate(after):
            if job_id in after[:index]:
                raise Refused(f"`after` names {job_id} twice", at=(index,), code="duplicate-value", hint="name it once")
        return after

    @field_validator("array")
    @classmethod
    def _is_expanded(cls, array: Any) -> Any:
        """A JobSpec is one job: what `job.array` makes of a file's array has none."""
        if array is not None:
            raise Refused(
                "`array` makes several jobs of this file, and here is place for one",
                code="is-array",
                hint="queue all with `tuneyard submit`; for a single one, leave it out: --set array=null",
            )
        return array

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
    def _bytes_are_for_cpus(self) -> TrainingJob:
        """With `precision: int8` any accelerator is a CPU."""
        if self.train.precision == "int8" and self.resources.accelerator == "any":
            # Frozen from here on. Keys as they come, before types are checked, would be checked by looser rules.
            object.__setattr__(self, "resources", self.resources.model_copy(update={"accelerator": "cpu"}))
        return self

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
        if self.train.precision == "int8" and self.resources.accelerator != "cpu":
            asked = self.resources.accelerator
            raise Refused(
                f"`train.precision: int8` is for CPUs, and the job asks for `accelerator: {asked}`",
                at=("train", "precision"),
                hint="on a GPU take bf16 or auto; for int8, `accelerator: cpu`",
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


def array_env(job: AnyJob) -> dict[str, str]:
    """What the environment of a command's ranks says of its place in an array.

    A training has no code of its user's to read it, and with a variable of its own no standby could serve it.
    """
    if job.array_of is None or isinstance(job, TrainingJob):
        return {}
    return {ENV_ARRAY_INDEX: str(job.array_of.index)}


def load_job(document: Document) -> AnyJob:
    """The job that a file describes, its paths absolute against the file's directory.

    Raises:
        SpecErrors: every fault of the file at once; a file with an `array`, which is for `job.array`.
    """
    if document.data.get("array_of") is not None:
        raise document.error(
            ("array_of",),
            "`array_of` is the yard's own: it says which element of an array a job is",
            code="reserved-name",
            hint="remove it; to make an array, write `array`",
        )
    if document.data.get("array_at_once") is not None and "array" not in document.data:
        raise document.error(
            ("array_at_once",),
            "`array_at_once` bounds the jobs of an array, and the file has no `array`",
            code="inconsistent",
            hint="add `array`, or remove it",
        )
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
    document = received(data)
    return validate(CommandJob, document) if _kind(document) is CommandJob else validate(TrainingJob, document)


def received(data: dict[str, Any]) -> Document:
    """JSON that came over the network. Raises SpecError if a text in it is none that a database can hold."""
    document = Document(path=None, data=data)
    for where, text in _texts(data):
        if not is_text(text):
            raise document.error(where, "a character that is no text", code="not-text", hint="remove it")
    return document


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
