"""The column names of a data file, read from its head alone. Cheap enough for the submit path."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from launch.config import TrainSpec
from launch.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
MAX_LINE = 1 << 24
MAX_BLANK = 1000


def read_header(path: Path) -> list[str]:
    """Column names of a file of a known kind; empty for an empty file.

    Raises:
        DataError: of no known kind, or not what its ending says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_header(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path} is of no known kind", code="unknown-format", hint=f"known endings: {', '.join(SUFFIXES)}"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            line = _first_line(stream)
            rows = suffix in (".jsonl", ".ndjson") or bool(_first_line(stream).strip())
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 text", code="not-text", hint="save it as UTF-8") from problem
    if not line.strip():
        return []
    if not rows:
        raise DataError(f"{path} has a header line and no rows", code="empty-data", hint="is it the right file?")
    if suffix == ".tsv":
        return line.rstrip("\r\n").split("\t")
    if suffix == ".csv":
        try:
            return next(csv.reader([line]))
        except csv.Error as problem:
            raise DataError(
                f"{path}:1 is not a line of column names: {problem}", code="not-csv", hint="is it the right file?"
            ) from problem
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise DataError(f"{path}:1 is not JSON", code="not-json", hint="write one JSON object a line") from problem
    if not isinstance(row, dict):
        raise DataError(f"{path}:1 is not a JSON object", code="not-json", hint="write one JSON object a line")
    return list(row)


def _first_line(stream: TextIO) -> str:
    """The next line that is not blank; empty at the end."""
    for _ in range(MAX_BLANK):
        line = stream.readline(MAX_LINE)
        if not line or line.strip():
            return line
    return ""


def _parquet_header(path: Path) -> list[str]:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowException as problem:
        raise DataError(f"{path} is not a Parquet file", code="not-parquet", hint="write it again") from problem
    if metadata.num_rows == 0:
        raise DataError(f"{path} has columns and no rows", code="empty-data", hint="is it the right file?")
    return [str(name) for name in metadata.schema.to_arrow_schema().names]


def check_columns(source: str, available: Iterable[str], columns: dict[str, str]) -> None:
    """Check that `columns` (data field that asks for it → column) are all among those that `source` has.

    Raises:
        DataError: names the field, what there is and the nearest name.
    """
    names = list(available)
    for field, column in columns.items():
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
            known = f"the columns are: {', '.join(names)}"
            raise DataError(
                f"{source} has no column `{column}`",
                code="missing-column",
                field=f"data.{field}",
                hint=f"did you mean `{near[0]}`? {known}" if near else known,
            )


def columns_of(spec: TrainSpec, part: str = "train") -> dict[str, str]:
    """Which columns the job reads of a part of its data: the data field that names it → column."""
    data = spec.data
    if spec.model.task == "sequence-classification":
        columns = {"text_column": data.text_column, "label_column": data.label_column}
    elif data.messages_column is not None:
        columns = {"messages_column": data.messages_column}
    elif data.prompt_column is not None and data.response_column is not None:
        columns = {"prompt_column": data.prompt_column, "response_column": data.response_column}
    else:
        columns = {"text_column": data.text_column}
    if part == "train" and data.split is not None and data.split.group_column is not None:
        columns["split.group_column"] = data.split.group_column
    return columns
