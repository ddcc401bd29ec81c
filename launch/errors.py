"""The root of the error hierarchy: every refusal has a code, a sentence and a way out.

It lives in `launch` because the job-file reader raises it and `launch` imports nothing of `orchestrator`;
`orchestrator.errors` extends it with what only a control plane can run into.
"""

from __future__ import annotations

from pathlib import Path


class TuneyardError(Exception):
    """An error a person can act on.

    Attributes:
        code: a stable kebab-case name, for scripts and for the docs.
        message: what is wrong and why, one sentence.
        field: dotted path of the field at fault (`train.learning_rate`), if there is one.
        file, line: where it was written (1-based), if it was written in a file.
        hint: what to do about it.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        field: str | None = None,
        file: str | Path | None = None,
        line: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.message = message
        self.field = field
        self.file = str(file) if file is not None else None
        self.line = line
        self.hint = hint

    def as_dict(self) -> dict[str, str | int | None]:
        """The same facts as JSON fields, for `-o json` and the REST API."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "file": self.file,
            "line": self.line,
            "hint": self.hint,
        }

    def __str__(self) -> str:
        """A compiler-like block: code and message, then where, then what to do."""
        lines = [f"error[{self.code}]: {self.message}"]
        if self.file is not None:
            lines.append(f"  --> {self.file}" + (f":{self.line}" if self.line is not None else ""))
        if self.field:
            lines.append(f"  field: {self.field}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class SpecError(TuneyardError):
    """The job file, or something it names, is wrong. Never worth a retry."""

    code = "invalid-job"


class SpecErrors(SpecError):
    """Several things are wrong with one job file; all of them are told at once."""

    code = "invalid-job"

    def __init__(self, errors: list[SpecError]) -> None:
        assert errors
        first = errors[0]
        super().__init__(
            first.message, code=first.code, field=first.field, file=first.file, line=first.line, hint=first.hint
        )
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(SpecError.__str__(error) for error in self.errors)


class Refused(ValueError):
    """What a validator of a job file's section says; `launch.explain` adds where it was written.

    Attributes:
        at: the key at fault, from the section that was validated; its line is told, if it was written.
    """

    def __init__(self, message: str, *, at: tuple[str | int, ...] = (), code: str = "inconsistent", hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.at = at
        self.code = code
        self.hint = hint


class DataError(TuneyardError):
    """The data cannot be trained on: a missing column, an empty split, a label never seen."""

    code = "bad-data"


class ContractError(TuneyardError):
    """What a rank finds itself running is not what its contract says."""

    code = "contract-mismatch"
