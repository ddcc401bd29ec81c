"""What is to be saved, and how."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from launch.checkpoint.manifest import LogicalTensor
from launch.checkpoint.retention import Retention
from launch.checkpoint.state import Part


@dataclass(frozen=True)
class Policy:
    """How to save, beside when."""

    retention: Retention = field(default_factory=Retention)
    metric: str | None = None
    """Which of a checkpoint's metrics retention.keep_best looks at."""
    asynchronous: bool = True
    host_memory: int | None = None
    """Bytes of a rank's copy; more is written straight from the live tensors while training waits. None: half of what
    is free on the host, by rank."""
    stop_on_error: bool = False
    """Whether a save that fails ends the training, or training goes on with the checkpoints that there are."""


@dataclass
class Draft:
    """What is to become a manifest."""

    step: int
    samples: int
    loop: dict[str, Any]
    metrics: dict[str, float] | None
    scalars: dict[str, float]
    tensors: dict[str, LogicalTensor]
    parts: list[Part] = field(repr=False)
    blocked_s: float = 0.0
    """For how long training has waited so far."""
    copied: threading.Event = field(default_factory=threading.Event)
