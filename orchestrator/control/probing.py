"""Probing nodes: each by itself, then each that is sound with a neighbour."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.model import Node
from orchestrator.cluster.status import ProbeCheck, ProbeReport, ProbeRequest
from orchestrator.errors import ExecutorError
from orchestrator.execute.protocol import Executor

SILENCE_POLLS = 50
"""A node that does not answer so often in a row has failed."""


@dataclass
class _Round:
    """Probes that run at the same time, by node id."""

    asked: dict[str, ProbeRequest]
    silent: int = 0


class Probing:
    """A probe of `nodes`, of whose yard `neighbours` are others that may be asked to help; `directory` is on the disk
    that jobs use. Never blocks for long."""

    def __init__(
        self, executor: Executor, nodes: Sequence[Node], neighbours: Sequence[Node], probe_id: str, directory: str
    ) -> None:
        self._executor = executor
        self._names = {node.id: node.name for node in (*neighbours, *nodes)}
        self._addresses = {node.id: node.address for node in (*neighbours, *nodes)}
        self._probed = [node.id for node in nodes]
        self._checks: dict[str, tuple[ProbeCheck, ...]] = {node.id: () for node in nodes}
        self._id, self._directory = probe_id, directory
        self._rounds = [_Round({node.id: ProbeRequest(id=f"{probe_id}-alone", directory=directory) for node in nodes})]
        self._pairs: list[tuple[str, str]] | None = None

    def poll(self) -> dict[str, ProbeReport] | None:
        """Reports by node id, once all is known; None until then."""
        while self._rounds:
            if not self._done(self._rounds[0]):
                return None
            self._rounds.pop(0)
            if not self._rounds:
                self._next_round()
        return {node: ProbeReport(checks=checks) for node, checks in self._checks.items()}

    def _done(self, one: _Round) -> bool:
        if not one.asked:
            return True
        try:
            answers = self._executor.probe(one.asked)
        except ExecutorError:
            answers = {}
        for node in list(one.asked):
            report = answers.get(node)
            if report is not None:
                one.silent = 0
                del one.asked[node]
                if node in self._checks:
                    self._checks[node] += report.checks
        if one.asked and not answers:
            one.silent += 1
            if one.silent >= SILENCE_POLLS:
                for node in one.asked:
                    if node in self._checks:
                        self._checks[node] += (ProbeCheck(name="agent", ok=False, told="it does not answer"),)
                one.asked.clear()
        return not one.asked

    def _next_round(self) -> None:
        """The next pairs of which no node is in two."""
        if self._pairs is None:
            self._pairs = self._neighbours()
        busy: set[str] = set()
        asked: dict[str, ProbeRequest] = {}
        for pair in list(self._pairs):
            if busy.isdisjoint(pair):
                self._pairs.remove(pair)
                busy.update(pair)
                asked.update(self._together(pair))
        if busy:
            self._rounds.append(_Round(asked))

    def _neighbours(self) -> list[tuple[str, str]]:
        """Each node with the next one, the last with the first; those that are bad by themselves are left out."""
        bad = {node for node, checks in self._checks.items() if not all(check.ok for check in checks)}
        sound = [node for node in sorted(self._names, key=self._names.__getitem__) if node not in bad]
        ring = [*itertools.pairwise(sound), *([(sound[-1], sound[0])] if len(sound) > 2 else [])]
        probed = set(self._probed)
        return [pair for pair in ring if not probed.isdisjoint(pair)]

    def _together(self, pair: tuple[str, str]) -> dict[str, ProbeRequest]:
        ports = self._executor.free_ports({pair[0]: 1}).get(pair[0], [])
        if not ports:
            return {}  # it has just stopped answering; the controller notices that by itself
        probe_id, address = f"{self._id}-{self._names[pair[0]]}-{self._names[pair[1]]}", self._addresses[pair[0]]
        names = self._names[pair[1]], self._names[pair[0]]
        alike = ProbeRequest(id=probe_id, directory=self._directory, size=len(pair), address=address, port=ports[0])
        return {
            node: alike.model_copy(update={"rank": rank, "neighbour": names[rank]}) for rank, node in enumerate(pair)
        }
