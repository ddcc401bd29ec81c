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

HEAD = "0008"

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
    Column("failed_by", JSON, nullable=True),  # the same by cause: Outcome → count
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
    # Processes x seconds of the attempts that have ended: what fair shares are counted in.
    Column("served_s", Float, nullable=False, server_default="0"),
    Column("preemptions", Integer, nullable=False, server_default="0"),  # stops for the sake of another job
    Column("queued_at", Float, nullable=True),  # when its present wait began
    Column("waited_s", Float, nullable=False, server_default="0"),  # of the waits before
    Column("target", Integer, nullable=True),  # stopped to go on at once with so many processes at most
    Column("avoid", JSON, nullable=True),  # nodes, by id, on which its last attempt failed
    Column("array_id", String(80), nullable=True),  # the same for all elements of an array
    Column("array_at_once", Integer, nullable=True),  # how many of them may run at the same time
    # Every UPDATE of a row raises it, so that who has read the row once knows whether it has to be read again.
    Column("version", Integer, nullable=False, server_default="0", onupdate=sa.text("version + 1")),
    # Covers what every tick reads of jobs that have not changed: the rows themselves are long.
    Index("ix_jobs_state", "state", "sequence", "id", "version"),
    Index("ix_jobs_array_id", "array_id"),
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
    Column("preempted_by", String(80), nullable=True),  # the job for whose sake it was sent
    Column("target", Integer, nullable=True),  # with how many processes the job is to go on after it
    Column("outcome", String(20), nullable=True),
    Column("predicted", JSON(none_as_null=True), nullable=True),  # memory.options.Forecast
    Column("progress", JSON, nullable=True),  # newest ProgressLine of rank 0
    # Bytes of rank 0's progress whose checkpoints are events.
    Column("progress_offset", BigInteger, nullable=False, server_default="0"),
    Column("spent", JSON(none_as_null=True), nullable=True),  # cluster.status.Spent
    Column("energy", JSON(none_as_null=True), nullable=True),  # cluster.status.Energy of each node, once it has ended
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

# What an administrator has said of queues; any other has the defaults.
queues = Table(
    "queues",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("weight", Float, nullable=False, server_default="1"),
    Column("guaranteed", Integer, nullable=True),  # processes that are its own
    Column("ceiling", Integer, nullable=True),  # most processes that it may hold, with what it borrows
    Column("lendable", Boolean, nullable=False, server_default=sa.true()),  # others may have what it leaves idle
)

# Nodes that get no new attempts, by name: that outlives the node's restart.
node_marks = Table(
    "node_marks",
    metadata,
    Column("name", String(255), primary_key=True),
    Column("mark", String(20), nullable=False),  # rows.Mark
    Column("reason", Text, nullable=True),
    Column("since", Float, nullable=False),
)

# Attempts that failed on a node by which the fault may be.
node_faults = Table(
    "node_faults",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("node", String(255), nullable=False),  # its name
    Column("job_id", String(80), ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("time", Float, nullable=False),
    Index("ix_node_faults_time", "time"),
)

# How long jobs ran that have ended: what is expected of the next one is learned from it.
history = Table(
    "history",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("queue", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("processes", Integer, nullable=False),
    Column("ran_s", Float, nullable=False),  # all attempts together
    Column("succeeded", Boolean, nullable=False),
    Column("time", Float, nullable=False),
    Index("ix_history_queue", "queue"),
    Index("ix_history_time", "time"),
)

# Which slots there were: a row whenever that changes, which holds until the next.
inventories = Table(
    "inventories",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("time", Float, nullable=False),
    Column("nodes", JSON, nullable=False),  # node id → cluster.status.Slots
    Index("ix_inventories_time", "time"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("token", Integer, nullable=False),  # grows with every change of holder
    Column("expires_at", Float, nullable=False),
)
