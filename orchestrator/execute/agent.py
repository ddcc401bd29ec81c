"""`python -m orchestrator.execute.agent REQUEST.json`: the node agent of one attempt, where there is no Ray.

It outlives the controller that started it and ends with its attempt. A SIGTERM from outside becomes the stop message.

With `--spare` it has no attempt yet: it keeps a standby for one, and takes the request's path from standard input. As
long as it has none, it ends with the process that holds the other end. It says so when the standby is ready.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

from launch.attempt import AttemptFiles, write_atomically
from orchestrator.execute.member import LaunchRequest, Member
from orchestrator.execute.standby import Standbys, node_environment

TICK_S = 0.1
TERM_GRACE_S = 60.0


def spare() -> int:
    """Wait for a request with a standby beside, and run it to its end. Returns 0, also where none came."""
    standbys = Standbys(1)
    standbys.want(node_environment())
    try:
        told = False
        while not select.select([sys.stdin], [], [], TICK_S)[0]:
            standbys.tick()
            if not told and standbys.report().count:
                print("ready", flush=True)
                told = True
        path = sys.stdin.readline().strip()
        return serve(LaunchRequest.loads(Path(path).read_text()), standbys) if path else 0
    finally:
        standbys.close()


def serve(request: LaunchRequest, standbys: Standbys | None = None, grace_s: float = TERM_GRACE_S) -> int:
    """Run one attempt's part to its end, after SIGTERM within `grace_s`. Returns 0; how the ranks ended is in the
    attempt's directory."""
    member = Member(request)
    stop = AttemptFiles(request.run_dir).stop

    def on_term(_signum: int, _frame: object) -> None:
        deadline = time.time() + grace_s
        try:
            told = json.loads(stop.read_bytes())
        except (FileNotFoundError, ValueError):
            told = {"reason": "the node agent was told to end", "deadline": deadline}
        write_atomically(stop, json.dumps(told | {"deadline": min(deadline, told["deadline"])}))

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever waits in the terminal
    if not member.start(standbys):
        return 0
    while not member.tick():
        time.sleep(TICK_S)
    return 0


if __name__ == "__main__":
    os.chdir("/")
    sys.exit(spare() if sys.argv[1] == "--spare" else serve(LaunchRequest.loads(Path(sys.argv[1]).read_text())))
