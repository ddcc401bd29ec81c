"""What a job has given up to fit, and what attempts needed of memory."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sizing", sa.Text))
    op.add_column("jobs", sa.Column("relief", sa.JSON))
    op.add_column("attempts", sa.Column("predicted", sa.JSON))
    op.create_table(
        "peaks",
        sa.Column("id", sa.Integer, sa.Identity(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("device_kind", sa.String(63), nullable=False),
        sa.Column("world_size", sa.Integer, nullable=False),
        sa.Column("plan", sa.JSON, nullable=False),
        sa.Column("predicted", sa.JSON),
        sa.Column("measured_bytes", sa.BigInteger),
        sa.Column("limit_bytes", sa.BigInteger),
        sa.Column("ran_out", sa.Boolean, nullable=False),
        sa.Column("job_id", sa.String(80), sa.ForeignKey("jobs.id", name="fk_peaks_job_id"), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_peaks"),
    )
    op.create_index("ix_peaks_key", "peaks", ["key"])


def downgrade() -> None:
    op.drop_table("peaks")
    op.drop_column("attempts", "predicted")
    op.drop_column("jobs", "relief")
    op.drop_column("jobs", "sizing")
