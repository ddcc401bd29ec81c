"""Where a job comes from."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("origin", sa.JSON))


def downgrade() -> None:
    op.drop_column("jobs", "origin")
