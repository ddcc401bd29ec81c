"""Where a rank is and since when, and where its time went, for who looks from outside. Standard library alone; entering
costs a few microseconds.

A file of a few bytes that is mapped, so that it tells also of a rank that is stopped, waits in native code, or was
killed. Times are time.monotonic(), which is the same for all processes of a host.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import time
from dataclasses import dataclass, field
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

UNKNOWN = -1  # no step yet from which it trains

_BEAT = struct.Struct(f"<QIIQddqd{len(PHASES)}d")


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
    from_step: int | None = None
    """After how many steps this attempt began to train; None before it did."""
    began_at: float = 0.0
    """Unix time."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by phase from `began_at` to `since`, which they add up to. `save` is time that the training waited."""


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
        self._phase, self._since, self._began_at = 0, time.monotonic(), time.time()
        self._from_step = UNKNOWN
        self._spent = [0.0] * len(PHASES)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by phase until it moved last."""
        return {phase: seconds for phase, seconds in zip(PHASES, self._spent, strict=True) if seconds}

    def enter(self, phase: str, step: int = 0, part: str = "") -> None:
        """It moves on: to another phase, step or part of it, or to the next batch of the same."""
        now = time.monotonic()
        if part == "data":
            self._began = now
        elif part == "exchange":
            self._began = None
        self._spent[self._phase] += now - self._since
        self._phase, self._since = PHASES.index(phase), now
        if phase == "first-step" and self._from_step == UNKNOWN:
            self._from_step = step
        self._count += 1
        # The count goes first to an odd number, so that who reads in between sees that it is not whole.
        self._map[:8] = struct.pack("<Q", 2 * self._count - 1)
        place = self._phase, PARTS.index(part), step, now, self.own_s, self._from_step, self._began_at
        self._map[8:] = _BEAT.pack(0, *place, *self._spent)[8:]
        self._map[:8] = struct.pack("<Q", 2 * self._count)

    def waits(self) -> None:
        """From here on the step waits for other ranks."""
        if self._began is not None:
            self.own_s, self._began = time.monotonic() - self._began, None

    def gathered(self, seconds: float) -> None:
        """So many seconds before now went by in waiting for what others hold: the step is not this rank's own then."""
        if self._began is not None:
            self._began += seconds

    def blocked(self, seconds: float) -> None:
        """So many seconds of its steps so far were spent waiting for a save."""
        step, save = PHASES.index("step"), PHASES.index("save")
        seconds = max(0.0, min(seconds, self._spent[step]))
        self._spent[step] -= seconds
        self._spent[save] += seconds


def read_beat(path: Path) -> Beat | None:
    """What a rank's pulse says; None while there is none."""
    for _ in range(3):
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if len(data) != _BEAT.size:
                return None
            count, phase, part, step, since, own_s, from_step, began_at, *spent = _BEAT.unpack(data)
            if count and count % 2 == 0 and phase < len(PHASES) and part < len(PARTS):
                place = count // 2, PHASES[phase], PARTS[part], step, since, own_s
                known = {name: seconds for name, seconds in zip(PHASES, spent, strict=True) if seconds}
                return Beat(*place, None if from_step == UNKNOWN else from_step, began_at, known)
    return None
