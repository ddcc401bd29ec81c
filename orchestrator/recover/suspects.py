"""Nodes on which jobs fail in a way that other nodes do not explain. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

WINDOW_S = 3600.0
"""What is older tells nothing of a node as it is."""
JOBS = 2
"""A job that kills itself does so on every node; a node kills different jobs."""


class Fault(Protocol):
    """That an attempt failed on a node by which the fault may be."""

    @property
    def node(self) -> str: ...
    @property
    def job_id(self) -> str: ...
    @property
    def time(self) -> float: ...


def suspects(faults: Iterable[Fault], now: float) -> dict[str, list[str]]:
    """Nodes by name, each with the jobs that have failed on it lately, in the order of their names."""
    jobs: dict[str, set[str]] = {}
    for fault in faults:
        if now - fault.time <= WINDOW_S:
            jobs.setdefault(fault.node, set()).add(fault.job_id)
    return {node: sorted(failed) for node, failed in sorted(jobs.items()) if len(failed) >= JOBS}
