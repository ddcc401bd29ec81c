"""TrainSpec: what training needs from a job file, validated and frozen. Torch-free.

Each section of the file is one class below, each key one field with its explanation, which is also what
`tuneyard schema` publishes. Names follow Hugging Face and Accelerate where they have one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from launch.data_spec import DataSpec, SplitSpec
from launch.document import Document
from launch.errors import Refused, SpecErrors
from launch.explain import explain
from launch.optimisation import (
    WHOLE_WEIGHTS,
    EarlyStopping,
    Half,
    LossMode,
    Metric,
    OptimSpec,
    Precision,
    half_of,
)
from launch.section import Section

__all__ = [
    "WHOLE_WEIGHTS",
    "AdapterSpec",
    "CheckpointSpec",
    "DataSpec",
    "EarlyStopping",
    "EngineChoice",
    "Half",
    "LossMode",
    "Metric",
    "ModelSpec",
    "Offload",
    "OptimSpec",
    "Precision",
    "Section",
    "SplitSpec",
    "Strategy",
    "Task",
    "TrainSpec",
    "Vocabulary",
    "exists",
    "half_of",
    "load_train_spec",
    "local_path",
    "resolve_paths",
    "validate",
]

Strategy = Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "all"]
Task = Literal["sequence-classification", "causal-lm"]
Vocabulary = Literal["whole", "used"]

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


class ModelSpec(Section):
    """Which model, and what its head does."""

    name_or_path: str = Field(min_length=1)
    """A local directory (relative to the job file) or a hub id such as `org/name`."""
    task: Task
    """The head that is trained."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Overrides every dropout probability of the model's configuration; null keeps them."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; null lets transformers choose."""
    vocabulary: Vocabulary = "whole"
    """sequence-classification: `used` trains those rows of the word embeddings alone whose tokens are in the data. The
    finished model has all of them, the others as the base model has them: less memory and a faster step."""


class AdapterSpec(Section):
    """Train a low-rank adapter instead of all weights."""

    type: Literal["lora"] = "lora"
    r: int = Field(8, ge=1)
    """Rank of the update."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead: larger ranks then learn as fast as small ones."""
    use_dora: bool = False
    """Train the length of each weight column apart from its direction (DoRA)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    """Names of the linear modules that get an adapter; `auto` and `all-linear` take every one but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole and saved beside the adapter."""
    merge: bool = False
    """Write the whole model with the adapter merged into its weights, instead of the adapter alone."""


class CheckpointSpec(Section):
    """When training state is saved so that it can be resumed, where, and for how long it is kept.

    A planned stop (`tuneyard pause`, a node that is drained) always saves, whatever the interval.
    """

    every_steps: int | Literal["auto"] | None = Field("auto", union_mode="left_to_right")
    """Save every so many steps. `auto` weighs what saves cost against what failures cost, and never lets training wait
    for saves longer than 3.5 % of its time; null saves at planned stops alone."""
    every_minutes: float | None = Field(None, gt=0)
    """Save every so many minutes, beside or instead of every_steps."""
    keep_last: int = Field(3, ge=1)
    """Older checkpoints than the newest so many are deleted."""
    keep_every: int | None = Field(None, ge=1)
    """Also keep those whose step is a multiple of this."""
    keep_best: int = Field(0, ge=0)
    """Also keep so many with the best evaluation at their step, by the metric of early_stopping, else the loss."""
    memory_every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Copy every rank's state into its node's shared memory every so many steps, so that the job goes on from there
    when a rank is killed; `auto`: as often as one hundredth of the time allows."""
    directory: str | None = None
    """Where checkpoints go: a directory (relative to the job file) or a URL such as `s3://bucket/prefix`, in which the
    job gets a folder of its own; null puts them beside the job's other files."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; false makes training wait for the storage."""
    host_memory_gb: float | None = Field(None, gt=0)
    """Most that a process may take for that copy (in 10^9 bytes); a larger state is written while training waits. null:
    its share of half of what is free."""
    on_error: Literal["continue", "stop"] = "continue"
    """What a save that fails does to the training, for example on a full disk: go on with the checkpoints that there
    are, or stop."""

    @field_validator("directory")
    @classmethod
    def _no_secrets(cls, directory: str | None) -> str | None:
        # `s3://KEY:SECRET@bucket`, or a piece of it where the secret has a slash; a port is no secret.
        host = (directory or "").partition("://")[2].partition("/")[0]
        if "@" in host or not re.fullmatch(r"[^:]*(:\d+)?", host):
            raise Refused(
                "the URL of `checkpoint.directory` has credentials in it, and a job file is stored",
                code="secret-by-value",
                hint="leave them out, and give each by `env`: AWS_SECRET_ACCESS_KEY: {from_env: AWS_SECRET_ACCESS_KEY}",
            )
        return directory

    def resolved(self, base: Path) -> CheckpointSpec:
        """With `directory` absolute against `base`, unless it is the URL of a store elsewhere."""
        if self.directory is None or ("://" in self.directory and not self.directory.startswith("file://")):
            return self
        return self.model_copy(update={"directory": str(local_path(base, self.directory.removeprefix("file://")))})


class EngineChoice(Section):
    """How state is divided over processes; shared by training jobs and a user's own command."""

    strategy: Strategy = "auto"
    """single, ddp, or DeepSpeed ZeRO stage 1, 2 or 3; `auto` lets the planner choose."""
    offload: Offload | None = None
    """Keep optimizer state, or optimizer state and parameters, in host memory (ZeRO only); null lets the planner
    choose: only where it would not fit otherwise."""
    offload_path: str | None = None
    """A directory on the nodes' own disks (NVMe) for what `offload` moves, instead of host memory. ZeRO-3 only."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> EngineChoice:
        if self.offload not in (None, "none") and self.strategy in ("single", "ddp"):
            raise Refused(
                f"`offload: {self.offload}` needs a ZeRO strategy; `{self.strategy}` keeps all state in place",
                at=("offload",),
                hint="take `strategy: zero2` (or zero1, zero3), or `offload: none`",
            )
        if self.offload == "all" and self.strategy in ("zero1", "zero2"):
            raise Refused(
                f"`offload: all` moves parameters, which `{self.strategy}` does not shard",
                at=("offload",),
                hint="take `strategy: zero3`, or `offload: optimizer`",
            )
        return self

    @model_validator(mode="after")
    def _disks_are_for_zero3(self) -> EngineChoice:
        if self.offload_path is None:
            return self
        if not Path(self.offload_path).is_absolute():
            raise Refused(
                f"`{self.offload_path}` is not absolute, and every node looks for it on a disk of its own",
                at=("offload_path",),
                code="invalid-value",
                hint="give the whole path, such as `/local_nvme/tuneyard`",
            )
        if self.offload == "none":
            raise Refused(
                "`offload_path` is where `offload` moves things to, and `offload: none` moves none",
                at=("offload_path",),
                hint="take `offload: optimizer` or `offload: all`, or leave `offload_path` out",
            )
        if self.strategy not in ("auto", "zero3"):
            raise Refused(
                f"only ZeRO-3 moves state to a disk; on `{self.strategy}` it would stay in memory",
                at=("offload_path",),
                hint="take `strategy: zero3`, or leave `offload_path` out",
            )
        return self


class TrainSpec(EngineChoice):
    """Everything `launch` needs to train; runs alone or inside a job."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    """Lower-case letters, digits and hyphens, at most 63 characters (a DNS label, so that it can name a pod)."""
    model: ModelSpec
    data: DataSpec
    train: OptimSpec
    adapter: AdapterSpec | None = None
    checkpoint: CheckpointSpec = CheckpointSpec()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Accelerate trackers that get the metrics."""
    output_dir: str | None = None
    """Where the model directory goes, relative to the job file; null puts it beside the run's other files."""

    @model_validator(mode="after")
    def _task_fits(self) -> TrainSpec:
        if self.model.task == "sequence-classification":
            self._is_classification()
        _check_task(self.train, self.model.task, self.adapter)
        if self.model.vocabulary == "used":
            self._trains_embeddings()
        if self.train.optimizer in WHOLE_WEIGHTS and self.strategy in ("zero1", "zero2", "zero3"):
            raise Refused(
                f"{self.train.optimizer} {WHOLE_WEIGHTS[self.train.optimizer]}, and `{self.strategy}` gives an "
                "optimizer flat pieces of the weights",
                at=("train", "optimizer"),
                hint="take `strategy: ddp` (the state is small anyway), or the optimizer adamw or lion",
            )
        if self.offload_path is not None and self.offload == "all" and self.train.keep_best:
            raise Refused(
                "`keep_best` copies the weights in memory, and `offload: all` to a disk leaves none there",
                at=("train", "keep_best"),
                hint="leave it out, or take `offload: optimizer`",
            )
        return self

    def _trains_embeddings(self) -> None:
        why = (
            "a language model needs all rows for its logits"
            if self.model.task == "causal-lm"
            else "an adapter leaves them as they are"
            if self.adapter is not None
            else None
        )
        if why is not None:
            raise Refused(
                f"`vocabulary: used` trains a part of the word embeddings, and {why}",
                at=("model", "vocabulary"),
                hint="leave it out, or take `whole`",
            )

    def _is_classification(self) -> None:
        for key in ("prompt_column", "messages_column"):
            if getattr(self.data, key) is not None:
                raise Refused(
                    f"`data.{key}` is for causal-lm; sequence-classification reads `text_column`",
                    at=("data", key),
                    hint="take `task: causal-lm`, or `text_column` and `label_column`",
                )
        for at, asked in ((("data", "packing"), self.data.packing), (("train", "samples"), self.train.samples > 0)):
            if asked:
                raise Refused(
                    f"`{'.'.join(at)}` is for causal-lm", at=at, hint="leave it out, or take `task: causal-lm`"
                )


def _check_task(train: OptimSpec, task: Task, adapter: AdapterSpec | None) -> None:
    """Raises Refused where an option of the optimisation means nothing for the task."""
    if train.early_stopping is not None:
        known = ("loss", "perplexity") if task == "causal-lm" else ("loss", "accuracy", "f1_macro", "mcc")
        if train.early_stopping.metric not in known:
            raise Refused(
                f"`{train.early_stopping.metric}` is not measured for {task}",
                at=("train", "early_stopping", "metric"),
                code="unknown-value",
                hint=f"take one of: {', '.join(known)}",
            )
    if train.class_weights is not None and task == "causal-lm":
        raise Refused(
            "`class_weights` weigh classes, and causal-lm has none",
            at=("train", "class_weights"),
            hint="remove it, or take `task: sequence-classification`",
        )
    if train.freeze and adapter is not None:
        raise Refused(
            "an adapter already keeps the model's own weights fixed",
            at=("train", "freeze"),
            hint="remove `freeze`, or choose what is adapted with `adapter.target_modules`",
        )


# Keys of a job file that speak to the orchestrator; run alone, `launch` reads past them.
ORCHESTRATOR_KEYS = (
    "queue", "priority", "resources", "retry", "max_duration", "env", "after", "array", "array_at_once", "array_of",
)  # fmt: skip

S = TypeVar("S", bound=Section)


def validate(kind: type[S], document: Document) -> S:
    """`document` as a `kind`.

    Raises:
        SpecErrors: every fault at once, each with its line, field, the nearest valid name and a remedy.
    """
    try:
        # Through JSON, so that strict mode reads lists as tuples and text as literals, and nothing else.
        return kind.model_validate_json(json.dumps(document.data))
    except ValidationError as problem:
        raise SpecErrors(explain(kind, document, problem)) from problem


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; no for a name that no file system takes, where Path.exists raises."""
    try:
        return path.exists()
    except OSError:
        return False


def local_path(base: Path, name: str) -> Path:
    """`name` absolute against `base`; `~` is the home directory. Whether there is such a thing is not asked."""
    path = Path(name)
    if path.parts[:1] == ("~",):
        path = path.expanduser()
    try:
        return (base / path).resolve()
    except OSError:  # a name longer than file systems take
        return base.absolute() / path


def resolve_paths(spec: TrainSpec, base: Path) -> TrainSpec:
    """`spec` with every local path absolute against `base`, the job file's directory.

    A name is a hub id if it looks like `name` or `org/name`, nothing of that name lies under `base`, and no directory
    `org` does: then it is a slip in a path.
    """

    def absolute(name: str) -> str:
        path = local_path(base, name)
        parts = Path(name).parts
        here = exists(path) or "." in Path(name).suffix or (len(parts) > 1 and exists(base / parts[0]))
        return str(path) if here or not HUB_ID.match(name) else name

    def files(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(absolute(name) for name in names)

    data = spec.data.model_copy(
        update={part: files(getattr(spec.data, part)) for part in ("train", "validation", "test")}
    )
    if data.chat_template is not None:
        data = data.model_copy(update={"chat_template": str(local_path(base, data.chat_template))})
    model = spec.model.model_copy(update={"name_or_path": absolute(spec.model.name_or_path)})
    output = None if spec.output_dir is None else str(local_path(base, spec.output_dir))
    return spec.model_copy(
        update={"data": data, "model": model, "output_dir": output, "checkpoint": spec.checkpoint.resolved(base)}
    )


def load_train_spec(document: Document, *, planned: bool = True) -> TrainSpec:
    """The TrainSpec inside a job file, for `launch` run alone; not `planned`, it is only looked at.

    Raises:
        SpecError: a fault in the file, a `run:` job, an array, or `strategy: auto`, which only the planner resolves.
    """
    if "run" in document.data:
        raise document.error(
            ("run",), "a `run:` job starts the user's own command; there is nothing for launch to train",
            code="not-a-training-job", hint="use `tuneyard run FILE`",
        )  # fmt: skip
    if planned and document.data.get("array") is not None:
        raise document.error(
            ("array",), "an `array` is many jobs, and launch trains one",
            code="is-array", hint="submit it to a yard, or take the key out and pass one element's values with --set",
        )  # fmt: skip
    data = {key: value for key, value in document.data.items() if key not in ORCHESTRATOR_KEYS}
    alone = Document(path=document.path, data=data, lines=document.lines, overrides=document.overrides)
    spec = validate(TrainSpec, alone)
    if planned and spec.strategy == "auto":
        raise document.error(
            ("strategy",),
            "`strategy: auto` is resolved by the planner, which launch does not run",
            code="unresolved-strategy",
            hint="see what it takes with `tuneyard plan FILE`, then pass it: --set strategy=ddp",
        )
    return resolve_paths(spec, (document.path or Path()).resolve().parent)
