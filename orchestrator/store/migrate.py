"""Migrations, by alembic, from inside the package. Imported only when there is something to migrate."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.engine import Engine

from orchestrator.errors import StoreError


def config(engine: Engine) -> Config:
    """An alembic configuration bound to `engine`; no ini file, so that an installed wheel can migrate."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    settings.attributes["engine"] = engine
    return settings


def upgrade(engine: Engine) -> None:
    """Bring the database to the newest schema. Raises StoreError if a newer version wrote it."""
    try:
        command.upgrade(config(engine), "head")
    except CommandError as problem:
        raise StoreError(
            f"the database cannot be brought to this version's schema: {problem}",
            hint="it was probably written by a newer tuneyard: upgrade this one",
        ) from problem


def newest() -> str:
    """The newest revision there is a migration for."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return str(ScriptDirectory.from_config(settings).get_current_head())
