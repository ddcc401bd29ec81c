"""The scheduler's rules as the settings have them."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from orchestrator.errors import SettingsError
from orchestrator.schedule.gang import Rules
from orchestrator.settings import Settings


def rules_of(settings: Settings) -> Rules:
    """The policy's rules, with what the settings change. Raises SettingsError for a rule that there is not."""
    known = {field.name: field.type for field in fields(Rules)}
    for name, value in settings.rules.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise SettingsError(
                f"TUNEYARD_RULES: there is no rule `{name}`",
                field="TUNEYARD_RULES",
                hint=f"did you mean `{near[0]}`?" if near else f"rules are {', '.join(known)}",
            )
        if (known[name] == "bool") != isinstance(value, bool) or value < 0:
            raise SettingsError(
                f"TUNEYARD_RULES: `{name}` cannot be {value}",
                field="TUNEYARD_RULES",
                hint="write true or false" if known[name] == "bool" else "write a number, 0 or above",
            )
    values = {name: int(value) if known[name] == "int" else value for name, value in settings.rules.items()}
    return Rules(**values)  # type: ignore[arg-type]
