"""Nodes on which jobs of several kinds failed get nothing new until a probe has said what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from orchestrator.cluster.model import Node
from orchestrator.control.probing import Probing
from orchestrator.execute.protocol import Executor
from orchestrator.recover.suspects import WINDOW_S, suspects
from orchestrator.store.rows import Mark
from orchestrator.store.store import Store

log = structlog.get_logger()


class Suspicion:
    """Of one controller, while it acts. All that lasts is in the database: the faults, and the marks."""

    def __init__(self, store: Store, executor: Executor, directory: str) -> None:
        self._store, self._executor, self._directory = store, executor, directory
        self._probing: dict[str, Probing] = {}
        """By the node's name."""
        self._news = True
        """Whether there may be faults that were not looked at."""

    def aroused(self) -> None:
        """A fault was stored."""
        self._news = True

    def look(self, nodes: Sequence[Node], marks: dict[str, Mark], now: float) -> None:
        """Mark new suspects, go on with probes, and tell what came of them. `marks` by name; changes are for the next
        tick."""
        if self._news:
            self._news = False
            for name, jobs in suspects(self._store.node_faults(now - WINDOW_S), now).items():
                if name not in marks:
                    failed = f"{len(jobs)} jobs failed on it within an hour: {', '.join(jobs[:5])}"
                    self._store.mark_node(name, Mark.SUSPECT, f"{failed}; it is being probed", now)
                    log.warning("a node is suspect", node=name, jobs=jobs)
        here = {node.name: node for node in nodes}
        for name in [name for name in self._probing if marks.get(name) != Mark.SUSPECT or name not in here]:
            del self._probing[name]  # an administrator was faster, or it is gone
        for name, mark in marks.items():
            if mark == Mark.SUSPECT and name in here:
                self._go_on(here[name], [node for node in nodes if node.name not in marks], now)

    def _go_on(self, node: Node, neighbours: Sequence[Node], now: float) -> None:
        name = node.name
        if name not in self._probing:
            probe_id = f"suspect-{name}-{now:.3f}"
            self._probing[name] = Probing(self._executor, [node], neighbours, probe_id, self._directory)
        reports = self._probing[name].poll()
        if reports is None:
            return
        del self._probing[name]
        report = reports[node.id]
        if report.sound:
            self._store.absolve_node(name)
            log.info("a suspect node is sound", node=name)
        else:
            self._store.mark_node(name, Mark.CORDONED, f"its probe failed: {report.sentence}", now)
            log.error("a suspect node is cordoned", node=name, found=report.sentence)
