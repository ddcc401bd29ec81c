"""Tables. A change here comes with a migration in `migrations/versions` and a new HEAD below."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

HEAD = "0004"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("sequence", Integer, Identity(), primary_key=True),  # order of submission
    Column("id", String(80), nullable=False, unique=True),
    Column("name", String(63), nullable=False),
    Column("queue", String(63), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("spec", Text, nullable=False),  # JobSpec as JSON
    Column("origin", JSON, nullable=True),  # contract.Origin; null for jobs of older versions
    Column("state", String(20), nullable=False),
    Column("reason", JSON, nullable=False),  # lifecycle.Reason
    Column("attempts", Integer, nullable=False, default=0),  # number of the newest attempt
    # How many of them failed, which is what retry.max_restarts bounds.
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("ran_s", Float, nullable=False, server_default="0"),  # of those that have ended, together
    Column("pause_requested", Boolean, nullable=False, server_default=sa.false()),  # while so, no attempt starts
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("not_before", Float, nullable=True),  # backing off until then
    Column("submitted_at", Float, nullable=False),
    Column("started_at", Float, nullable=True),
    Column("finished_at", Float, nullable=True),
    Column("error", JSON, nullable=True),
    Column("result", JSON, nullable=True),
    Column("checkpoint", JSON, nullable=True),  # job.checkpoint.LastCheckpoint
    Column("sizing", Text, nullable=True),  # memory.sizing.Sizing as JSON, where its model is known
    Column("relief", JSON, nullable=True),  # memory.ladder.Relief, once it has run out of memory
    Index("ix_jobs_state", "state"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(80), ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),  # the fencing token
    Column("state", String(20), nullable=False),
    Column("contract", Text, nullable=False),  # RunContract as JSON, plan and all
    Column("placement", Text, nullable=False),  # cluster.Placement as JSON
    Column("created_at", Float, nullable=False),
    Column("started_at", Float, nullable=True),  # first step taken, or a rank's first sign of life
    Column("ended_at", Float, nullable=True),
    Column("last_contact", Float, nullable=False),  # when its agents last answered
    Column("stop", JSON, nullable=True),  # StopRequest that was sent
    Column("outcome", String(20), nullable=True),
    Column("predicted", JSON(none_as_null=True), nullable=True),  # memory.options.Forecast
    Column("progress", JSON, nullable=True),  # newest ProgressLine of rank 0
    # Bytes of rank 0's progress whose checkpoints are events.
    Column("progress_offset", BigInteger, nullable=False, server_default="0"),
    Index("ix_attempts_state", "state"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("job_id", String(80), ForeignKey("jobs.id"), nullable=True),
    Column("attempt", Integer, nullable=True),
    Column("time", Float, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("data", JSON, nullable=False),
    Index("ix_events_job_id", "job_id"),
)

# What attempts needed of memory, or that they did not fit: memory.alike.Peak.
peaks = Table(
    "peaks",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("key", String(64), nullable=False),  # the same for like jobs
    Column("device_kind", String(63), nullable=False),  # cpu, or a type of GPU
    Column("world_size", Integer, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("predicted", JSON(none_as_null=True), nullable=True),
    Column("measured_bytes", BigInteger, nullable=True),
    Column("limit_bytes", BigInteger, nullable=True),
    Column("ran_out", Boolean, nullable=False),
    Column("job_id", String(80), ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("time", Float, nullable=False),
    Index("ix_peaks_key", "key"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("token", Integer, nullable=False),  # grows with every change of holder
    Column("expires_at", Float, nullable=False),
)
