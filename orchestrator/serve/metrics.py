"""GET /metrics: what orchestrator.watch tells, in Prometheus' text format."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from launch import __version__
from orchestrator.control.loop import Controller
from orchestrator.serve.goodput import slot_seconds
from orchestrator.store.store import Store
from orchestrator.watch.collector import Collector, Known

WINDOW_S = 3600.0
KEEP_S = 300.0
"""Accounts are worked out anew no more often than that: a scrape is to cost little."""
MOST_JOBS = 5000


class LastHour:
    """What slots were held for in the hour before, at most KEEP_S old. Safe to use from several threads."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._at = -KEEP_S
        self._found: Mapping[str, float] | None = None

    def __call__(self) -> Mapping[str, float] | None:
        """None where it would be of more than MOST_JOBS jobs. Raises StoreError."""
        with self._lock:
            now = self._clock()
            if now - self._at >= KEEP_S:
                self._found = slot_seconds(self._store, now - WINDOW_S, now, MOST_JOBS)
                self._at = now
            return self._found


def expose(app: FastAPI, controller: Controller, authorized: Callable[[Request], None]) -> None:
    """Add the route, for requests that `authorized` lets through."""
    clock = time.time
    registry = Collector(
        controller.store, lambda: known_of(controller), LastHour(controller.store, clock), clock
    ).registry()

    @app.get("/metrics", dependencies=[Depends(authorized)])
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def known_of(controller: Controller) -> Known:
    """What a controller knows of itself; from any thread."""
    tally = controller.tally
    return Known(
        version=__version__,
        acting=controller.acting,
        ticks=tally.ticks,
        tick_s=tally.tick_s,
        last_tick_at=tally.last_tick_at,
        ends=dict(tally.ends),
        nodes=controller.nodes,
    )
