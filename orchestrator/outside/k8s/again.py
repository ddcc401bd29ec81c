"""What to do when Kubernetes has moved on meanwhile. Without its client."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import ConflictError

T = TypeVar("T")


class WatchExpired(Exception):
    """What is watched from is too old for the server: list, and begin again."""


def until_unchanged(change: Callable[[], T], tries: int = 20) -> T:
    """Read, decide and write until nobody has written in between: `change` does all three, and raises ConflictError."""
    for left in reversed(range(tries)):
        try:
            return change()
        except ConflictError:
            if not left:
                raise
            time.sleep(0.02)
    raise AssertionError
