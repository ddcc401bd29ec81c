"""How much of this machine's memory ranks may have."""

from __future__ import annotations

import os

import psutil

from orchestrator.cluster.model import HOST_SHARE
from orchestrator.execute.oom import levels_of


def host_memory(wished_gb: float | None = None) -> int:
    """Bytes: what was wished, in 10^9 of them, else the machine's, less what its system needs. At most what the
    tightest cgroup around this process allows."""
    limits = [limit for level in levels_of(os.getpid()) if (limit := level.limit()) is not None]
    whole = int(psutil.virtual_memory().total * HOST_SHARE) if wished_gb is None else int(wished_gb * 10**9)
    return min([whole, *limits])
