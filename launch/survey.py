"""`python -m launch.survey --config job.yaml`: what a job's data holds, before a step is paid for. One JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from launch.attempt import ExitCode
from launch.config import TrainSpec, load_train_spec
from launch.data import build_corpus
from launch.document import read_document
from launch.encoding import all_cores
from launch.errors import DataError, TuneyardError
from launch.header import columns_of
from launch.model import load_tokenizer
from launch.parts import split_parts
from launch.tables import Columns, read_columns
from launch.vocabulary import tokens_of

UNLIMITED = 1 << 24  # tokens: rows are measured before they are cut


class PartSurvey(BaseModel):
    """One part of the data, after deduplication and splitting."""

    model_config = ConfigDict(frozen=True)

    rows: int
    tokens_median: int
    tokens_p95: int
    tokens_max: int
    truncated_share: float
    """Share of the rows that are longer than data.max_length."""
    classes: dict[str, int] | None = None
    """Rows by label, most frequent first; null for causal-lm."""
    also_in_train: int = 0
    """Rows whose text stands in the training part, too, letter case and white space aside: leakage."""


class Survey(BaseModel):
    """What a job's data holds."""

    model_config = ConfigDict(frozen=True)

    parts: dict[str, PartSurvey]
    rows_read: int
    """Rows of data.train as they lie in the files."""
    repeated_rows: int
    """How many of them repeat an earlier one; data.deduplicate drops them."""
    max_length: int
    vocabulary: int
    """Tokens that the tokenizer knows."""
    vocabulary_used: int
    """How many of them the parts have: the rows that `model.vocabulary: used` trains."""
    warnings: tuple[str, ...]


def survey(spec: TrainSpec) -> Survey:
    """Read, split and tokenise as training would, but measure instead of cutting.

    Raises:
        DataError, SpecError: as training would.
    """
    columns = columns_of(spec)
    classes = spec.model.task == "sequence-classification"
    raw = _texts(read_columns(spec.data.train, columns, "train"), columns)
    parts = split_parts(spec.data, columns, classes=classes)
    uncut = spec.model_copy(update={"data": spec.data.model_copy(update={"max_length": UNLIMITED, "packing": False})})
    tokenizer = load_tokenizer(spec.model, spec.data.chat_template)
    tokenizer.model_max_length = UNLIMITED  # else it warns of rows that are too long for the model
    with all_cores() as cores:
        corpus = build_corpus(uncut, tokenizer, cores)
    train_texts = {_normal(text) for text in _texts(parts["train"], columns)}
    told = {}
    for name, part in parts.items():
        rows = getattr(corpus, name)
        lengths = rows.lengths
        labels = Counter(str(label) for label in part[spec.data.label_column]) if classes else None
        leaked = 0 if name == "train" else sum(_normal(text) in train_texts for text in _texts(part, columns))
        told[name] = PartSurvey(
            rows=len(rows),
            tokens_median=int(np.median(lengths)),
            tokens_p95=int(np.percentile(lengths, 95)),
            tokens_max=int(lengths.max()),
            truncated_share=float((lengths > spec.data.max_length).mean()),
            classes=dict(labels.most_common()) if labels else None,
            also_in_train=leaked,
        )
    repeated = len(raw) - len(set(raw))
    return Survey(
        parts=told,
        rows_read=len(raw),
        repeated_rows=repeated,
        max_length=spec.data.max_length,
        vocabulary=len(tokenizer),
        vocabulary_used=len(tokens_of(corpus.parts().values(), tokenizer.pad_token_id)),
        warnings=tuple(_warnings(spec, told, repeated)),
    )


def _texts(part: Columns, columns: dict[str, str]) -> list[str]:
    """One text a row: what deduplication looks at."""
    names = [column for field, column in columns.items() if field != "label_column"]
    return ["\x1f".join(str(value) for value in row) for row in zip(*(part[name] for name in names), strict=True)]


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _warnings(spec: TrainSpec, parts: dict[str, PartSurvey], repeated: int) -> list[str]:
    """What a person would want to be told before paying for the run."""
    found = []
    if repeated and not spec.data.deduplicate:
        found.append(
            f"{repeated} rows repeat an earlier one: set data.deduplicate, or they stand on both sides of a split"
        )
    for name, part in parts.items():
        if part.also_in_train:
            found.append(
                f"{part.also_in_train} of {part.rows} {name} rows stand in the training part, too: metrics flatter"
            )
        if part.truncated_share > 0.05:
            cut = f"{part.truncated_share:.0%} of the {name} rows"
            found.append(
                f"{cut} are cut at data.max_length {spec.data.max_length}; the longest has {part.tokens_max} tokens"
            )
        if part.classes:
            rare = [label for label, count in part.classes.items() if count < 10]
            if rare:
                found.append(f"{name} has fewer than 10 rows of: {', '.join(rare[:5])}")
    classes = parts["train"].classes
    if classes and max(classes.values()) > 0.8 * parts["train"].rows:
        share = max(classes.values()) / parts["train"].rows
        found.append(f"one class holds {share:.0%} of the training rows: judge by f1_macro, not by accuracy")
    if "test" not in parts and "validation" not in parts:
        found.append("nothing is held out: add data.split or data.test, or no metric can be measured")
    return found


def main() -> int:
    """Print the survey, or the error, as one JSON object; the exit status is an ExitCode."""
    parser = argparse.ArgumentParser(prog="python -m launch.survey", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        told = survey(load_train_spec(read_document(arguments.config, arguments.set)))
    except TuneyardError as problem:
        print(json.dumps({"error": problem.as_dict()}))
        return ExitCode.DATA_ERROR if isinstance(problem, DataError) else ExitCode.USER_ERROR
    print(told.model_dump_json())
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
