"""Strict YAML: plain values plus the line every one of them was written on.

Differs from a plain loader in what people's files need: a duplicate key is refused, a value keeps its line for
error messages, aliases cannot explode, and only JSON's types exist (no dates, no tags), so a file means the same
here, in an editor's JSON Schema check and over REST.
"""

from __future__ import annotations

import difflib
import math
import re
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
MAX_DIGITS = 100


@dataclass
class Document:
    """A parsed file: `data` holds JSON types only, `lines` maps a field path to its 1-based line, `overrides` to the
    option that wrote it, as it was given."""

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
        named = dotted(where) or None
        for path, override in self.overrides.items():
            if path == where[: len(path)] or (where == path[: len(where)] and where not in self.lines):
                return SpecError(message, code=code, field=named, hint=hint, file=override)
        return SpecError(message, code=code, field=named, file=self.path, line=self.line_of(where), hint=hint)


def dotted(where: Iterable[str | int]) -> str:
    """`("data", "train", 0)` as `data.train[0]`."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def is_text(text: str) -> bool:
    """Whether a file or a database can hold it: no NUL, no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def path_of(field: str) -> FieldPath:
    """`data.train[0]` as `("data", "train", 0)`: the opposite of dotted."""
    return tuple(int(part[1:-1]) if part[0] == "[" else part for part in re.findall(r"\[\d+\]|[^.\[\]]+", field))


def read_document(path: Path, overrides: Iterable[str] = ()) -> Document:
    """The file at `path` with each `a.b=value` of `overrides` applied on top.

    Raises:
        SpecError: absent, not a file, too large, not UTF-8, not YAML, not a mapping, or a bad override.
    """
    try:
        if not path.is_file():
            raise _no_file(path)
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as problem:
        raise SpecError(
            f"cannot read {path}: {problem.strerror}", code="file-unreadable", file=path, hint="check its permissions"
        ) from problem
    if len(raw) > MAX_BYTES:
        raise SpecError(
            f"{path} has more than {MAX_BYTES} bytes, the most that a job file may have",
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


def _no_file(path: Path) -> SpecError:
    """What is wrong with a path that is no regular file."""
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".yaml", ".yml"))
        hint = f"name a file in it, such as {path / files[0]}" if files else "name a file; `tuneyard init` writes one"
        return SpecError(f"{path} is a directory", code="file-not-found", file=path, hint=hint)
    if path.exists():
        return SpecError(
            f"{path} is not a regular file", code="file-not-found", file=path, hint="save the job in a file first"
        )
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path, or write one with `tuneyard init`"
    return SpecError(f"the file {path} does not exist", code="file-not-found", file=path, hint=hint)


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
            hint="indent with spaces, not tabs"
            if "'\\t'" in str(problem.problem)
            else "check indentation, quotes, brackets and colons around this line",
        ) from problem
    except RecursionError as problem:
        raise _too_deep(path) from problem
    except (YAMLError, ValueError) as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise SpecError(
            f"not valid YAML: {reason}", code="invalid-yaml", file=path, hint="is this a YAML file?"
        ) from problem
    document = Document(path=path, data={})
    if not isinstance(node, MappingNode):
        raise SpecError(
            "the file is empty"
            if node is None
            else f"a job file is a mapping of keys to values; this is {_kind_of(node)}",
            code="not-a-mapping",
            file=path,
            line=1 if node is None else node.start_mark.line + 1,
            hint="write `key: value` lines, such as `name: my-job`; `tuneyard init` writes a whole file",
        )
    data = _Builder(document).build(node, ())
    assert isinstance(data, dict)
    document.data = data
    return document


def _too_deep(path: Path | None, line: int | None = None, field: str | None = None) -> SpecError:
    return SpecError(
        f"the file nests deeper than {MAX_DEPTH} levels",
        code="too-deep",
        file=path,
        line=line,
        field=field,
        hint="no key of a job file is deeper than four levels: is a bracket never closed?",
    )


def _kind_of(node: Node) -> str:
    return "a list" if isinstance(node, SequenceNode) else "a single value"


class _Builder:
    """Turns YAML nodes into JSON values, remembering lines and counting what aliases expand to."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0
        self.open: set[int] = set()  # ids of the nodes that are being built

    def build(self, node: Node, where: FieldPath) -> Any:
        line = node.start_mark.line + 1
        self.values += 1
        if id(node) in self.open:
            raise self.error(
                where[:-1], line, f"`*{node.anchor}` stands inside what it repeats", code="recursive-alias",
                hint="remove the alias",
            )  # fmt: skip
        if self.values > MAX_VALUES:
            raise self.error(
                where[:1], self.document.lines[where[:1]], f"the file expands to more than {MAX_VALUES} values",
                code="alias-bomb",
                hint="remove the YAML aliases (&name, *name) that repeat each other",
            )  # fmt: skip
        if len(where) > MAX_DEPTH:
            raise _too_deep(self.document.path, line, dotted(where[:1]))
        self.document.lines.setdefault(where, line)
        if isinstance(node, ScalarNode):
            return self.scalar(node, where)
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self.mapping(node, where)
            assert isinstance(node, SequenceNode)
            return [self.build(item, (*where, index)) for index, item in enumerate(node.value)]
        finally:
            self.open.discard(id(node))

    def error(self, where: FieldPath, line: int, message: str, *, code: str, hint: str) -> SpecError:
        return SpecError(message, code=code, file=self.document.path, line=line, field=dotted(where) or None, hint=hint)

    def mapping(self, node: MappingNode, where: FieldPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise self.error(
                    where, line, "a key must be plain text", code="invalid-yaml",
                    hint="quote keys that hold brackets or braces",
                )  # fmt: skip
            key = str(key_node.value)
            if key in result:
                before = self.document.lines[(*where, key)]
                raise self.error(
                    (*where, key), line, f"the key `{dotted((*where, key))}` is written twice", code="duplicate-key",
                    hint=f"keep one of the two; the other is on line {before}",
                )  # fmt: skip
            self.document.lines[(*where, key)] = line
            result[key] = self.build(value_node, (*where, key))
        return result

    def scalar(self, node: ScalarNode, where: FieldPath) -> Any:
        """A scalar by YAML 1.2's core schema; dates and other tags stay text."""
        text = str(node.value)
        if not is_text(text):
            raise self.error(
                where, node.start_mark.line + 1, f"`{dotted(where)}` holds a character that is no text",
                code="not-text", hint="remove the escape (\\0 or \\ud800 and the like)",
            )  # fmt: skip
        if node.style in ("'", '"', "|", ">"):
            return text
        match str(node.tag).rsplit(":", 1)[-1]:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return self.whole_number(text, node, where)
            case "float":
                value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
                if not math.isfinite(value):
                    raise self.error(
                        where, node.start_mark.line + 1, f"`{dotted(where)}` is {text}; it must be a finite number",
                        code="wrong-type", hint="write a finite number",
                    )  # fmt: skip
                return value
            case _:
                return text

    def whole_number(self, text: str, node: ScalarNode, where: FieldPath) -> int:
        digits = text.replace("_", "")
        if len(digits) > MAX_DIGITS:
            raise self.error(
                where, node.start_mark.line + 1, f"`{dotted(where)}` is a number of {len(digits)} digits",
                code="out-of-range", hint="write a smaller number",
            )  # fmt: skip
        try:
            return int(digits, 0)
        except ValueError:  # a leading zero, which YAML 1.2 reads as a decimal number
            return int(digits)


def apply_override(document: Document, override: str, flag: str = "--set") -> None:
    """Write one `a.b=value` (the value is YAML, so `[1, 2]`, `null` and `true` work) into `document`; `flag` is the
    option that it was given by.

    Raises:
        SpecError: no `=`, an empty key, or a path that runs through something that is not a mapping.
    """
    written = f"{flag} {override}"
    key, equals, text = override.partition("=")
    parts: FieldPath = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise SpecError(
            f"{written} is not of the form key.sub=value",
            code="bad-override",
            file=written,
            field=key or None,
            hint=f"for example: {flag} {'train.learning_rate=3e-5' if flag == '--set' else 'key=value'}",
        )
    try:
        value = parse_document(f"value: {text.strip() or 'null'}").data["value"]
    except SpecError as problem:
        syntax = problem.code == "invalid-yaml"
        raise SpecError(
            f"{written}: the value is not valid YAML" if syntax else f"{written}: {problem.message}",
            code="bad-override",
            file=written,
            field=key,
            hint=f"quote it for the shell and for YAML: {flag} 'name=\"a: b\"'" if syntax else problem.hint,
        ) from problem
    target: Any = document.data
    for depth, part in enumerate(parts[:-1]):
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            whole = ".".join(str(part) for part in parts[: depth + 1])
            held = "a list" if isinstance(target, list) else "a plain value"
            raise SpecError(
                f"{written}: `{whole}` holds {held}, so no key can be set inside it",
                code="bad-override",
                file=written,
                field=key,
                hint=f"set `{whole}` as a whole: {flag} '{whole}=...'",
            )
    target[parts[-1]] = value
    document.overrides[parts] = written
