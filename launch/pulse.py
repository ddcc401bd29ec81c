"""Where a rank is and since when, for who looks from outside. Standard library alone; entering costs a microsecond.

A file of a few bytes that is mapped, so that it tells also of a rank that is stopped, or waits in native code. Times
are time.monotonic(), which is the same for all processes of a host.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

PHASES = (
    "start",
    "load",
    "first-step",
    "step",
    "evaluate",
    "save",
    "export",
    "done",
)
"""What a rank does. The first step compiles, allocates and reads what the others find ready."""
PARTS = ("", "data", "forward", "backward", "exchange", "update")
"""Of a step, in this order. Ranks wait for each other in `backward` and `exchange`."""

_BEAT = struct.Struct("<QIIQdd")


@dataclass(frozen=True)
class Beat:
    """What a pulse says."""

    count: int
    """Moves so far. Ranks that wait for each other make the same ones: whoever is behind keeps the others."""
    phase: str
    part: str
    step: int
    since: float
    """When it moved last."""
    own_s: float
    """Seconds of the last whole step that went by before the rank first waited for others; 0 where nobody knows."""


class Pulse:
    """Told by the rank's main thread alone."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(_BEAT.size))
        with path.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), _BEAT.size)
        self._count = 0
        self.own_s = 0.0
        """Of the step that is being made, or of the last one."""
        self._began: float | None = None

    def enter(self, phase: str, step: int = 0, part: str = "") -> None:
        """It moves on: to another phase, step or part of it, or to the next batch of the same."""
        now = time.monotonic()
        if part == "data":
            self._began = now
        elif part == "exchange":
            self._began = None
        self._count += 1
        # The count goes first to an odd number, so that who reads in between sees that it is not whole.
        self._map[:8] = struct.pack("<Q", 2 * self._count - 1)
        place = PHASES.index(phase), PARTS.index(part), step, now, self.own_s
        self._map[8:] = _BEAT.pack(0, *place)[8:]
        self._map[:8] = struct.pack("<Q", 2 * self._count)

    def waits(self) -> None:
        """From here on the step waits for other ranks."""
        if self._began is not None:
            self.own_s, self._began = time.monotonic() - self._began, None


def read_beat(path: Path) -> Beat | None:
    """What a rank's pulse says; None while there is none."""
    for _ in range(3):
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if len(data) != _BEAT.size:
                return None
            count, phase, part, step, since, own_s = _BEAT.unpack(data)
            if count and count % 2 == 0 and phase < len(PHASES) and part < len(PARTS):
                return Beat(count // 2, PHASES[phase], PARTS[part], step, since, own_s)
    return None
