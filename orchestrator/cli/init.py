"""`tuneyard init`."""

from __future__ import annotations

import enum
from pathlib import Path

import typer

from orchestrator.cli.output import out
from orchestrator.errors import SpecError

TRAINING = """\
# A Tuneyard job. Paths are relative to this file. Every key and its meaning: `tuneyard schema`, docs/job-file.md.
name: {name}                     # lower-case letters, digits, hyphens
# queue: default                 # whose share is used
# priority: normal               # low | normal | high | a whole number
model:
  name_or_path: path/to/model    # a directory that save_pretrained wrote, or a hub id such as org/name
  task: {task}
data:
  train: train.{suffix}                # CSV, TSV, JSONL or Parquet, a saved datasets directory, or a hub id
{columns}
  # Cut from train after deduplication, by a seeded shuffle. Or name files: `validation:` and `test:`.
  split: {{validation: 0.1, test: 0.1, seed: 0{stratify}}}
  deduplicate: true
  max_length: 512                # tokens; longer rows are truncated
train:
  epochs: 3                      # or max_steps
  global_batch_size: 32          # rows a step over all processes: the same for any number of them
  learning_rate: {rate}
  precision: auto                # auto (bf16 where hardware has it, else fp32) | fp32 | bf16 | fp16 (GPU) | int8 (CPU)
  eval_every: 100                # steps
  early_stopping: {{metric: loss, patience: 3}}
  seed: 0
{adapter}strategy: auto                   # single | ddp | zero1 | zero2 | zero3 | auto
# offload: none                  # none | optimizer | all (ZeRO)
resources:
  num_processes: 1               # one a GPU; "2..8" lets the yard choose
  accelerator: any               # any | cpu | gpu | a type such as H100
# checkpoint: {{every_steps: auto, keep_last: 3}}   # directory: a path, or s3://bucket/prefix
# retry: {{max_restarts: 3}}       # after crashes and lost nodes
# max_duration: 2h
# after: [other-job-x1y2z]       # starts once these jobs have succeeded
# array: {{train.learning_rate: [1.0e-5, 1.0e-4]}}   # a job for each value, of several lists for each combination
# array_at_once: 2               # at most so many of them at the same time
# trackers: [tensorboard]
# env: {{WANDB_API_KEY: {{from_env: WANDB_API_KEY}}}}   # secrets are taken from the node, never written here
"""

COMMAND = """\
# A Tuneyard job that runs your own command, once per process, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
name: {name}
run: [python, train.py]          # runs in this file's directory
resources:
  num_processes: 2               # one a GPU
  accelerator: any               # any | cpu | gpu | a type such as H100
# What the command finds in its environment: TUNEYARD_OUTPUT_DIR and TUNEYARD_CHECKPOINT_DIR to write to,
# TUNEYARD_PROGRESS_FILE for progress, TUNEYARD_STOP_FILE: once it exists, save and end with status 10.
# retry: {{max_restarts: 3}}
# max_duration: 2h
# after: [other-job-x1y2z]       # starts once these jobs have succeeded
# array: 8                       # so many copies; TUNEYARD_ARRAY_INDEX tells each its number, from 0 on
# array_at_once: 2               # at most so many of them at the same time
# env: {{HF_HOME: /data/hf}}
"""


class Kind(enum.StrEnum):
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"
    COMMAND = "command"


def init(
    path: Path = typer.Argument(Path("job.yaml"), help="Where to write."),
    kind: Kind = typer.Option(Kind.SEQUENCE_CLASSIFICATION, help="What the job does."),
    force: bool = typer.Option(False, "--force", help="Overwrite."),
) -> None:
    """Write a commented job file to start from."""
    text = template(kind, path)
    try:
        with path.open("w" if force else "x") as stream:
            stream.write(text)
    except FileExistsError:
        raise SpecError(f"{path} exists", code="file-exists", file=path, hint="--force overwrites it") from None
    except OSError as problem:
        raise SpecError(
            f"cannot write {path}: {problem.strerror}", code="file-unwritable", file=path, hint="choose another path"
        ) from problem
    out.print(f"wrote {path}; fill in model and data, then: tuneyard run {path}", markup=False)


def template(kind: Kind, path: Path) -> str:
    """The text of a job file of `kind`."""
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in path.stem.lower()).strip("-")[:63] or "job"
    if kind == Kind.COMMAND:
        return COMMAND.format(name=name)
    classify = kind == Kind.SEQUENCE_CLASSIFICATION
    return TRAINING.format(
        name=name,
        task=kind.value,
        suffix="csv" if classify else "jsonl",
        columns="  text_column: text\n  label_column: label"
        if classify
        else "  prompt_column: prompt           # the loss is on the response alone; or text_column for plain text\n"
        "  response_column: response",
        stratify=", stratify: true" if classify else "",
        rate="5.0e-5" if classify else "2.0e-4",
        adapter="" if classify else "adapter: {type: lora, r: 16, alpha: 32}   # remove to train all weights\n",
    )
