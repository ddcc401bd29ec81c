"""Columns out of CSV, TSV, JSONL and Parquet files, saved datasets directories and hub ids. Torch-free.

A TSV is read without quoting: texts hold quotation marks, and a quote that opens a field would swallow the lines
up to the next one without an error. Values of CSV and TSV files stay text; nothing is guessed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from launch.config import HUB_ID
from launch.errors import DataError
from launch.header import SUFFIXES, check_columns

if TYPE_CHECKING:
    import datasets

Columns = dict[str, list[Any]]
MARKS_OF_SAVED = ("state.json", "dataset_dict.json")  # one of them lies in what datasets.save_to_disk writes


def read_columns(sources: Sequence[str], columns: dict[str, str], part: str) -> Columns:
    """The columns named by `columns` (name of the data field that asks for it → column), all sources appended.

    `part` is train, validation or test: it names the split to take from a source that has several, and the field
    that errors point at.

    Raises:
        DataError: an absent, unreadable or empty source, or a column that it lacks.
    """
    merged: Columns = {column: [] for column in columns.values()}
    for source in sources:
        table = _read(source, part, columns)
        for column, values in table.items():
            merged[column].extend(values)
    if not next(iter(merged.values())):
        raise DataError(
            f"{', '.join(sources)} holds no rows",
            field=f"data.{part}",
            hint="is it the right file, with a header line?",
        )
    return merged


def _read(source: str, part: str, columns: dict[str, str]) -> Columns:
    path = Path(source)
    if path.is_dir():
        return _from_dataset(_saved_dataset(path, part), source, part, columns)
    if path.is_file():
        try:
            match path.suffix.lower():
                case ".csv" | ".tsv":
                    return _from_arrow(_read_separated(path), source, columns)
                case ".jsonl" | ".ndjson":
                    return _read_jsonl(path, part, columns)
                case ".parquet":
                    return _from_arrow(pyarrow.parquet.read_table(path), source, columns)
        except (pyarrow.ArrowInvalid, UnicodeDecodeError) as problem:
            raise DataError(
                f"{source} cannot be read as {path.suffix[1:].upper()}: {problem}",
                field=f"data.{part}",
                hint="every line needs as many fields as the header, in UTF-8",
            ) from problem
        raise DataError(
            f"{source} is of no known kind", field=f"data.{part}", hint=f"known endings: {', '.join(SUFFIXES)}"
        )
    if HUB_ID.match(source) and path.suffix.lower() not in SUFFIXES:
        return _from_dataset(_hub_dataset(source, part), source, part, columns)
    near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1, cutoff=0.5)
    raise DataError(
        f"{source} does not exist",
        field=f"data.{part}",
        hint=f"did you mean {path.with_name(near[0])}?" if near else "paths are relative to the job file",
    )


def content_hash(source: str, part: str) -> str:
    """Hash of what `source` holds and of the kind that it is read as; not of its name or place.

    A source that cannot be read has one, too: what is wrong with it is read_columns' to say.

    Raises:
        DataError: a dataset of the hub cannot be loaded.
    """
    path = Path(source)
    if path.is_file():
        return f"{path.suffix.lower()}:{_hash_of(path)}"
    if any((path / mark).is_file() for mark in MARKS_OF_SAVED):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return json.dumps({file.relative_to(path).as_posix(): _hash_of(file) for file in files})
    if HUB_ID.match(source) and not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        return f"hub:{_hub_dataset(source, part)._fingerprint}"  # of the commit and the split
    return "unreadable"


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names_in(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir()] if directory.is_dir() else []


def _read_separated(path: Path) -> pyarrow.Table:
    tabs = path.suffix.lower() == ".tsv"
    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    if path.stat().st_size == 0:
        return pyarrow.table({})
    header = pyarrow.csv.open_csv(path, parse_options=parse).schema.names
    as_text = pyarrow.csv.ConvertOptions(
        column_types={name: pyarrow.string() for name in header}, strings_can_be_null=False, null_values=[]
    )
    return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=as_text)


def _from_arrow(table: pyarrow.Table, source: str, columns: dict[str, str]) -> Columns:
    if table.num_columns:
        check_columns(source, table.column_names, columns)
        return {column: table.column(column).to_pylist() for column in columns.values()}
    return {column: [] for column in columns.values()}


def _read_jsonl(path: Path, part: str, columns: dict[str, str]) -> Columns:
    result: Columns = {column: [] for column in columns.values()}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as problem:
                raise DataError(
                    f"{path}:{number} is not JSON: {problem.msg}", field=f"data.{part}", hint="one object a line"
                ) from problem
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is not a JSON object", field=f"data.{part}", hint="one object a line")
            check_columns(f"{path}:{number}", row, columns)
            for column, values in result.items():
                values.append(row[column])
    return result


def _saved_dataset(path: Path, part: str) -> datasets.Dataset:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as problem:
        raise DataError(
            f"{path} is a directory, but not one that datasets.save_to_disk wrote",
            field=f"data.{part}",
            hint="name the files in it instead",
        ) from problem
    return _take_split(loaded, str(path), part) if isinstance(loaded, datasets.DatasetDict) else loaded


def _hub_dataset(name: str, part: str) -> datasets.Dataset:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError) as problem:  # what the library raises for unknown, private and unreachable ones
        raise DataError(
            f"the dataset {name} cannot be loaded: {problem}",
            field=f"data.{part}",
            hint="check the name and the connection; a local path is relative to the job file",
        ) from problem
    return _take_split(loaded, name, part)


def _take_split(loaded: datasets.DatasetDict, source: str, part: str) -> datasets.Dataset:
    if part not in loaded:
        raise DataError(
            f"{source} has no split `{part}`",
            field=f"data.{part}",
            hint=f"its splits are: {', '.join(str(name) for name in loaded)}",
        )
    return loaded[part]


def _from_dataset(dataset: datasets.Dataset, source: str, part: str, columns: dict[str, str]) -> Columns:
    import datasets

    check_columns(f"{source} ({part})", dataset.column_names, columns)
    result: Columns = {}
    for column in columns.values():
        values = list(dataset[column])
        feature = dataset.features[column]
        # A ClassLabel stores numbers for names; the names are what the data says.
        result[column] = [feature.int2str(v) for v in values] if isinstance(feature, datasets.ClassLabel) else values
    return result
