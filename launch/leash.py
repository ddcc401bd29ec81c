"""The leash: a rank ends by itself when its node agent has fallen silent. Torch-free.

After a node is lost nobody can end its ranks, and two attempts of one job must never train at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launch.contract import ENV_HEARTBEAT, ExitCode, RankError
from launch.ending import Ending

CHECK_EVERY_S = 0.5


class Leash(threading.Thread):
    """Reads the agent's heartbeat, a time.monotonic() of this host, and ends the process when it is too old.

    A file that cannot be read says nothing new: the last heartbeat counts, and before the first one the start.
    """

    def __init__(self, heartbeat: Path, leash_s: float, ending: Ending, before_end: Callable[[], None]) -> None:
        super().__init__(name="leash", daemon=True)
        self._heartbeat = heartbeat
        self._leash_s = leash_s
        self._ending = ending
        self._before_end = before_end
        self._last = time.monotonic()

    def run(self) -> None:
        while True:
            time.sleep(CHECK_EVERY_S)
            silence = self.silence()
            if silence > self._leash_s:
                self._before_end()
                message = f"the node agent has been silent for {silence:.1f} s, more than leash_s={self._leash_s:g}"
                self._ending.record(
                    ExitCode.LEASH_EXPIRED,
                    error=RankError(code="leash-expired", message=message, hint="see the agent's log on this node"),
                )
                self._ending.leave()

    def silence(self) -> float:
        """Seconds since the agent's last heartbeat."""
        with contextlib.suppress(OSError, ValueError):  # gone, or half-written: its age goes on growing
            self._last = float(self._heartbeat.read_text())
        return time.monotonic() - self._last


def hold_leash(leash_s: float, ending: Ending, before_end: Callable[[], None] = lambda: None) -> None:
    """Start the leash if the environment names a heartbeat; a run without an agent has none."""
    heartbeat = os.environ.get(ENV_HEARTBEAT)
    if heartbeat:
        Leash(Path(heartbeat), leash_s, ending, before_end).start()
