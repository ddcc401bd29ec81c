"""The way to a database: SQLite or PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from orchestrator.errors import StoreError


class Database:
    """Connections to the database at a URL. Safe to use from several threads and processes.

    `shared`: an SQLite file that several hosts open, one after the other, on a file system that they share. Its WAL
    would be for one host alone.
    """

    def __init__(self, url: str, *, shared: bool = False) -> None:
        self._url = url
        self.engine = _engine(url, "DELETE" if shared else "WAL")
        # Writers take SQLite's lock at the start, so that no transaction fails half-way for want of it.
        self._writing = self.engine.execution_options(tuneyard_write=True)

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Database trouble as a StoreError that shows no password."""
        try:
            yield
        except OperationalError as problem:
            where = make_url(self._url).render_as_string(hide_password=True)
            raise StoreError(
                f"the database {where} cannot be used: {problem.orig}",
                hint="check TUNEYARD_DATABASE_URL, that the server runs, and that the disk is not full",
            ) from problem
        except SQLAlchemyError as problem:
            raise StoreError(f"the database refused: {problem.__class__.__name__}: {problem}") from problem


def _json(value: Any) -> str:
    """`value` as JSON. A loss may be infinite or no number, which JSON cannot say; as text a float field reads it."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _engine(url: str, journal: str) -> Engine:
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except ArgumentError as problem:  # its text may hold the URL, and the URL a password
        raise StoreError(
            "TUNEYARD_DATABASE_URL is not the URL of a known kind of database",
            code="bad-setting",
            field="TUNEYARD_DATABASE_URL",
            hint="write sqlite:////path/yard.db or postgresql://user:password@host/name",
        ) from problem
    except ModuleNotFoundError:
        pass  # told below, with what to install
    if parsed.get_backend_name() != "sqlite":
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        try:
            return sa.create_engine(parsed, pool_pre_ping=True, json_serializer=_json)
        except ModuleNotFoundError as problem:
            raise StoreError(
                f"no driver for {parsed.get_backend_name()}: {problem}", hint="pip install 'tuneyard[postgres]'"
            ) from problem
    if parsed.database and parsed.database != ":memory:":
        try:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise StoreError(
                f"cannot make the directory of {parsed.database}: {os.strerror(problem.errno or 0)}",
                hint="choose another TUNEYARD_HOME",
            ) from problem
    engine = sa.create_engine(parsed, connect_args={"timeout": 30, "check_same_thread": False}, json_serializer=_json)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver's guess
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA journal_mode={journal}")
        cursor.execute("PRAGMA synchronous=FULL")  # a committed attempt must survive a crash of the machine
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("tuneyard_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
