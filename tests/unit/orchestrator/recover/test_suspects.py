"""Which nodes are suspect."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.recover.suspects import WINDOW_S, suspects


@dataclass(frozen=True)
class AFault:
    node: str
    job_id: str
    time: float = 0.0


def test_a_node_is_suspect_once_different_jobs_have_failed_on_it_lately() -> None:
    assert suspects([AFault("n1", "a"), AFault("n1", "b"), AFault("n2", "a")], 1.0) == {"n1": ["a", "b"]}


def test_a_job_that_kills_itself_makes_no_node_suspect() -> None:
    assert suspects([AFault(node, "a") for node in ("n1", "n2", "n1", "n2", "n1")], 1.0) == {}


def test_what_is_long_ago_does_not_count() -> None:
    faults = [AFault("n1", "a", 0.0), AFault("n1", "b", 10.0)]
    assert suspects(faults, WINDOW_S) == {"n1": ["a", "b"]}
    assert suspects(faults, WINDOW_S + 1) == {}
