"""Looks at something again and again until it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from orchestrator.errors import ExecutorError, StoreError, YardError

T = TypeVar("T")
POLL_S = 0.3
AWAY_S = 60.0
SLOWER = 1.2


def follow(
    what: str, look: Callable[[], T], ended: Callable[[T], bool], timeout: float | None, most_s: float = POLL_S
) -> Iterator[T]:
    """What `look` sees, until that has `ended`; who does not answer for a moment is waited for. Looks become rarer, up
    to one in `most_s` seconds.

    Raises:
        TuneyardError: what `look` raised for a minute.
        YardError: `timeout` seconds passed before the end.
    """
    start = last = time.monotonic()
    pause = POLL_S
    while True:
        asked = time.monotonic()
        try:
            seen = look()
            last = time.monotonic()
            yield seen
            if ended(seen):
                return
        except (YardError, StoreError, ExecutorError):
            if time.monotonic() - last > AWAY_S:
                raise
        if timeout is not None and time.monotonic() - start > timeout:
            raise YardError(f"{what} has not ended within {timeout:g} s", code="timeout", hint="it goes on; wait again")
        time.sleep(max(pause, last - asked))  # what takes long to tell is asked less often
        pause = min(most_s, pause * SLOWER)
