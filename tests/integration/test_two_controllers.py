"""What Kubernetes runs, as processes of this machine: a Ray head that asks for a token, and two controllers that
connect to it from outside (ray://) and share a PostgreSQL. One acts, both answer, and the second takes over."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.client import Client
from orchestrator.execute.local import free_port
from orchestrator.job.lifecycle import JobState
from tests import postgres
from tests.builders import a_command_job
from tests.yards import until

TOKEN, RAY_TOKEN = "a-token-of-the-tests", secrets.token_hex(32)
PATIENCE_S = 300.0
RAY_ENV = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RAY_TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}


def environment(**variables: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TUNEYARD_", "RAY_"))}
    return clean | RAY_ENV | variables


def end(process: subprocess.Popen[Any]) -> None:
    """The process and all that it has started."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


@contextmanager
def a_head(folder: Path, log: Path) -> Iterator[str]:
    """A Ray head with two slots; yields the address for clients from outside."""
    port = free_port()
    argv = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
        f"--port={free_port()}", f"--ray-client-server-port={port}", "--node-ip-address=127.0.0.1",
        "--object-store-memory=100000000", f"--temp-dir={folder}", "--include-dashboard=false",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(argv, env=environment(), stdout=stream, stderr=stream)
    try:
        until((folder / "ray_current_cluster").exists, PATIENCE_S)
        yield f"ray://127.0.0.1:{port}"
    finally:
        end(process)


class Controller:
    """`python -m orchestrator.serve`, as its pod runs it: started again while Ray's head does not answer yet."""

    def __init__(self, home: Path, address: str, url: str, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._argv = [sys.executable, "-m", "orchestrator.serve", "--address", address]
        self._env = environment(
            TUNEYARD_HOME=str(home), TUNEYARD_DATABASE_URL=url, TUNEYARD_TOKEN=TOKEN, TUNEYARD_PORT=str(self.port),
            TUNEYARD_STANDBYS="0", TUNEYARD_LEASE="20",
        )  # fmt: skip
        self._log = log.open("w")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[Any]:
        return subprocess.Popen(self._argv, env=self._env, stdout=self._log, stderr=self._log)

    def health(self) -> dict[str, Any] | None:
        """What its probe is told; None if it does not answer."""
        if self.process.poll() == 2:
            self.process = self._start()
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except OSError:
            return None

    def acts(self) -> bool:
        return bool((self.health() or {}).get("acting"))

    def close(self) -> None:
        end(self.process)
        self._log.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_acts_and_the_other_takes_over(tmp_path: Path) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(postgres.server())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tuneyard-"))  # sockets have short names
        address = stack.enter_context(a_head(Path(folder), tmp_path / "head.log"))
        both = [Controller(tmp_path / "home", address, url, tmp_path / f"controller-{at}.log") for at in range(2)]
        for one in both:
            stack.callback(one.close)
        until(lambda: all(one.health() for one in both), PATIENCE_S)
        until(lambda: [one.acts() for one in both].count(True) == 1, PATIENCE_S)
        acting, standby = sorted(both, key=lambda one: not one.acts())

        client = Client(standby.url, TOKEN, timeout=30)
        job = client.submit(a_command_job(name="first", run=[sys.executable, "-c", "print('done')"]))
        until(lambda: client.job(job.id).state == JobState.SUCCEEDED, PATIENCE_S)

        wait = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.1)"
        waits = a_command_job(2, name="long", run=[sys.executable, "-c", wait], working_dir=str(tmp_path))
        long = client.submit(waits)
        until(lambda: client.job(long.id).state == JobState.RUNNING, PATIENCE_S)
        acting.process.send_signal(signal.SIGKILL)
        until(standby.acts, PATIENCE_S)
        (tmp_path / "go").touch()
        until(lambda: client.job(long.id).state == JobState.SUCCEEDED, PATIENCE_S)
        assert client.job(long.id).attempts == 1
