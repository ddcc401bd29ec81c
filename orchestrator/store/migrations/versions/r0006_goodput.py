"""Where the time and the energy of attempts went, and which slots there were."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("attempts", sa.Column("spent", sa.JSON))
    op.add_column("attempts", sa.Column("energy", sa.JSON))
    op.create_table(
        "inventories",
        sa.Column("id", sa.Integer, sa.Identity(), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("nodes", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_inventories"),
    )
    op.create_index("ix_inventories_time", "inventories", ["time"])


def downgrade() -> None:
    op.drop_table("inventories")
    op.drop_column("attempts", "energy")
    op.drop_column("attempts", "spent")
