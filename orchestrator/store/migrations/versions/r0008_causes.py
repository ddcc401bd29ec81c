"""Failures of a job by their cause, and failures that may lie in a node."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("failed_by", sa.JSON))
    jobs = sa.table("jobs", sa.column("id"), sa.column("failures"), sa.column("failed_by", sa.JSON))
    connection = op.get_bind()
    for job_id, failures in connection.execute(sa.select(jobs.c.id, jobs.c.failures).where(jobs.c.failures > 0)).all():
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(failed_by={"crashed": failures}))
    op.create_table(
        "node_faults",
        sa.Column("id", sa.Integer, sa.Identity(), nullable=False),
        sa.Column("node", sa.String(255), nullable=False),
        sa.Column("job_id", sa.String(80), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("outcome", sa.String(20), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_node_faults"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_node_faults_job_id_jobs"),
    )
    op.create_index("ix_node_faults_time", "node_faults", ["time"])


def downgrade() -> None:
    op.drop_table("node_faults")
    op.drop_column("jobs", "failed_by")
