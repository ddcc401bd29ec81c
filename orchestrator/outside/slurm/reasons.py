"""Why Slurm says that a job waits or has ended, in a yard's words: a code, a sentence, and what would change it."""

from __future__ import annotations

import time

from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.outside.slurm.commands import Queued

Told = tuple[ReasonCode, str, str]
NOTHING_TO_DO = "starts when its turn comes; nothing to do"
RELEASE = "`scontrol release {id}` lets it go on"
# By Slurm's word; {nodes} and {partition} are the job's.
WAITS: dict[str, Told] = {
    "None": (ReasonCode.SUBMITTED, "Slurm has not looked at it yet", "it does so every few seconds"),
    "Priority": (
        ReasonCode.BEHIND_OTHERS,
        "others in the partition {partition} have a higher priority",
        "starts when its turn comes; `sprio --jobs={id}` shows what its priority is made of",
    ),
    "Resources": (
        ReasonCode.INSUFFICIENT_FREE,
        "first in the partition {partition}; {nodes} as it asks for are not free at once",
        "starts when running jobs end; ask for fewer nodes, or --with partition=OTHER",
    ),
    "Dependency": (ReasonCode.AFTER, "comes after other jobs", "`scontrol show job {id}` names them"),
    "DependencyNeverSatisfied": (
        ReasonCode.AFTER,
        "what it comes after has failed, so it will never start",
        "cancel it, and submit both again",
    ),
    "BeginTime": (
        ReasonCode.BACKING_OFF,
        "Slurm waits a while before it starts again a job that was requeued",
        "goes on by itself; nothing to do",
    ),
    "Cleaning": (ReasonCode.OLD_ATTEMPT_ENDING, "its last run is still being cleared away", NOTHING_TO_DO),
    "JobArrayTaskLimit": (
        ReasonCode.ARRAY_FULL,
        "as many of its array run already as may at once",
        "starts when one of them ends; submit with a larger array_at_once",
    ),
    "JobHeldUser": (ReasonCode.HELD, "held by its user", RELEASE),
    "JobHeldAdmin": (ReasonCode.HELD, "held by an administrator", "ask whoever runs the cluster"),
    "job requeued in held state": (ReasonCode.HELD, "requeued and held", RELEASE),
    "launch failed requeued held": (
        ReasonCode.HELD,
        "it could not be started on its node, and was put back and held",
        RELEASE + "; `scontrol show job {id}` names the node, whose slurmd's log tells why",
    ),
    "PartitionDown": (
        ReasonCode.NO_NODES,
        "the partition {partition} starts nothing",
        "--with partition=OTHER, or wait",
    ),
    "PartitionInactive": (
        ReasonCode.NO_NODES,
        "the partition {partition} takes no jobs",
        "--with partition=OTHER, or wait",
    ),
    "PartitionNodeLimit": (
        ReasonCode.GANG_TOO_LARGE,
        "it asks for more nodes than the partition {partition} gives to one job",
        "cancel it, and ask for fewer; `sinfo -o '%P %s'` tells how many",
    ),
    "PartitionTimeLimit": (
        ReasonCode.REFUSED,
        "it asks for more time than the partition {partition} gives",
        "cancel it, and submit it with a shorter --with time=...: it goes on in the next run",
    ),
    "NodeDown": (
        ReasonCode.NO_NODES,
        "a node that it needs is down",
        "starts when it is back, or other nodes are free",
    ),
    "BadConstraints": (
        ReasonCode.GANG_TOO_LARGE,
        "no node of the cluster is as it asks",
        "cancel it, and look at --with sbatch=...",
    ),
    "Licenses": (ReasonCode.INSUFFICIENT_FREE, "a licence that it asks for is in use", NOTHING_TO_DO),
    "Reservation": (ReasonCode.INSUFFICIENT_FREE, "waits for its reservation to begin", NOTHING_TO_DO),
    "InvalidAccount": (
        ReasonCode.REFUSED,
        "its account is not valid",
        "cancel it, and name another: --with account=...",
    ),
    "InvalidQOS": (ReasonCode.REFUSED, "its QOS is not valid", "cancel it, and name another: --with qos=..."),
    "Prolog": (ReasonCode.STARTING, "its nodes are being made ready", "nothing to do"),
}
BEGINNINGS: tuple[tuple[str, Told], ...] = (
    (
        "ReqNodeNotAvail",
        (
            ReasonCode.NO_NODES,
            "nodes that it needs are down, drained or reserved",
            "starts when they are back; with a maintenance ahead, a shorter --with time=... may start before it",
        ),
    ),
    (
        "Nodes required for job are DOWN",
        (
            ReasonCode.NO_NODES,
            "nodes that it needs are down, drained, or kept for jobs of a higher priority",
            "starts when they are back",
        ),
    ),
    ("QOS", (ReasonCode.OVER_QUOTA, "a limit of its QOS is reached", "starts when others of that QOS end")),
    ("MaxQOS", (ReasonCode.OVER_QUOTA, "a limit of its QOS is reached", "starts when others of that QOS end")),
    ("Assoc", (ReasonCode.OVER_QUOTA, "a limit of its account is reached", "starts when others of the account end")),
    ("MaxJobs", (ReasonCode.OVER_QUOTA, "as many jobs as may run already", "starts when others end")),
)
ENDS: dict[str, tuple[JobState, str, str]] = {
    "CANCELLED": (JobState.CANCELLED, "cancelled", ""),
    "TIMEOUT": (
        JobState.FAILED,
        "its time limit came, and it could not be requeued",
        "`scontrol requeue {id}` lets it go on from its last checkpoint; more --with warning=... lets it save in time",
    ),
    "NODE_FAIL": (JobState.FAILED, "a node failed", "`scontrol requeue {id}` lets it go on from its last checkpoint"),
    "PREEMPTED": (
        JobState.FAILED,
        "it made room for another job, and Slurm did not requeue it",
        "`scontrol requeue {id}` lets it go on from its last checkpoint",
    ),
    "BOOT_FAIL": (JobState.FAILED, "a node could not be started", "submit it again"),
    "DEADLINE": (JobState.FAILED, "its deadline passed", "submit it again, with another"),
    "OUT_OF_MEMORY": (
        JobState.FAILED,
        "the kernel ended a process of it: its cgroup has no memory left",
        "submit it again, with more --with memory_gb=...",
    ),
    "FAILED": (JobState.FAILED, "its script failed", "`tuneyard logs slurm:{id} --launcher` shows its output"),
    "COMPLETED": (
        JobState.FAILED,
        "its script ended without a word of its job",
        "`tuneyard logs slurm:{id} --launcher` shows its output",
    ),
}
"""How a job ended of which its own run has not told that."""


def why_waiting(row: Queued, now: float) -> Reason:
    """Why a pending job has not started."""
    word = row.reason
    told = WAITS.get(word) or next((told for begins, told in BEGINNINGS if word.startswith(begins)), None)
    code, sentence, remedy = told or (ReasonCode.NOT_TOLD, f"Slurm says: {word}", "`man squeue` explains its reasons")
    words = {"id": row.id, "partition": row.partition, "nodes": "1 node" if row.nodes == 1 else f"{row.nodes} nodes"}
    sentence = sentence.format(**words)
    if told is not None and word not in WAITS:
        sentence += f" ({word})"
    if row.start is not None and row.start > now:
        sentence += f"; expected to start at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(row.start))}"
    return Reason(code=code, sentence=sentence, remedy=remedy.format(**words))


def how_ended(row: Queued) -> tuple[JobState, Reason]:
    """How a job has ended of which its own run has not told."""
    state, sentence, remedy = ENDS.get(row.state, (JobState.FAILED, f"Slurm says: {row.state}", ""))
    code = ReasonCode.CANCELLED if state == JobState.CANCELLED else ReasonCode.FAILED
    return state, Reason(code=code, sentence=sentence, remedy=remedy.format(id=row.id) or None)
