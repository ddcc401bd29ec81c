"""Migrations on a real PostgreSQL: of several controllers that start at once, one makes the tables."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from orchestrator.store import schema
from orchestrator.store.migrate import LOCK
from orchestrator.store.store import Store
from tests.yards import until


@pytest.fixture
def empty(server_url: str) -> str:
    engine = sa.create_engine(server_url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return server_url


def prepare(url: str, problems: list[Exception]) -> None:
    store = Store(url)
    try:
        store.prepare()
    except Exception as problem:
        problems.append(problem)
    finally:
        store.close()


def test_all_that_start_at_once_find_the_tables(empty: str) -> None:
    problems: list[Exception] = []
    threads = [threading.Thread(target=prepare, args=(empty, problems)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    store = Store(empty)
    with store.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == [schema.HEAD]
    store.close()


def test_the_second_waits_for_the_first(empty: str) -> None:
    engine = sa.create_engine(empty, isolation_level="AUTOCOMMIT")
    waiting = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    problems: list[Exception] = []
    with engine.connect() as first:
        first.execute(sa.select(sa.func.pg_advisory_lock(LOCK)))
        second = threading.Thread(target=prepare, args=(empty, problems))
        second.start()
        until(lambda: first.execute(waiting).scalar() == 1)
        assert sa.inspect(engine).get_table_names() == []
        first.execute(sa.select(sa.func.pg_advisory_unlock(LOCK)))
        second.join()
    assert problems == []
    assert "jobs" in sa.inspect(engine).get_table_names()
    engine.dispose()
