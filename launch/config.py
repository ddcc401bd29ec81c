"""TrainSpec: what training needs from a job file, validated and frozen. Torch-free.

Each section of the file is one class below, each key one field with its explanation, which is also what
`tuneyard schema` publishes. Names follow Hugging Face and Accelerate where they have one.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from launch.document import Document, FieldPath, dotted
from launch.errors import SpecError, SpecErrors

Strategy = Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "all"]
Precision = Literal["fp32", "bf16", "fp16"]
Task = Literal["sequence-classification", "causal-lm"]
Metric = Literal["loss", "accuracy", "f1_macro", "perplexity"]

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


class Section(BaseModel):
    """A part of a job file: unknown keys and silent type conversions are refused, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def _one_or_many(value: Any) -> Any:
    """One name or a list of names; a tuple, since strict validation of Python values knows no list for it."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Files = Annotated[tuple[str, ...], BeforeValidator(_one_or_many, json_schema_input_type=str | list[str])]


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


class AdapterSpec(Section):
    """Train a low-rank adapter instead of all weights."""

    type: Literal["lora"] = "lora"
    r: int = Field(8, ge=1)
    """Rank of the update."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of the linear modules that get an adapter; `auto` takes every linear layer but the head."""


class SplitSpec(Section):
    """Cuts held-out parts from the training data, after deduplication, by a seeded shuffle."""

    test: float = Field(0.0, ge=0, lt=1)
    """Share of the rows kept for the final metrics."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of the rows used for evaluation while training and for early stopping."""
    seed: int = 0
    stratify: bool = False
    """Keep each class's share the same in every part (sequence classification)."""

    @model_validator(mode="after")
    def _leaves_something(self) -> SplitSpec:
        if self.test + self.validation >= 1:
            raise ValueError("test and validation together leave no row for training")
        return self


class DataSpec(Section):
    """Where rows come from and which columns matter."""

    train: Files = Field(min_length=1)
    """CSV, TSV, JSONL or Parquet files, a directory written by `datasets.save_to_disk`, or a hub id."""
    validation: Files | None = None
    test: Files | None = None
    """Held-out files; null where `split` cuts them from `train`."""
    split: SplitSpec | None = None
    text_column: str = "text"
    """The text (sequence classification), or the whole training text (causal-lm without prompt_column)."""
    label_column: str = "label"
    """The class (sequence classification). Classes are numbered in sorted order."""
    prompt_column: str | None = None
    """causal-lm: what the model is given. With response_column; the loss is on the response alone."""
    response_column: str | None = None
    deduplicate: bool = False
    """Drop repeated texts before splitting, so that none stands on both sides."""
    max_length: int = Field(512, ge=2)
    """Longer rows are truncated to this many tokens."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> DataSpec:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column go together: give both or neither")
        if self.split is not None:
            for part in ("test", "validation"):
                if getattr(self, part) is not None and getattr(self.split, part) > 0:
                    raise ValueError(f"`{part}` names files and `split.{part}` cuts rows: keep one of the two")
        return self


class EarlyStopping(Section):
    """Stop when an evaluation metric no longer gets better."""

    metric: Metric = "loss"
    patience: int = Field(3, ge=1)
    """How many evaluations in a row may bring no improvement."""
    min_delta: float = Field(0.0, ge=0)
    """A smaller change than this is no improvement."""


class OptimSpec(Section):
    """The optimisation itself. Nothing here depends on how many processes run it."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; or give `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; the last, smaller batch of a pass counts as a step."""
    global_batch_size: int = Field(16, ge=1)
    """Rows per optimizer step over all processes: the same for any number of them."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass of one process; null lets the planner choose. Changes speed and memory only."""
    eval_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass at evaluation; null takes twice the micro-batch."""
    learning_rate: float = Field(5e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes down to zero after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases and normalisation weights, as is customary."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm; null does not clip."""
    precision: Precision = "fp32"
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    seed: int = Field(0, ge=0, lt=2**32)
    eval_every: int | None = Field(None, ge=1)
    """Evaluate every so many steps; null evaluates at the end alone."""
    log_every: int = Field(1, ge=1)
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _length_is_given_once(self) -> OptimSpec:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("early_stopping needs eval_every: it looks at evaluations")
        return self


class CheckpointSpec(Section):
    """When training state is saved so that it can be resumed."""

    every_steps: int | None = Field(None, ge=1)
    """Save every so many steps; null saves none."""
    keep_last: int = Field(3, ge=1)
    """Older checkpoints than the newest so many are deleted."""


class EngineChoice(Section):
    """How state is divided over processes; shared by training jobs and a user's own command."""

    strategy: Strategy = "auto"
    """single, ddp, or DeepSpeed ZeRO stage 1, 2 or 3; `auto` lets the planner choose."""
    offload: Offload = "none"
    """Keep optimizer state, or optimizer state and parameters, in host memory (ZeRO only)."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> EngineChoice:
        if self.offload != "none" and self.strategy in ("single", "ddp"):
            raise ValueError(f"offload: {self.offload} needs a ZeRO strategy; {self.strategy} keeps all state in place")
        if self.offload == "all" and self.strategy in ("zero1", "zero2"):
            raise ValueError("offload: all moves parameters, which only zero3 shards; use zero3, or offload: optimizer")
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
        if self.model.task == "sequence-classification" and self.data.prompt_column is not None:
            raise ValueError("data.prompt_column is for causal-lm; sequence-classification reads text_column")
        stop = self.train.early_stopping
        if stop is not None:
            known = ("loss", "perplexity") if self.model.task == "causal-lm" else ("loss", "accuracy", "f1_macro")
            if stop.metric not in known:
                raise ValueError(
                    f"train.early_stopping.metric: {stop.metric} is not measured for {self.model.task}; "
                    f"take one of {', '.join(known)}"
                )
        return self


# Keys of a job file that speak to the orchestrator; run alone, `launch` reads past them.
ORCHESTRATOR_KEYS = ("queue", "priority", "resources", "retry", "max_duration", "env")

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
        raise SpecErrors([_explain(kind, document, dict(error)) for error in problem.errors()]) from problem


def resolve_paths(spec: TrainSpec, base: Path) -> TrainSpec:
    """`spec` with every local path absolute against `base`, the job file's directory.

    A name is a hub id if it looks like `org/name` and nothing of that name lies under `base`.
    """

    def absolute(name: str) -> str:
        path = (base / Path(name).expanduser()).resolve()
        return name if HUB_ID.match(name) and not path.exists() and "." not in Path(name).suffix else str(path)

    def files(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(absolute(name) for name in names)

    data = spec.data.model_copy(
        update={part: files(getattr(spec.data, part)) for part in ("train", "validation", "test")}
    )
    model = spec.model.model_copy(update={"name_or_path": absolute(spec.model.name_or_path)})
    output = None if spec.output_dir is None else str((base / Path(spec.output_dir).expanduser()).resolve())
    return spec.model_copy(update={"data": data, "model": model, "output_dir": output})


def load_train_spec(document: Document) -> TrainSpec:
    """The TrainSpec inside a job file, for `launch` run alone.

    Raises:
        SpecError: a fault in the file, a `run:` job, or `strategy: auto`, which only the planner resolves.
    """
    if "run" in document.data:
        raise document.error(
            ("run",), "a `run:` job starts the user's own command; there is nothing for launch to train",
            code="not-a-training-job", hint="use `tuneyard run FILE`",
        )  # fmt: skip
    data = {key: value for key, value in document.data.items() if key not in ORCHESTRATOR_KEYS}
    alone = Document(path=document.path, data=data, lines=document.lines, overrides=document.overrides)
    spec = validate(TrainSpec, alone)
    if spec.strategy == "auto":
        raise document.error(
            ("strategy",),
            "`strategy: auto` is resolved by the planner, which launch does not run",
            code="unresolved-strategy",
            hint="see the plan with `tuneyard submit --dry-run FILE`, then pass it: --set strategy=ddp",
        )
    return resolve_paths(spec, (document.path or Path()).resolve().parent)


def _explain(kind: type[BaseModel], document: Document, error: dict[str, Any]) -> SpecError:
    """One pydantic error in the words of a job file."""
    where: FieldPath = tuple(
        part for part in error["loc"] if not (isinstance(part, str) and not _is_written(document, part, error["loc"]))
    )
    context = error.get("ctx") or {}
    match error["type"]:
        case "extra_forbidden":
            names = _fields_at(kind, where[:-1])
            near = difflib.get_close_matches(str(where[-1]), names, n=1, cutoff=0.5)
            parent = f"`{dotted(where[:-1])}`" if len(where) > 1 else "a job file"
            hint = f"did you mean `{near[0]}`?" if near else f"the keys here are: {', '.join(sorted(names))}"
            return document.error(where, f"`{where[-1]}` is not a key of {parent}", code="unknown-key", hint=hint)
        case "missing":
            return document.error(
                where, f"`{dotted(where)}` is missing", code="missing-key", hint=f"add `{where[-1]}:` there"
            )
        case "literal_error":
            given = str(error["input"])
            wanted = re.findall(r"'([^']*)'", str(context.get("expected", "")))
            near = difflib.get_close_matches(given, wanted, n=1, cutoff=0.5)
            hint = (f"did you mean `{near[0]}`? " if near else "") + f"it is one of: {', '.join(wanted)}"
            return document.error(where, f"{given!r} is not a value of `{dotted(where)}`", code="unknown-value", hint=hint)
        case "value_error":
            # Our own validators put the remedy behind the semicolon.
            message, _, remedy = str(context.get("error", error["msg"])).partition("; ")
            return document.error(where, message, code="inconsistent", hint=remedy or "change one of the two")
        case "string_pattern_mismatch":
            return document.error(
                where,
                f"{error['input']!r} does not fit `{dotted(where)}`",
                code="bad-name",
                hint="lower-case letters, digits and inner hyphens, at most 63 characters",
            )
    out_of_range = error["type"].startswith(("greater", "less", "too_", "string_too", "multiple"))
    return document.error(
        where,
        f"`{dotted(where)}`: {error['msg'][0].lower()}{error['msg'][1:]}, not {_short(error['input'])}",
        code="out-of-range" if out_of_range else "wrong-type",
        hint="see `tuneyard schema` for the type and range of every key",
    )


def _is_written(document: Document, part: str, loc: tuple[Any, ...]) -> bool:
    """Whether a loc part names a key (pydantic adds tags of union members, which nobody wrote)."""
    return part.isidentifier() and part not in ("tuple", "str", "int", "float") and "[" not in part


def _fields_at(kind: Any, where: FieldPath) -> list[str]:
    """Names of the keys allowed in the section at `where` of `kind`."""
    for part in where:
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(getattr(kind, "model_fields", {}))


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
