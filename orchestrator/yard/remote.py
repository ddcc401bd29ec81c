"""Other machines of a yard, joined and left by ssh."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import YardError

JOIN_S, LEAVE_S = 300.0, 120.0
AT_ONCE = 16
TAIL = 400


class Remote(BaseModel):
    """A machine, and how it is reached."""

    model_config = ConfigDict(frozen=True)

    host: str
    """As ssh knows it; the node's name, too."""
    ssh: tuple[str, ...]
    """The command that takes a host and a line for its shell."""
    command: tuple[str, ...]
    """What `tuneyard` is there."""

    def join(self, url: str, token: str) -> None:
        """Raises YardError."""
        self._run("node", "join", url, "--token-stdin", "--name", self.host, typed=token, seconds=JOIN_S)

    def leave(self) -> None:
        """Raises YardError."""
        self._run("node", "leave", "--force", typed="", seconds=LEAVE_S)

    def _run(self, *words: str, typed: str, seconds: float) -> None:
        line = shlex.join([*self.command, *words])
        try:
            done = subprocess.run(
                [*self.ssh, self.host, line], input=f"{typed}\n", capture_output=True, text=True, timeout=seconds,
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise self._error(words, str(problem)) from None
        if done.returncode != 0:
            raise self._error(words, (done.stderr or done.stdout).strip()[-TAIL:])

    def _error(self, words: Sequence[str], told: str) -> YardError:
        return YardError(
            f"{self.host}: `tuneyard {' '.join(words[:2])}` failed: {told}",
            code="host-failed",
            field="hosts",
            hint=f"try `{shlex.join([*self.ssh, self.host, shlex.join([*self.command, 'doctor'])])}`",
        )


def on_all(remotes: Sequence[Remote], what: Callable[[Remote], None]) -> list[YardError]:
    """Do it on all at once; what went wrong."""

    def one(remote: Remote) -> YardError | None:
        try:
            what(remote)
        except YardError as problem:
            return problem
        return None

    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return [problem for problem in pool.map(one, remotes) if problem is not None]
