"""`python -m orchestrator.execute.evacuate --grace 100`: let what runs on this node save and end, before it goes away.

For whoever takes it away: the preStop hook of a pod, a spot notice, an administrator. Every attempt of the yard that
has ranks here is asked to stop, with its ranks on other nodes: they save, and the job goes back to the queue. Returns 0
once no rank has been here for a moment, and 1 when the grace is over before.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from launch.attempt import AttemptFiles, write_atomically
from launch.contract import StopRequest
from orchestrator.execute.processes import carrying, of_any_run
from orchestrator.settings import Settings

QUIET_S = 2.0  # an attempt may have been on its way
LOOK_S = 0.1
WHY = "the node goes away"


def evacuate(home: Path, grace_s: float, of: tuple[str, str] | None = None) -> bool:
    """Whether no rank of the yard in `home` is on this node any more.

    `of` is a variable, with its value, that all of the node's processes have in their environment, for where one host
    has several nodes.
    """
    deadline, seen_at = time.time() + grace_s, time.monotonic()
    while time.time() < deadline:
        pids = of_any_run() if of is None else [process.pid for process in carrying(*of)]
        attempts = {folder for folder in map(attempt_dir, pids) if folder and folder.is_relative_to(home)}
        for folder in attempts:
            stop = AttemptFiles(folder).stop
            if not stop.exists():
                write_atomically(stop, StopRequest(reason=WHY, deadline=deadline).model_dump_json())
        if attempts:
            seen_at = time.monotonic()
        elif time.monotonic() - seen_at > QUIET_S:
            return True
        time.sleep(LOOK_S)
    return False


def attempt_dir(pid: int) -> Path | None:
    """The attempt's directory of a rank, in which its output goes into a log of its own; None for other processes."""
    try:
        log = Path(f"/proc/{pid}/fd/1").readlink()
    except OSError:  # it has ended
        return None
    return log.parents[1] if log.name == "log" and log.parent.name.startswith("rank-") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grace", type=float, default=60.0, help="seconds until the node is gone")
    options = parser.parse_args()
    sys.exit(0 if evacuate(Settings().root, options.grace) else 1)


if __name__ == "__main__":
    main()
