"""What holds for every test: no network for hubs, and nothing left running."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import settings

from launch.attempt import ENV_RUN_ID
from launch.token_cache import ENV_CACHE
from orchestrator.execute.processes import carrying

ENV_SESSION = "PYTEST_YARD_SESSION"  # the tests strip TUNEYARD_ variables, and ranks RAY_ ones
SESSION = f"{os.getpid()}-{time.time_ns()}"
LEAVING_S = 10.0  # a process that has written its last word may take a moment to go

CACHE = tempfile.TemporaryDirectory(prefix="tuneyard-cache-")  # the user's own may be stale, and is not to be filled

# Inherited by all that a test starts.
os.environ[ENV_SESSION] = SESSION
os.environ[ENV_CACHE] = CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"

# How long an example takes is the machine's affair.
settings.register_profile("tuneyard", deadline=None)
settings.load_profile("tuneyard")


def ranks_of_this_session() -> dict[int, str]:
    """Pid → run id of every living process of an attempt that these tests started, wherever it moved."""
    found = {}
    for process in carrying(ENV_SESSION, SESSION):
        try:
            run_id = process.environ().get(ENV_RUN_ID)
        except psutil.Error:
            continue
        if run_id:
            found[process.pid] = run_id
    return found


@pytest.fixture(autouse=True)
def no_rank_is_left() -> Iterator[None]:
    """After every test no process carries the id of a run that began in it."""
    before = set(ranks_of_this_session())
    yield
    deadline = time.monotonic() + LEAVING_S
    while left := {pid: run for pid, run in ranks_of_this_session().items() if pid not in before}:
        if time.monotonic() > deadline:
            pytest.fail(f"still running: {left}")
        time.sleep(0.05)
