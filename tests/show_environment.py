"""`python -m tests.show_environment --contract FILE`: a rank that writes down what it was started with, and ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[2]).parent
    shown = {
        "environment": dict(os.environ),
        "argv": sys.argv[1:],
        "cwd": str(Path.cwd()),
        "path": sys.path[0],
        "session": os.getsid(0) == os.getpid(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "stdin": os.read(0, 1).decode(),
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:3],  # noqa: PTH208
    }
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"shown-{rank}.json").write_text(json.dumps(shown))
    sys.exit(int(os.environ.get("STATUS", "0")))


if __name__ == "__main__":
    main()
