"""Python's collector of cycles, in a process that holds many jobs for long."""

from __future__ import annotations

import gc

NEW_OBJECTS = 50_000
"""After which the collector looks at them: reading a yard of 10,000 jobs makes a few times as many, and all stay."""


def collect_seldom() -> None:
    """What is loaded by now stays: no tick need wait while the collector walks through all of it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
