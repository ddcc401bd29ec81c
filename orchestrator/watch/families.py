"""The metrics that there are: docs/monitoring.md explains each, and rules and dashboards may name no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One metric. Counters end in _total; a summary has _sum and _count."""

    name: str
    kind: Literal["gauge", "counter", "summary"]
    told: str
    labels: tuple[str, ...] = ()

    @property
    def samples(self) -> tuple[str, ...]:
        """What Prometheus calls its samples."""
        return (f"{self.name}_sum", f"{self.name}_count") if self.kind == "summary" else (self.name,)


BUILD = Family("tuneyard_build_info", "gauge", "Always 1.", ("version",))
ACTING = Family("tuneyard_controller_acting", "gauge", "1 while this controller holds the lease, else 0.")
STORE_UP = Family("tuneyard_store_up", "gauge", "1 if the database has answered this scrape, else 0.")
LAST_TICK = Family(
    "tuneyard_controller_last_tick_timestamp_seconds", "gauge", "When this controller last ended a tick (Unix time)."
)
TICKS = Family("tuneyard_controller_tick_seconds", "summary", "How long this controller's ticks took.")
JOBS = Family("tuneyard_jobs", "gauge", "Jobs that have not ended.", ("queue", "state"))
JOBS_ENDED = Family("tuneyard_jobs_ended_total", "counter", "Jobs that have ended.", ("state",))
OLDEST_WAIT = Family(
    "tuneyard_queue_oldest_wait_seconds", "gauge", "Age of the longest present wait in a queue.", ("queue",)
)
ATTEMPTS_ENDED = Family(
    "tuneyard_attempts_ended_total",
    "counter",
    "Attempts that ended since this controller started: how, and for which reason the job is where it is then.",
    ("outcome", "reason"),
)
NODES = Family("tuneyard_nodes", "gauge", "Nodes that take ranks: free, used, or closed to new attempts.", ("state",))
GPUS = Family("tuneyard_gpus", "gauge", "GPUs: free, used, or free on a closed node.", ("type", "state"))
CPU_SLOTS = Family("tuneyard_cpu_slots", "gauge", "Slots of nodes without GPUs, likewise.", ("state",))
SLOT_SECONDS = Family(
    "tuneyard_slot_seconds", "gauge", "What slots were held for in the hour before, in slot-seconds.", ("category",)
)

FAMILIES = (
    BUILD, ACTING, STORE_UP, LAST_TICK, TICKS, JOBS, JOBS_ENDED, OLDEST_WAIT, ATTEMPTS_ENDED, NODES, GPUS, CPU_SLOTS,
    SLOT_SECONDS,
)  # fmt: skip
