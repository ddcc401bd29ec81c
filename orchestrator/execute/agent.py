"""`python -m orchestrator.execute.agent REQUEST.json`: the node agent of one attempt, where there is no Ray.

It outlives the controller that started it and ends with its attempt. A SIGTERM from outside becomes the stop message.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from launch.attempt import AttemptFiles, write_atomically
from orchestrator.execute.member import LaunchRequest, Member

TICK_S = 0.1
TERM_GRACE_S = 60.0


def serve(request: LaunchRequest) -> int:
    """Run one attempt's part to its end. Returns 0; how the ranks ended is in the attempt's directory."""
    member = Member(request)
    stop = AttemptFiles(request.run_dir).stop

    def on_term(_signum: int, _frame: object) -> None:
        if not stop.exists():
            text = json.dumps({"reason": "the node agent was told to end", "deadline": time.time() + TERM_GRACE_S})
            write_atomically(stop, text)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever waits in the terminal
    if not member.start():
        return 0
    while not member.tick():
        time.sleep(TICK_S)
    return 0


if __name__ == "__main__":
    os.chdir("/")
    sys.exit(serve(LaunchRequest.loads(Path(sys.argv[1]).read_text())))
