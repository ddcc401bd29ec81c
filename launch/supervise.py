"""Runs a user's own command as one rank: under the leash, with the same files around it. Torch-free."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.contract import (
    ENV_CHECKPOINT_DIR,
    ENV_OUTPUT_DIR,
    ENV_PROGRESS_FILE,
    ENV_STOP_FILE,
    AttemptFiles,
    ExitCode,
    RankError,
    RunContract,
)
from launch.ending import Ending
from launch.errors import SpecError
from launch.leash import hold_leash
from launch.stop import StopWish

CHECK_EVERY_S = 0.2
LOG_TAIL = 1 << 16
STOP_GRACE_S = 30.0  # what the launcher itself grants after SIGTERM before it kills


def run_command(contract: RunContract, files: AttemptFiles, rank: int, ending: Ending, stop: StopWish) -> None:
    """Run the command to its end and record it: DONE for status 0, STOPPED for the status of that name or for a
    clean end after a stop message, CRASH otherwise.

    Raises:
        SpecError: the command cannot be started.
    """
    assert contract.command is not None
    child = _start(contract, files, rank)
    hold_leash(contract.leash_s, ending, before_end=lambda: _kill_group(child))
    while True:
        try:
            status = child.wait(CHECK_EVERY_S)
            break
        except subprocess.TimeoutExpired:
            if stop.signalled:
                stop.pass_on(STOP_GRACE_S)
    if status == 0:
        ending.record(ExitCode.STOPPED if files.stop.exists() else ExitCode.DONE)
    elif status == ExitCode.STOPPED:
        ending.record(ExitCode.STOPPED)
    else:
        by_signal = -status if status < 0 else None
        how = f"was ended by {signal.Signals(-status).name}" if by_signal else f"ended with status {status}"
        trace = last_traceback(files.log(rank))
        told = f": {trace.splitlines()[-1]}" if trace else ""
        error = RankError(
            code="command-failed",
            message=f"{contract.command[0]} {how}{told}",
            hint=f"its output is in {files.log(rank)}",
            traceback=trace,
        )
        ending.record(ExitCode.CRASH, signal=by_signal, status=None if by_signal else status, error=error)


def last_traceback(log: Path) -> str | None:
    """The last Python traceback at the end of a log, up to its error; None if there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - LOG_TAIL))
            text = stream.read().decode(errors="replace")
    except OSError:
        return None
    start = text.rfind("Traceback (most recent call last)")
    if start < 0:
        return None
    lines = text[start:].splitlines()
    # The frames are indented; the error is the first line after them that is not.
    end = next(
        (number for number, line in enumerate(lines[1:], start=1) if line and not line.startswith(" ")), len(lines) - 1
    )
    return "\n".join(lines[: end + 1])


def _start(contract: RunContract, files: AttemptFiles, rank: int) -> subprocess.Popen[bytes]:
    assert contract.command is not None
    # The launcher sets these for a gang alone; a script need not care whether it is one.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": contract.main_address}
    alone["MASTER_PORT"] = str(contract.main_port)
    environment = {
        **alone,
        **os.environ,
        ENV_CHECKPOINT_DIR: contract.checkpoint_dir,
        ENV_OUTPUT_DIR: contract.output_dir,
        ENV_STOP_FILE: str(files.stop),
        ENV_PROGRESS_FILE: str(files.progress(rank)),
    }
    try:
        return subprocess.Popen(
            contract.command,
            cwd=contract.working_dir,
            env=environment,
            start_new_session=True,  # a group of its own, so that what it starts can be ended with it
            preexec_fn=_die_with_parent(),
        )
    except OSError as problem:
        raise SpecError(
            f"cannot start `{contract.command[0]}` in {contract.working_dir or Path.cwd()}: {problem.strerror}",
            code="command-not-started",
            field="run",
            hint="check the command's path and the directory on the node",
        ) from problem


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """The command and what it started, as far as that stayed in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _die_with_parent() -> Callable[[], None] | None:
    """Have the kernel kill the child when this process dies, by SIGKILL too; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: after it, only async-safe calls
    set_parent_death_signal = 1

    def in_child() -> None:
        libc.prctl(set_parent_death_signal, signal.SIGKILL)

    return in_child
