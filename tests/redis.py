"""A Redis server of the tests' own, where the program is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from orchestrator.execute.local import free_port

WHY_NOT = "Redis is not installed (Debian: apt-get install redis-server)"


def is_installed() -> bool:
    return shutil.which("redis-server") is not None


@contextmanager
def a_redis() -> Iterator[str]:
    """host:port of a server that keeps nothing on disk; it ends with the context. Skips where it is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip(WHY_NOT)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tuneyard-redis-") as folder:
        argv = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()
