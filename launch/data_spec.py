"""The data section of a job file. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from launch.errors import Refused
from launch.section import Names, Section


class SplitSpec(Section):
    """Cuts held-out parts from the training data, after deduplication, by a seeded shuffle."""

    test: float = Field(0.0, ge=0, lt=1)
    """Share of the rows kept for the final metrics."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of the rows used for evaluation while training and for early stopping."""
    seed: int = 0
    stratify: bool = False
    """Keep each class's share the same in every part (sequence classification)."""
    group_column: str | None = None
    """Rows with the same value here stay together in one part: of one person, or with one answer."""

    @model_validator(mode="after")
    def _leaves_something(self) -> SplitSpec:
        if self.test + self.validation >= 1:
            raise Refused(
                f"test {self.test:g} and validation {self.validation:g} together leave no row for training",
                at=("test",) if self.test >= self.validation else ("validation",),
                hint="keep their sum below 1, such as {test: 0.2, validation: 0.1}",
            )
        if self.stratify and self.group_column is not None:
            raise Refused(
                "`stratify` and `group_column` are both given: whole groups have no fixed share of each class",
                at=("group_column",),
                hint="keep one of the two",
            )
        return self


class DataSpec(Section):
    """Where rows come from and which columns matter."""

    train: Names = Field(min_length=1)
    """CSV, TSV, JSONL or Parquet files, a directory written by `datasets.save_to_disk`, or a hub id."""
    validation: Names | None = None
    test: Names | None = None
    """Held-out files; null where `split` cuts them from `train`."""
    split: SplitSpec | None = None
    text_column: str = "text"
    """The text (sequence classification), or the whole training text (causal-lm without prompt_column)."""
    label_column: str = "label"
    """The class (sequence classification). Classes are numbered in sorted order."""
    prompt_column: str | None = None
    """causal-lm: what the model is given. With response_column; the loss is on the response alone."""
    response_column: str | None = None
    messages_column: str | None = None
    """causal-lm: a dialogue, as a list of {role, content}. The model's chat template puts it into words."""
    chat_template: str | None = None
    """A file with the Jinja template of dialogues, relative to the job file; null takes the tokenizer's own."""
    loss_on: Literal["answers", "all"] = "answers"
    """Of a dialogue: learn what the assistant says (every turn, with its end), or every token."""
    packing: bool = False
    """causal-lm: put several rows into each sequence of `max_length`; none sees another. Saves padding. A row of
    `global_batch_size` is then such a sequence."""
    deduplicate: bool = False
    """Drop repeated texts before splitting, so that none stands on both sides."""
    max_length: int = Field(512, ge=2)
    """Longer rows are truncated to this many tokens."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> DataSpec:
        if (self.prompt_column is None) != (self.response_column is None):
            given, other = ("prompt", "response") if self.prompt_column is not None else ("response", "prompt")
            raise Refused(
                f"`{given}_column` is given without `{other}_column`",
                at=(f"{given}_column",),
                hint=f"add `{other}_column`, or name the whole text with `text_column`",
            )
        if self.messages_column is not None and self.prompt_column is not None:
            raise Refused(
                "`messages_column` and `prompt_column` are both given",
                at=("messages_column",),
                hint="keep `messages_column` for whole dialogues, or `prompt_column` and `response_column`",
            )
        if self.chat_template is not None and self.messages_column is None and self.prompt_column is None:
            raise Refused(
                "`chat_template` is given, and no column holds a dialogue",
                at=("chat_template",),
                hint="add `messages_column`, or `prompt_column` and `response_column`",
            )
        if self.split is not None:
            for part in ("test", "validation"):
                if getattr(self, part) is not None and getattr(self.split, part) > 0:
                    raise Refused(
                        f"`data.{part}` names files and `data.split.{part}` cuts rows from `data.train`",
                        at=("split", part),
                        hint="keep one of the two",
                    )
        return self
