"""The jobs that one file with an `array` describes. Pure, but for what `load_job` looks up of paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from launch.config import Section, validate
from launch.document import Document, FieldPath, path_of
from orchestrator.errors import SpecError, SpecErrors
from orchestrator.job.fields import MAX_ELEMENTS, AtOnce, Elements
from orchestrator.job.spec import AnyJob, ArrayElement, load_job

MAX_NAME = 63
MAX_FAULTS = 20
OWN = {
    "name": "its elements are named after the job, with their numbers",
    "array": "an array holds no arrays",
    "array_at_once": "it is the same for all elements",
    "array_of": "it is the yard's own",
}
"""Keys that no list can be given for, and why."""


class _Array(Section):
    """What a file says of its array."""

    array: Elements
    array_at_once: AtOnce | None = None


@dataclass(frozen=True)
class Element:
    """One job of an array."""

    job: AnyJob
    values: dict[str, Any]
    """By dotted key, what it has of the file's lists."""
    document: Document
    """The file as if it described this job alone: faults are told by its lines."""


def is_array(document: Document) -> bool:
    """Whether a file describes several jobs."""
    return document.data.get("array") is not None


def expand(document: Document, suffix: str) -> list[Element]:
    """Every job of a file with an `array`, in the order of their indices: of several lists, the last one varies
    fastest. They are known together by the job's name and `suffix`.

    Raises:
        SpecErrors: every fault of the array, or else of the jobs, each once.
    """
    lines, overrides = document.lines, document.overrides
    own: dict[str, Any] = {key: document.data[key] for key in ("array", "array_at_once") if key in document.data}
    said = validate(_Array, Document(path=document.path, data=own, lines=lines, overrides=overrides))
    data = {key: value for key, value in document.data.items() if key not in own}
    alone = Document(path=document.path, data=data, lines=lines, overrides=overrides)
    if isinstance(said.array, int):
        count, job = said.array, load_job(alone)
        found = [Element(job, {}, alone)] * count
    else:
        found = list(_combinations(document, alone, said.array))
    _check_name(document, found[0].job.name, len(found))
    array_id = f"{found[0].job.name}-{suffix}"
    return [
        Element(_numbered(element.job, ArrayElement(id=array_id, index=index, at_once=said.array_at_once)),
                element.values, element.document)
        for index, element in enumerate(found)
    ]  # fmt: skip


def _numbered(job: AnyJob, element: ArrayElement) -> AnyJob:
    return job.model_copy(update={"name": f"{job.name}-{element.index}", "array_of": element})


def _check_name(document: Document, name: str, count: int) -> None:
    """Raises SpecError if the last element's name would be too long."""
    room = MAX_NAME - len(f"-{count - 1}")
    if len(name) > room:
        raise document.error(
            ("name",),
            f"the name has {len(name)} characters; with an element's number behind it, it has more than {MAX_NAME}",
            code="bad-name",
            hint=f"shorten it to at most {room}",
        )


def _combinations(document: Document, alone: Document, lists: Mapping[str, tuple[Any, ...]]) -> Iterator[Element]:
    paths = {key: path_of(key) for key in lists}
    _check_lists(document, lists, paths)
    faults: dict[str, SpecError] = {}
    for choice in product(*(range(len(values)) for values in lists.values())):
        try:
            picked = dict(zip(lists, choice, strict=True))
            changed = _changed(document, alone, picked, paths)
            values = {key: lists[key][index] for key, index in picked.items()}
            yield Element(load_job(changed), values, changed)
        except SpecError as problem:
            for error in problem.errors if isinstance(problem, SpecErrors) else [problem]:
                faults.setdefault(str(error), error)
            if len(faults) >= MAX_FAULTS:
                break
    if faults:
        raise SpecErrors(sorted(faults.values(), key=lambda error: error.line or 0))


def _check_lists(document: Document, lists: Mapping[str, tuple[Any, ...]], paths: Mapping[str, FieldPath]) -> None:
    """Raises SpecErrors for lists that cannot be combined."""
    faults = []

    def refuse(where: FieldPath, message: str, code: str, hint: str) -> None:
        faults.append(document.error(("array", *where), message, code=code, hint=hint))

    if not lists:
        refuse((), "`array` names no key", "out-of-range", "write how many copies, or lists of values by dotted key")
    for key, path in paths.items():
        if not path or path[0] in OWN:
            why = OWN[str(path[0])] if path else "it is empty"
            refuse((key,), f"`{key}` cannot be varied: {why}", "unknown-key", "vary another key, such as train.seed")
        above = next(
            (other for other, shorter in paths.items() if other != key and path[: len(shorter)] == shorter), ""
        )
        if above:
            refuse((key,), f"`{key}` is inside `{above}`, which is varied, too", "inconsistent", "vary one of the two")
    count = math.prod(len(values) for values in lists.values())
    if count > MAX_ELEMENTS:
        message = f"`array` makes {count} jobs of all combinations; the most is {MAX_ELEMENTS}"
        refuse((), message, "out-of-range", "take fewer values, or several files")
    if faults:
        raise SpecErrors(faults)


def _changed(
    document: Document, alone: Document, picked: Mapping[str, int], paths: Mapping[str, FieldPath]
) -> Document:
    """The file with one value of each list where that belongs, on the line where the list has it."""
    changed = Document(
        path=alone.path, data=copy.deepcopy(alone.data), lines=dict(alone.lines), overrides=dict(alone.overrides)
    )
    for key, index in picked.items():
        path, source = paths[key], ("array", key, index)
        _put(document, changed.data, key, path, copy.deepcopy(document.data["array"][key][index]))
        for places in (changed.lines, changed.overrides):
            for where in [where for where in places if where[: len(path)] == path]:
                del places[where]
        for where, line in document.lines.items():
            if where[: len(source)] == source:
                changed.lines[*path, *where[len(source) :]] = line
        for where, override in document.overrides.items():
            if where == source[: len(where)]:
                changed.overrides[path] = override
    return changed


def _put(document: Document, data: Any, key: str, path: FieldPath, value: Any) -> None:
    """Raises SpecError if `path` runs through something that holds no keys."""
    target = data
    for depth, part in enumerate(path):
        inside = isinstance(target, dict) and isinstance(part, str)
        if not inside and not (isinstance(target, list) and isinstance(part, int) and part < len(target)):
            raise document.error(
                ("array", key),
                f"there is no `{key}` in this file that could be varied",
                code="unknown-key",
                hint="name a key as it would be written in the file, its sections with dots between",
            )
        if depth == len(path) - 1:
            target[part] = value
        elif inside and target.get(part) is None:
            target[part] = {}
        target = target[part]
