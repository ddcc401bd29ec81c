"""Run by alembic; the engine comes from orchestrator.store.migrate, or `-x url=` when a migration is written."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from orchestrator.store.schema import metadata

engine = context.config.attributes.get("engine") or sa.create_engine(context.get_x_argument(as_dictionary=True)["url"])

with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
