"""Groups of nodes that are alike, of a cluster that gives and takes nodes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.cluster.model import Node


@dataclass(frozen=True)
class Group:
    name: str
    replicas: int
    """So many nodes are asked for."""
    least: int
    most: int
    like: Node
    """What one of them is."""
    doomed: tuple[str, ...] = ()
    """Names of nodes that were given back, and may be there for a moment yet."""
