"""Migrations, by alembic, from inside the package. Imported only when there is something to migrate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.engine import Engine

from orchestrator.errors import StoreError

LOCK = 0x74756E6579617264
"""Of PostgreSQL's advisory locks, the one that whoever migrates a yard's database holds."""


def config(engine: Engine) -> Config:
    """An alembic configuration bound to `engine`; no ini file, so that an installed wheel can migrate."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    settings.attributes["engine"] = engine
    return settings


def upgrade(engine: Engine) -> None:
    """Bring the database to the newest schema, one at a time: who comes second finds it done.

    Raises:
        StoreError: a newer version wrote it.
    """
    try:
        with _alone(engine):
            command.upgrade(config(engine), "head")
    except CommandError as problem:
        raise StoreError(
            f"the database cannot be brought to this version's schema: {problem}",
            hint="it was probably written by a newer tuneyard: upgrade this one",
        ) from problem


@contextlib.contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Two controllers that start at once would both make the tables. SQLite's are for one controller."""
    if engine.dialect.name != "postgresql":
        yield
        return
    # A connection of its own, in no transaction: the lock is the session's, and goes with it if this process dies.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.select(sa.func.pg_advisory_lock(LOCK)))
        try:
            yield
        finally:
            connection.execute(sa.select(sa.func.pg_advisory_unlock(LOCK)))


def newest() -> str:
    """The newest revision there is a migration for."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return str(ScriptDirectory.from_config(settings).get_current_head())
