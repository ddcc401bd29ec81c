"""The parts of a job's data as columns: read, checked, deduplicated and split, before anything is tokenised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.chat import checked
from launch.config import DataSpec, SplitSpec
from launch.errors import DataError
from launch.sampler import Indices, shuffled
from launch.tables import Columns, read_columns

GROUP = "split.group_column"


def split_parts(data: DataSpec, columns: dict[str, str], *, classes: bool) -> dict[str, Columns]:
    """Columns of each part that the job has: `train` always, `validation` and `test` from files or by the split."""
    parts = {"train": read_columns(data.train, columns, "train")}
    held_out = {field: column for field, column in columns.items() if field != GROUP}  # held-out files are not cut
    for part in ("validation", "test"):
        sources = getattr(data, part)
        if sources is not None:
            parts[part] = read_columns(sources, held_out, part)
    for name, part_columns in parts.items():
        _check_values(part_columns, columns if name == "train" else held_out, name)
    texts = [column for field, column in held_out.items() if field != "label_column"]
    if data.deduplicate:
        _deduplicate(parts, texts)
    if data.split is not None:
        labels = parts["train"][columns["label_column"]] if classes else None
        groups = parts["train"][columns[GROUP]] if GROUP in columns else None
        for name, chosen in _cut(len(parts["train"][texts[0]]), labels, groups, data.split).items():
            source = parts.pop("train") if name == "rest" else parts["train"]
            parts["train" if name == "rest" else name] = _select(source, chosen)
    return parts


def _check_values(part: Columns, columns: dict[str, str], name: str) -> None:
    for field, column in columns.items():
        for row, value in enumerate(part[column]):
            if value is None or (value == "" and field == "label_column"):
                raise DataError(
                    f"row {row + 1} of data.{name} has no `{column}`",
                    code="missing-value",
                    field=f"data.{field}",
                    hint="fill it in, or remove the row",
                )
            if field == "messages_column":
                part[column][row] = checked(value, row + 1, name, column)
            elif field not in ("label_column", GROUP) and not isinstance(value, str):
                raise DataError(
                    f"row {row + 1} of data.{name}: `{column}` is {type(value).__name__}, not text",
                    code="not-text",
                    field=f"data.{field}",
                    hint="name the column that holds the text",
                )


def _deduplicate(parts: dict[str, Columns], texts: Sequence[str]) -> None:
    """Keep each text once, and keep it held out if it is held out: training gives way to test and validation."""
    seen: set[str] = set()
    for name in ("test", "validation", "train"):
        if name in parts:
            keep = []
            for row, values in enumerate(zip(*(parts[name][column] for column in texts), strict=True)):
                key = json.dumps(values)
                if key not in seen:
                    seen.add(key)
                    keep.append(row)
            parts[name] = _select(parts[name], np.asarray(keep, dtype=np.int64))
    if not parts["train"][texts[0]]:
        raise DataError(
            "every training text is repeated in the held-out files",
            field="data.deduplicate",
            hint="check that data.train and data.test are different files",
        )


def _cut(rows: int, labels: list[Any] | None, groups_of: list[Any] | None, split: SplitSpec) -> dict[str, Indices]:
    """Row numbers of the parts cut off, and of the `rest` last; each in the order of the source.

    Of whole groups, each part takes the next in a shuffled order until it has its share.
    """
    order = shuffled(rows, "split", split.seed)
    whole: list[Indices] = []
    if groups_of is not None:
        members: dict[str, list[int]] = {}
        for row, value in enumerate(groups_of):
            members.setdefault(json.dumps(value, default=str), []).append(row)
        named = list(members.values())
        whole = [np.asarray(named[group]) for group in shuffled(len(named), "split", split.seed)]
        order = np.concatenate(whole)
    if split.stratify and labels is not None:
        names = [str(label) for label in labels]
        groups = [order[[names[row] == name for row in order]] for name in sorted(set(names))]
    else:
        groups = [order]
    cut: dict[str, list[Indices]] = {"test": [], "validation": [], "rest": []}
    for group in groups:
        tests, validations = round(len(group) * split.test), round(len(group) * split.validation)
        borders = np.asarray([tests, tests + validations])
        if whole:  # a group that a border runs through belongs to the part before it
            ends = np.concatenate([[0], np.cumsum([len(rows_of) for rows_of in whole])])
            borders = ends[np.searchsorted(ends, borders)]
        for name, chosen in zip(cut, np.split(group, borders), strict=True):
            cut[name].append(chosen)
    result = {}
    for name, share in (("test", split.test), ("validation", split.validation), ("rest", 1.0)):
        chosen = np.sort(np.concatenate(cut[name]))
        if share > 0 and not len(chosen):
            raise DataError(
                f"{rows} rows are too few: the split leaves none for {'training' if name == 'rest' else name}",
                code="empty-split",
                field="data.split" if name == "rest" else f"data.split.{name}",
                hint="add data, or change the shares",
            )
        if share > 0:
            result[name] = chosen
    return result


def _select(part: Columns, rows: Indices) -> Columns:
    return {column: [values[row] for row in rows] for column, values in part.items()}
