"""Pausing, a budget of failures instead of attempts, and what is known of checkpoints."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

JOBS = ("failures", "ran_s", "pause_requested", "checkpoint")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("failures", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("ran_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("checkpoint", sa.JSON))
    op.add_column("attempts", sa.Column("progress_offset", sa.BigInteger, nullable=False, server_default="0"))
    ended = "FROM attempts WHERE attempts.job_id = jobs.id AND attempts.state = 'ended'"
    failed = "AND attempts.outcome NOT IN ('succeeded', 'stopped')"
    op.execute(f"UPDATE jobs SET failures = (SELECT COUNT(*) {ended} {failed})")
    op.execute(f"UPDATE jobs SET ran_s = (SELECT COALESCE(SUM(ended_at - created_at), 0) {ended})")


def downgrade() -> None:
    op.drop_column("attempts", "progress_offset")
    for column in JOBS:
        op.drop_column("jobs", column)
