"""Values of a job file that are spelt in ways of their own: durations, priorities, names, ids. Pure."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from launch.errors import Refused

PRIORITIES = {"low": -100, "normal": 0, "high": 100}
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SLUG = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
JOB_ID = r"^[a-z0-9]([a-z0-9-]{0,78}[a-z0-9])?$"
MAX_ELEMENTS = 1000


def _seconds(value: Any) -> Any:
    """`2h`, `30m`, `90s`, `1d` or a number of seconds."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", value.strip())
        if match is None:
            raise Refused(f"`{value}` is not a duration", code="bad-duration", hint="write 90s, 30m, 2h or 1d")
        return float(match[1]) * UNITS[match[2]]
    return value


def _priority(value: Any) -> Any:
    if isinstance(value, str):
        if value not in PRIORITIES:
            near = get_close_matches(value, PRIORITIES, n=1, cutoff=0.5)
            raise Refused(
                f"`{value}` is not a priority",
                code="unknown-value",
                hint=(f"did you mean `{near[0]}`? " if near else "") + "write low, normal, high or a whole number",
            )
        return PRIORITIES[value]
    return value


def _job_id(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(JOB_ID, value):
        raise Refused(
            f"`{value[:90]}` is no job's id",
            code="bad-name",
            hint="write ids as `tuneyard submit` and `tuneyard ls` print them: a job's name and a suffix",
        )
    return value


DURATION = r"^\d+(\.\d+)?\s*[smhd]$"
Written = Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=DURATION)]
Duration = Annotated[float, Field(gt=0), BeforeValidator(_seconds, json_schema_input_type=Written)]
Priority = Annotated[
    int,
    Field(ge=-1000, le=1000),
    BeforeValidator(
        _priority, json_schema_input_type=Annotated[int, Field(ge=-1000, le=1000)] | Literal["low", "normal", "high"]
    ),
]
JobId = Annotated[str, BeforeValidator(_job_id, json_schema_input_type=Annotated[str, Field(pattern=JOB_ID)])]
Elements = (
    Annotated[int, Field(ge=1, le=MAX_ELEMENTS)]
    | Annotated[
        dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(json_schema_extra={"minProperties": 1})
    ]
)
AtOnce = Annotated[int, Field(ge=1, le=MAX_ELEMENTS)]
