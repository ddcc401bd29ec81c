"""A PostgreSQL server of the tests' own, in a temporary directory, where the programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.execute.local import free_port


def _programs() -> Path | None:
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


class Server:
    """One that can be taken away and brought back; it keeps its address."""

    def __init__(self, programs: Path, folder: Path, become: Callable[[], None]) -> None:
        self._programs, self._folder, self._become = programs, folder, become
        self._port = free_port()
        self.url = f"postgresql+psycopg://yard@127.0.0.1:{self._port}/postgres"
        self._run("initdb", "-U", "yard", "--auth=trust", "--no-sync", "-E", "UTF8")
        self.start()

    def start(self) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c fsync=off -k {self._folder}"
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """At once, as if it had crashed."""
        self._run("pg_ctl", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        argv = [str(self._programs / program), "-D", str(self._folder / "data"), *arguments]
        subprocess.run(argv, check=True, preexec_fn=self._become, stdout=subprocess.DEVNULL, cwd=self._folder)


def why_not() -> str | None:
    """Why there can be no server here; None if there can."""
    if _programs() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL does not run as root, and there is no account postgres"
    return None


@contextmanager
def running() -> Iterator[Server]:
    """A server with an empty database; it ends with the context. It must be possible here."""
    programs = _programs()
    assert programs is not None
    account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None

    def become() -> None:
        if account is not None:
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)

    folder = Path(tempfile.mkdtemp(prefix="tuneyard-pg-"))
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid)
    try:
        server = Server(programs, folder, become)
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def server() -> Iterator[str]:
    """SQLAlchemy URL of an empty database; it ends with the context. Skips where PostgreSQL is not installed."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running() as found:
        yield found.url
