"""How much of this machine's memory ranks may have."""

from __future__ import annotations

import os

import psutil

from orchestrator.cluster.model import HOST_SHARE
from orchestrator.execute.oom import levels_of


def host_memory() -> int:
    """Bytes: the machine's, less what its system needs, or what the tightest cgroup around this process allows."""
    limits = [limit for level in levels_of(os.getpid()) if (limit := level.limit()) is not None]
    return min([int(psutil.virtual_memory().total * HOST_SHARE), *limits])
