"""Shares of queues, marks of nodes, how long jobs ran, and what the scheduler counts of a job."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

JOBS = ("served_s", "preemptions", "queued_at", "waited_s", "target", "array_id", "array_at_once", "version")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("served_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("preemptions", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("queued_at", sa.Float))
    op.add_column("jobs", sa.Column("waited_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("target", sa.Integer))
    op.add_column("jobs", sa.Column("array_id", sa.String(80)))
    op.add_column("jobs", sa.Column("array_at_once", sa.Integer))
    op.add_column("jobs", sa.Column("version", sa.Integer, nullable=False, server_default="0"))
    op.execute(sa.text("UPDATE jobs SET queued_at = submitted_at"))
    op.add_column("attempts", sa.Column("preempted_by", sa.String(80)))
    op.add_column("attempts", sa.Column("target", sa.Integer))
    op.drop_index("ix_jobs_state", "jobs")
    op.create_index("ix_jobs_state", "jobs", ["state", "sequence", "id", "version"])
    op.create_index("ix_jobs_array_id", "jobs", ["array_id"])
    op.create_table(
        "queues",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("weight", sa.Float, nullable=False, server_default="1"),
        sa.Column("guaranteed", sa.Integer),
        sa.Column("ceiling", sa.Integer),
        sa.Column("lendable", sa.Boolean, nullable=False, server_default=sa.true()),
        sa.PrimaryKeyConstraint("name", name="pk_queues"),
    )
    op.create_table(
        "node_marks",
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("mark", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("since", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_node_marks"),
    )
    op.create_table(
        "history",
        sa.Column("id", sa.Integer, sa.Identity(), nullable=False),
        sa.Column("queue", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("processes", sa.Integer, nullable=False),
        sa.Column("ran_s", sa.Float, nullable=False),
        sa.Column("succeeded", sa.Boolean, nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_history"),
    )
    op.create_index("ix_history_queue", "history", ["queue"])
    op.create_index("ix_history_time", "history", ["time"])
    _count_what_was_served()


def _count_what_was_served() -> None:
    """Of the jobs that are not over: those that are ask for nothing any more."""
    connection = op.get_bind()
    ended = connection.execute(
        sa.text(
            "SELECT a.job_id, a.contract, a.ended_at - a.created_at FROM attempts a JOIN jobs j ON j.id = a.job_id"
            " WHERE a.state = 'ended' AND j.state NOT IN ('succeeded', 'failed', 'cancelled')"
        )
    )
    served: dict[str, float] = {}
    for job, contract, ran in ended:
        served[job] = served.get(job, 0.0) + ran * json.loads(contract)["plan"]["world_size"]
    for job, seconds in served.items():
        connection.execute(sa.text("UPDATE jobs SET served_s = :s WHERE id = :id"), {"s": seconds, "id": job})


def downgrade() -> None:
    for table in ("history", "node_marks", "queues"):
        op.drop_table(table)
    op.drop_index("ix_jobs_array_id", "jobs")
    op.drop_index("ix_jobs_state", "jobs")
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.drop_column("attempts", "target")
    op.drop_column("attempts", "preempted_by")
    for column in JOBS:
        op.drop_column("jobs", column)
