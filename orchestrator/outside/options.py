"""What is said to a system alone, beside the job: by the home's settings for a queue, and by `--with` for one job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from launch.config import Section, validate
from launch.document import Document, apply_override
from orchestrator.errors import SettingsError, SpecError
from orchestrator.outside.protocol import System
from orchestrator.settings import Settings

S = TypeVar("S", bound=Section)
ALL = "*"
FLAG = "--with"
VARIABLE = "TUNEYARD_OUTSIDE"


def read_options(kind: type[S], settings: Settings, system: System, queue: str, given: Iterable[str]) -> S:
    """The options of a job in `queue`: those for all queues, over them the queue's, over them those `given`.

    Raises:
        SettingsError: TUNEYARD_OUTSIDE has one that cannot be.
        SpecErrors: `--with` has one.
    """
    queues = settings.outside.get(system.value, {})
    said = {**queues.get(ALL, {}), **queues.get(queue, {})}
    document = Document(path=None, data=said)
    try:
        found = validate(kind, document)
    except SpecError as problem:
        where = f"{VARIABLE}: {system.value}, queue {queue}"
        raise SettingsError(f"{where}: {problem.message}", field=VARIABLE, hint=problem.hint) from problem
    for one in given:
        apply_override(document, one, FLAG)
    return validate(kind, document) if document.overrides else found
