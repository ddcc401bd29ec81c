"""Strict YAML: plain values plus the line every one of them was written on.

Differs from a plain loader in what people's files need: a duplicate key is refused, a value keeps its line for
error messages, aliases cannot explode, and only JSON's types exist (no dates, no tags), so a file means the same
here, in an editor's JSON Schema check and over REST.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from launch.errors import SpecError

FieldPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20  # a job file is written by hand; a megabyte is not
MAX_VALUES = 20_000  # after expanding aliases: an alias bomb stops here
MAX_DEPTH = 32


@dataclass
class Document:
    """A parsed file: `data` holds JSON types only, `lines` maps a field path to its 1-based line."""

    path: Path | None
    data: dict[str, Any]
    lines: dict[FieldPath, int] = field(default_factory=dict)
    overrides: dict[FieldPath, str] = field(default_factory=dict)

    def line_of(self, where: FieldPath) -> int | None:
        """Line of the nearest enclosing value that was written in the file, None for one given by --set."""
        for end in range(len(where), -1, -1):
            if where[:end] in self.overrides:
                return None
            if where[:end] in self.lines:
                return self.lines[where[:end]]
        return None

    def error(self, where: FieldPath, message: str, *, code: str, hint: str | None = None) -> SpecError:
        """A SpecError that points at `where` in this file, or at the --set that wrote it."""
        for path, override in self.overrides.items():
            if path == where[: len(path)] or (where == path[: len(where)] and where not in self.lines):
                return SpecError(message, code=code, field=dotted(where), hint=hint, file=f"--set {override}")
        return SpecError(
            message, code=code, field=dotted(where), file=self.path, line=self.line_of(where), hint=hint
        )


def dotted(where: Iterable[str | int]) -> str:
    """`("data", "train", 0)` as `data.train[0]`."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def read_document(path: Path, overrides: Iterable[str] = ()) -> Document:
    """The file at `path` with each `a.b=value` of `overrides` applied on top.

    Raises:
        SpecError: absent, not a file, too large, not UTF-8, not YAML, not a mapping, or a bad override.
    """
    try:
        if not path.is_file():
            reason = "is a directory" if path.is_dir() else "does not exist"
            raise SpecError(
                f"the file {path} {reason}",
                code="file-not-found",
                file=path,
                hint="check the path, or write a job file with `tuneyard init`",
            )
        raw = path.read_bytes()
    except OSError as problem:
        raise SpecError(
            f"cannot read {path}: {problem.strerror}", code="file-unreadable", file=path, hint="check its permissions"
        ) from problem
    if len(raw) > MAX_BYTES:
        raise SpecError(
            f"{path} has {len(raw)} bytes; a job file has at most {MAX_BYTES}",
            code="file-too-large",
            file=path,
            hint="is this the data instead of the job file?",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise SpecError(
            f"{path} is not UTF-8 text (byte {problem.start})",
            code="not-text",
            file=path,
            hint="save the file as UTF-8",
        ) from problem
    document = parse_document(text, path)
    for override in overrides:
        apply_override(document, override)
    return document


def parse_document(text: str, path: Path | None = None) -> Document:
    """`text` as a Document. Raises SpecError as read_document does."""
    try:
        node = YAML(typ="rt", pure=True).compose(text)
    except MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        raise SpecError(
            f"not valid YAML: {problem.problem or problem.context}",
            code="invalid-yaml",
            file=path,
            line=mark.line + 1 if mark else None,
            hint="check indentation, quotes and colons around this line",
        ) from problem
    except (YAMLError, RecursionError, ValueError) as problem:
        raise SpecError(
            f"not valid YAML: {problem}", code="invalid-yaml", file=path, hint="is this a YAML file?"
        ) from problem
    document = Document(path=path, data={})
    if not isinstance(node, MappingNode):
        raise SpecError(
            "a job file is a mapping of keys to values" + ("; this one is empty" if node is None else ""),
            code="not-a-mapping",
            file=path,
            line=1,
            hint="start from `tuneyard init`",
        )
    data = _Builder(document).build(node, ())
    assert isinstance(data, dict)
    document.data = data
    return document


class _Builder:
    """Turns YAML nodes into JSON values, remembering lines and counting what aliases expand to."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0

    def build(self, node: Node, where: FieldPath) -> Any:
        line = node.start_mark.line + 1
        self.values += 1
        if self.values > MAX_VALUES or len(where) > MAX_DEPTH:
            raise SpecError(
                f"the file expands to more than {MAX_VALUES} values or nests deeper than {MAX_DEPTH}",
                code="alias-bomb",
                file=self.document.path,
                line=line,
                field=dotted(where[:4]),
                hint="remove the YAML aliases (&name, *name) that repeat each other",
            )
        self.document.lines.setdefault(where, line)
        if isinstance(node, MappingNode):
            return self.mapping(node, where)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*where, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self.scalar(node, where)

    def mapping(self, node: MappingNode, where: FieldPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise SpecError(
                    "a key must be plain text",
                    code="invalid-yaml",
                    file=self.document.path,
                    line=line,
                    field=dotted(where),
                    hint="quote keys that hold brackets or braces",
                )
            key = str(key_node.value)
            if key in result:
                raise SpecError(
                    f"the key `{dotted((*where, key))}` is written twice",
                    code="duplicate-key",
                    file=self.document.path,
                    line=line,
                    field=dotted((*where, key)),
                    hint="keep one of the two; YAML would silently take the last",
                )
            self.document.lines[(*where, key)] = line
            result[key] = self.build(value_node, (*where, key))
        return result

    def scalar(self, node: ScalarNode, where: FieldPath) -> Any:
        """A scalar by YAML 1.2's core schema; dates and other tags stay text."""
        text = str(node.value)
        if node.style in ("'", '"', "|", ">"):
            return text
        match str(node.tag).rsplit(":", 1)[-1]:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                try:
                    return int(text.replace("_", ""), 0)
                except ValueError:
                    return int(text.replace("_", ""))
            case "float":
                value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
                if value != value or value in (float("inf"), float("-inf")):
                    raise SpecError(
                        f"{text} is not a finite number",
                        code="wrong-type",
                        file=self.document.path,
                        line=node.start_mark.line + 1,
                        field=dotted(where),
                        hint="write a finite number",
                    )
                return value
            case _:
                return text


def apply_override(document: Document, override: str) -> None:
    """Write one `a.b=value` (the value is YAML, so `[1, 2]`, `null` and `true` work) into `document`.

    Raises:
        SpecError: no `=`, an empty key, or a path that runs through something that is not a mapping.
    """
    key, equals, text = override.partition("=")
    parts: FieldPath = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise SpecError(
            f"--set {override} is not of the form key.sub=value",
            code="bad-override",
            file=f"--set {override}",
            field=key or None,
            hint="for example: --set train.learning_rate=3e-5",
        )
    try:
        value = parse_document(f"value: {text.strip() or 'null'}").data["value"]
    except SpecError as problem:
        raise SpecError(
            f"--set {override}: the value is not valid YAML",
            code="bad-override",
            file=f"--set {override}",
            field=key,
            hint="quote it for the shell and for YAML: --set 'name=\"a: b\"'",
        ) from problem
    target: Any = document.data
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise SpecError(
                f"--set {override}: `{part}` holds a plain value, so nothing can be set inside it",
                code="bad-override",
                file=f"--set {override}",
                field=key,
                hint=f"set `{part}` itself instead, for example --set '{part}={json.dumps({parts[-1]: 1})}'",
            )
    target[parts[-1]] = value
    document.overrides[parts] = override
