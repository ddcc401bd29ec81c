"""How a rank ends: exit.json first, then the process, and nothing can turn it into another status. Torch-free."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

from launch.contract import AttemptFiles, ExitCode, RankError, RankExit, RankResult, write_atomically


class Ending:
    """Writes a rank's exit.json once, whichever of its threads comes first."""

    def __init__(self, files: AttemptFiles, rank: int) -> None:
        self._files = files
        self._rank = rank
        self._lock = threading.RLock()
        self._code: ExitCode | None = None

    def record(
        self,
        code: ExitCode,
        *,
        error: RankError | None = None,
        result: RankResult | None = None,
        signal: int | None = None,
        status: int | None = None,
    ) -> None:
        """Write how this rank ends; the first word counts, so trouble while leaving does not undo a result.

        The caller must `leave` next: the lock stays held, so that no other ending, such as the leash's, can be
        written between the two. A full disk is told on stderr and does not keep the process from ending.
        """
        self._lock.acquire()
        if self._code is not None:
            return
        self._code = code
        how = {"signal": signal, "status": status, "error": error, "result": result}
        ended = RankExit(rank=self._rank, code=code, time=time.time(), **how)
        try:
            write_atomically(self._files.exit(self._rank), ended.model_dump_json(indent=2))
        except OSError as problem:
            print(f"cannot write {self._files.exit(self._rank)}: {problem}", file=sys.stderr)

    def leave(self) -> NoReturn:
        """End the process at once with the recorded code.

        Interpreter shutdown is skipped on purpose: native libraries' exit handlers have been seen to abort after a
        run whose results were right, and torchelastic reads the status.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        assert self._code is not None
        os._exit(self._code)
