"""What pydantic found wrong with a job file, in the words of a job file. Torch-free."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from launch.document import Document, FieldPath, dotted
from launch.errors import Refused, SpecError

# Names that people bring from other tools, and ours for the same thing.
FOREIGN = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "lr_scheduler_type": "schedule",
    "model_name_or_path": "name_or_path",
    "path": "name_or_path",
    "command": "run",
    "cmd": "run",
    "gpus": "num_processes",
    "num_gpus": "num_processes",
    "world_size": "num_processes",
    "timeout": "max_duration",
    "report_to": "trackers",
}
# pydantic's error types → what the value must be, and how it can be brought about.
KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of a sensible size",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of names and values",
}
BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
}
PATTERNS = {
    "accelerator": "any, cpu, gpu, or a GPU type such as H100",
    "from_env": "the name of an environment variable: letters, digits and underscores",
    "env": "names of environment variables have letters, digits and underscores, and no digit first",
}
SLUG_HINT = "lower-case letters, digits and inner hyphens, at most 63 characters"


@dataclass(frozen=True)
class _Fault:
    """One pydantic error, with the path that was written and whether a member of a union spoke."""

    where: FieldPath
    of_union: bool
    error: dict[str, Any]


def explain(kind: type[BaseModel], document: Document, problem: ValidationError) -> list[SpecError]:
    """Every fault of `document` as a `kind`, in the order of the file; several members of a union speak as one."""
    faults = [_fault(document, dict(error)) for error in problem.errors(include_url=False)]
    said: dict[FieldPath, list[_Fault]] = {}
    for fault in faults:
        # A member of a union that looked inside the value knows more than one that wanted another type.
        deeper = any(
            other.of_union and len(other.where) > len(fault.where) and other.where[: len(fault.where)] == fault.where
            for other in faults
        )
        if not (fault.of_union and deeper):
            said.setdefault(fault.where, []).append(fault)
    errors = [
        error
        for group in said.values()
        for error in (
            [_either(document, group)] if len(group) > 1 and group[0].of_union else _each(kind, document, group)
        )
    ]
    # A slip in a name that must be there is one fault, not two.
    meant = {error.hint for error in errors if error.code == "unknown-key"}
    errors = [
        error
        for error in errors
        if error.code != "missing-key" or f"did you mean `{(error.field or '').rpartition('.')[2]}`?" not in meant
    ]
    return sorted(errors, key=lambda error: error.line or 0)


def unknown_key(kind: type[BaseModel], document: Document, where: FieldPath) -> SpecError:
    """The error of a key that its section does not know, with the nearest name or the section it belongs to."""
    key, parent = str(where[-1]), where[:-1]
    names = fields_at(kind, parent)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    elsewhere = [path for path in _paths(kind) if path[-1] == FOREIGN.get(key, key) and path != where]
    if key == "<<":
        hint = "YAML's merge key is not read: write the keys out"
    elif FOREIGN.get(key) in names:
        hint = f"did you mean `{FOREIGN[key]}`?"
    elif near:
        hint = f"did you mean `{near[0]}`?"
    elif elsewhere:
        hint = f"did you mean `{dotted(elsewhere[0])}`?"
    else:
        hint = f"the keys here are: {', '.join(sorted(names))}"
    parent_text = f"`{dotted(parent)}`" if parent else "a job file"
    return document.error(where, f"`{key}` is not a key of {parent_text}", code="unknown-key", hint=hint)


def fields_at(kind: Any, where: FieldPath) -> list[str]:
    """Names of the keys allowed in the section at `where` of `kind`."""
    for part in where:
        field = getattr(kind, "model_fields", {}).get(part)
        # The name of an environment variable, or a place in a list, is no field: what is in it is one of the same kind.
        kind = _section(field.annotation) if field is not None else kind
    return list(getattr(kind, "model_fields", {}))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation, however deep its unions and dictionaries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for option in get_args(annotation) if (found := _section(option)) is not None), None)


def _paths(kind: type[BaseModel], base: FieldPath = ()) -> Iterator[FieldPath]:
    """Every key of a job file, the outer ones first."""
    for name in kind.model_fields:
        yield (*base, name)
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield from _paths(section, (*base, name))


def _fault(document: Document, error: dict[str, Any]) -> _Fault:
    """`error` with the parts of its place that somebody wrote: pydantic adds names of union members and `[key]`."""
    where: list[str | int] = []
    value: Any = document.data
    of_union = False
    for index, part in enumerate(error["loc"]):
        last = index == len(error["loc"]) - 1
        inside_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside_list or (isinstance(value, dict) and part in value):
            value = value[part]
        elif not (last and error["type"] == "missing"):
            of_union = of_union or part != "[key]"
            continue
        where.append(part)
    return _Fault(tuple(where), of_union, error)


def _each(kind: type[BaseModel], document: Document, group: Sequence[_Fault]) -> list[SpecError]:
    return [_one(kind, document, fault.where, fault.error) for fault in group]


def _one(kind: type[BaseModel], document: Document, where: FieldPath, error: dict[str, Any]) -> SpecError:
    context = error.get("ctx") or {}
    match error["type"]:
        case "extra_forbidden":
            return unknown_key(kind, document, where)
        case "missing":
            names = fields_at(kind, where)
            hint = f"add `{where[-1]}:`" + (f" with keys of: {', '.join(sorted(names))}" if names else "")
            return document.error(where, f"`{dotted(where)}` is missing", code="missing-key", hint=hint)
        case "literal_error":
            wanted = _wanted(context)
            near = difflib.get_close_matches(str(error["input"]), wanted, n=1, cutoff=0.5)
            hint = (f"did you mean `{near[0]}`? " if near else "") + f"it is one of: {', '.join(wanted)}"
            message = f"{short(error['input'])} is not a value of `{dotted(where)}`"
            return document.error(where, message, code="unknown-value", hint=hint)
        case "value_error":
            refused = context.get("error")
            assert isinstance(refused, Refused), error
            return document.error((*where, *refused.at), refused.message, code=refused.code, hint=refused.hint)
        case "string_pattern_mismatch":
            return _misnamed(document, where, error)
        case "model_type" | "model_attributes_type":
            names = fields_at(kind, where)
            message = f"`{dotted(where)}` is {_shown(error['input'])}; it must be a section of keys"
            hint = f"its keys, indented below it: {', '.join(sorted(names))}"
            return document.error(where, message, code="wrong-type", hint=hint)
        case "too_short" | "string_too_short":
            message = f"`{dotted(where)}` is empty"
            return document.error(where, message, code="out-of-range", hint="give at least one")
    return _either(document, [_Fault(where, False, error)])


def _either(document: Document, group: Sequence[_Fault]) -> SpecError:
    """A value of a wrong type or out of bounds; for a union, what each of its members wants."""
    where, value = group[0].where, group[0].error["input"]
    wants = [_want(fault.error) for fault in group]
    inside = [fault.error["type"] in BOUNDS for fault in group]
    message = f"`{dotted(where)}` is {_shown(value)}; it must be {' or '.join(dict.fromkeys(wants))}"
    hint = f"write {wants[0]}" if len(wants) == 1 else f"write {', or '.join(dict.fromkeys(wants))}"
    if "text" in wants and isinstance(value, int | float):
        hint = f'put it in quotes: "{json.dumps(value)}"'
    elif "a list" in wants and isinstance(value, str):
        hint = f"put it in brackets: [{', '.join(value.split())}]"
    elif value is None:
        hint = f"{hint}, or remove the key"
    return document.error(where, message, code="out-of-range" if any(inside) else "wrong-type", hint=hint)


def _want(error: dict[str, Any]) -> str:
    context = error.get("ctx") or {}
    if error["type"] in BOUNDS:
        return BOUNDS[error["type"]].format(**{key: f"{value:.12g}" for key, value in context.items()})
    if error["type"] == "literal_error":
        return "one of: " + ", ".join(_wanted(context))
    if error["type"].startswith("model_"):
        return "a section of keys"
    return KINDS.get(error["type"]) or str(error["msg"])


def _wanted(context: dict[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected", "")))


def _misnamed(document: Document, where: FieldPath, error: dict[str, Any]) -> SpecError:
    field = str(where[-1])
    hint = PATTERNS.get(field) or (PATTERNS["env"] if where[0] == "env" else SLUG_HINT)
    if hint == SLUG_HINT:
        slug = re.sub(r"[^a-z0-9]+", "-", str(error["input"]).lower())[:63].strip("-")
        hint = f"did you mean `{slug}`? {SLUG_HINT}" if slug else SLUG_HINT
    message = f"{short(error['input'])} does not fit `{dotted(where)}`"
    return document.error(where, message, code="bad-name", hint=hint)


def _shown(value: Any) -> str:
    return "empty" if value is None else short(value)


def short(value: Any) -> str:
    """`value` as a job file would have it, cut to fit a line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
