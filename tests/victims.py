"""`python -m tests.victims`: launch, where ranks run out of memory, truly or as they are told to, or do not move on.

VICTIM is a Victim as JSON; without it nothing is done. CGROUP is a cgroup of memory that every rank moves into. SLOW
has seconds by phase: every rank takes so much longer when it is in that phase for the first time.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENV_VICTIM, ENV_CGROUP, ENV_SLOW = "VICTIM", "CGROUP", "SLOW"
SLOW_S = 0.2


@dataclass(frozen=True)
class Victim:
    """Who it is, when, and how."""

    rank: int
    step: int
    """From 1."""
    attempts: tuple[int, ...] = (1,)
    where: str = "forward"
    """load, forward, backward, or copy: before the note is written of a copy in memory, of so many steps."""
    how: str = "cuda"
    """cuda: torch's exception; host: Python's; cpu: what torch's CPU allocator raises; kill: SIGKILL, no exception.
    stop: SIGSTOP; hang: it waits for what never comes; slow: each step from then on takes SLOW_S longer."""

    def strike(self) -> None:
        import torch

        match self.how:
            case "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            case "host":
                raise MemoryError
            case "cpu":
                torch.empty(1 << 60, dtype=torch.uint8)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                never_returns()
            case "slow":
                time.sleep(SLOW_S)


def never_returns() -> None:
    threading.Event().wait()


def install(victim: Victim) -> None:
    """Change the program of this process, if it is the one."""
    import launch.train
    from launch.attempt import ENV_RUN_ID

    attempt = int(os.environ[ENV_RUN_ID].rpartition(".")[2])
    if victim.rank != int(os.environ.get("RANK", "0")) or attempt not in victim.attempts:
        return
    summed = launch.train.Loop.summed_loss

    def unlucky(loop: launch.train.Loop, *arguments: Any) -> Any:
        if loop.step + 1 != victim.step and not (victim.how == "slow" and loop.step >= victim.step):
            return summed(loop, *arguments)
        if victim.where == "forward":
            victim.strike()
        loss = summed(loop, *arguments)
        loss.register_hook(lambda _gradient: victim.strike())
        return loss

    def unbuilt(*_arguments: Any, **_options: Any) -> None:
        victim.strike()

    if victim.where == "copy":
        _in_copy(victim)
    elif victim.where == "load":
        launch.train.build_engine = unbuilt
    else:
        launch.train.Loop.summed_loss = unlucky


def _in_copy(victim: Victim) -> None:
    from launch.checkpoint.memory import Source

    manifest = Source.manifest

    def unwritten(source: Source, step: int, *arguments: Any) -> Any:
        if step == victim.step:
            victim.strike()
        return manifest(source, step, *arguments)

    Source.manifest = unwritten


def make_slow(seconds: dict[str, float]) -> None:
    """Change the program of this process, so that a phase takes longer once."""
    from launch.pulse import Pulse

    enter = Pulse.enter

    def slowly(pulse: Pulse, phase: str, *arguments: Any, **options: Any) -> None:
        enter(pulse, phase, *arguments, **options)
        time.sleep(seconds.pop(phase, 0.0))

    Pulse.enter = slowly  # type: ignore[method-assign]


def main() -> None:
    if os.environ.get(ENV_CGROUP):
        Path(os.environ[ENV_CGROUP], "cgroup.procs").write_text(str(os.getpid()))
    if os.environ.get(ENV_VICTIM):
        install(Victim(**json.loads(os.environ[ENV_VICTIM])))
    if os.environ.get(ENV_SLOW):
        make_slow(json.loads(os.environ[ENV_SLOW]))
    from launch.__main__ import main

    main()


if __name__ == "__main__":
    main()
