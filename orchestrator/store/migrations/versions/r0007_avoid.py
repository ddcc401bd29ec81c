"""Nodes on which a job's last attempt failed."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("avoid", sa.JSON))


def downgrade() -> None:
    op.drop_column("jobs", "avoid")
