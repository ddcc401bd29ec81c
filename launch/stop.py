"""How an attempt is asked to stop: a file in its directory, or SIGTERM from outside. Torch-free.

Either is only a wish of one process until the ranks have agreed on it at a step boundary.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

from launch.contract import AttemptFiles, StopRequest, write_atomically


class StopWish:
    """Whether this process has been asked to stop."""

    def __init__(self, files: AttemptFiles) -> None:
        self._files = files
        self._signalled = False

    def listen(self) -> None:
        """Make SIGTERM a wish instead of an end, one that was held back until now, too; main thread only."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        self._signalled = True  # nothing more: a handler runs between any two instructions

    @property
    def signalled(self) -> bool:
        return self._signalled

    def wished(self) -> bool:
        """True after SIGTERM, or once stop.json lies in the attempt's directory."""
        return self._signalled or self._files.stop.exists()

    def pass_on(self, grace_s: float) -> None:
        """Write the wish as stop.json, for processes that see the file but not the signal."""
        if not self._files.stop.exists():
            request = StopRequest(reason="SIGTERM", deadline=time.time() + grace_s)
            write_atomically(self._files.stop, request.model_dump_json())
