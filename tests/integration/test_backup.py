"""docs/operations/backup.md: its commands, as they stand there, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from orchestrator.store.restored import GAP
from orchestrator.store.store import Store
from tests import postgres
from tests.builders import a_command_job
from tests.docs import ROOT

PAGE = "docs/operations/backup.md"
EXAMPLE = "postgresql://yard@db.example/yard"


def commands(begins: str, holds: str) -> list[str]:
    """Lines of the page that begin so and hold that, in its order."""
    lines = (line.strip() for line in (ROOT / PAGE).read_text().splitlines())
    return [line for line in lines if line.startswith(begins) and holds in line]


def run(text: str, folder: Path, names: dict[str, str], **environment: str) -> str:
    for name, here in names.items():
        text = text.replace(name, here)
    env = {key: value for key, value in os.environ.items() if not key.startswith("TUNEYARD_")} | environment
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), *programs(), env["PATH"]])
    env["PYTHONPATH"] = str(ROOT)
    argv = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def programs() -> list[str]:
    found = postgres._programs()
    return [] if found is None else [str(found)]


@contextmanager
def busy(store: Store) -> Iterator[None]:
    """While somebody submits jobs without end."""
    done = threading.Event()

    def submit() -> None:
        for number in itertools.count():
            if done.is_set():
                return
            store.add_job(f"meanwhile-{number}", a_command_job(), float(number))

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def fill(store: Store) -> None:
    store.prepare()
    for number in range(20):
        store.add_job(f"job-{number}", a_command_job(), float(number))
    store.set_queue("research", weight=2.0)


def check(url: str, later: str) -> None:
    """The jobs of the copy are there, those of later are not, and attempts skip the numbers since."""
    store = Store(url)
    store.prepare()
    ids = {job.id: job for job in store.jobs(limit=100_000)}
    assert {f"job-{number}" for number in range(20)} <= set(ids)
    assert later not in ids
    assert ids["job-7"].attempts == GAP
    assert [queue.weight for queue in store.queues()] == [2.0]
    # Whole: jobs that were submitted meanwhile are there up to one of them, each with its event.
    numbers = sorted(int(name.split("-")[1]) for name in ids if name.startswith("meanwhile-"))
    assert numbers == list(range(len(numbers)))
    assert all(store.events(name)[0].kind == "submitted" for name in ids)
    store.close()


def test_sqlite(tmp_path: Path) -> None:
    home = tmp_path / "home"
    url = f"sqlite:///{home / 'yard.db'}"
    store = Store(url)
    fill(store)
    copy, verify = commands("python -c", "yard-copy.db")[:2]
    names = {"~/.tuneyard": str(home)}
    with busy(store):
        run(copy, tmp_path, names)
    assert run(verify, tmp_path, names).strip() == "ok"
    store.add_job("too-late", a_command_job(), 99.0)
    store.close()
    (home / "yard.db").write_bytes(b"damaged")
    (back,) = (
        one
        for one in commands("python -c", "yard-copy.db")
        if one.endswith(f"{'~/.tuneyard'}/yard.db") and "shutil" in one
    )
    run(back, tmp_path, names)
    (restored,) = commands("python -m", "restored")
    assert run(restored, tmp_path, names, TUNEYARD_HOME=str(home)).startswith(str(len_live(url)))
    check(url, "too-late")


def len_live(url: str) -> int:
    store = Store(url)
    found = len(store.live_jobs())
    store.close()
    return found


def test_postgresql(tmp_path: Path) -> None:
    with postgres.server() as url:
        plain = url.replace("postgresql+psycopg", "postgresql")
        store = Store(url)
        fill(store)
        (dump,) = commands("pg_dump", EXAMPLE)
        with busy(store):
            run(dump, tmp_path, {EXAMPLE: plain})
        store.add_job("too-late", a_command_job(), 99.0)
        store.close()
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text("CREATE DATABASE again"))
        engine.dispose()
        again = url.removesuffix("/postgres") + "/again"
        (back,) = commands("pg_restore", EXAMPLE)
        run(back, tmp_path, {EXAMPLE: again.replace("postgresql+psycopg", "postgresql")})
        (restored,) = commands("python -m", "restored")
        run(restored, tmp_path, {}, TUNEYARD_DATABASE_URL=again)
        check(again, "too-late")


@pytest.mark.parametrize("begins", ["pg_dump", "pg_restore", "python -m"])
def test_the_page_has_each_command_once(begins: str) -> None:
    assert len(commands(begins, "")) == 1
