"""A short run of benchmarks.chaos, on a real yard: nothing is lost, whatever the machine's speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import kinds_in_turn
from benchmarks.chaos_audit import Audit, Rows, check_rows, clocks_differ_s, lineage
from launch.checkpoint.manifest import CheckpointId

ROOT = Path(__file__).parents[2]

KINDS = ["rank-killed", "controller-killed", "checkpoint-torn", "agent-killed", "disk-full"]
ZERO = (
    "jobs_lost",
    "torn_checkpoints_loaded",
    "samples_duplicated",
    "samples_missing",
    "overlapping_attempts",
    "orphan_processes",
    "false_alarms",
    "unexplained_ends",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_six_faults_lose_nothing() -> None:
    argv = [sys.executable, "-m", "benchmarks.chaos", "--faults", "6", "--seed", "3", "--length", "0.6", "-o", "json"]
    done = subprocess.run([*argv, "--kinds", *KINDS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], done.stderr
    assert found["faults"] == 6 or found["not_possible_here"]
    assert {name: found[name] for name in ZERO} == dict.fromkeys(ZERO, 0)
    assert done.returncode == 0


def test_kinds_are_drawn_evenly_and_by_the_seed() -> None:
    drawn = [kind for kind, _ in zip(kinds_in_turn(1, KINDS), range(15), strict=False)]
    assert sorted(drawn) == sorted(KINDS * 3)
    assert drawn == [kind for kind, _ in zip(kinds_in_turn(1, KINDS), range(15), strict=False)]


def test_rows_that_come_again_or_never_are_counted() -> None:
    """Five rows in steps of two: three steps an epoch, the last of which is smaller."""
    cases = {
        (0, 1, 2, 3, 4, 4, 3, 2, 1, 0): (0, 0),
        (0, 1, 2, 3, 4, 2, 0): (0, 0),
        (0, 1, 2, 3, 3, 4, 3, 2, 1, 0): (1, 1),
        (0, 1, 2, 3, 4, 2): (0, 1),
        (0, 1, 2, 3, 4, 2, 2): (1, 1),
    }
    for rows, (again, missing) in cases.items():
        found = Audit()
        steps = 6 if len(rows) == 10 else 4
        check_rows("a job", list(rows), steps, 5, 2, found)
        assert (found.samples_duplicated, found.samples_missing) == (again, missing), rows


def test_the_lineage_is_that_of_the_claims() -> None:
    """The third attempt goes on from the first's checkpoint: the second has saved nothing that counts."""
    claims = {1: None, 2: CheckpointId(30, 1), 3: CheckpointId(20, 1)}
    rows: dict[int, Rows] = {1: {20: [], 30: []}, 2: {31: []}, 3: {21: []}}
    assert lineage(claims, {}, rows) == [(1, 0, 20), (3, 20, None)]


def test_copies_are_of_the_last_attempt_that_had_come_so_far() -> None:
    """The third goes on from what the first left when it was killed, beyond the checkpoint that it has claimed; the
    second took no step, and the fourth begins with what the third made of it."""
    claims = {1: None, 2: CheckpointId(30, 1), 3: CheckpointId(30, 1), 4: CheckpointId(34, 3)}
    rows: dict[int, Rows] = {1: {30: [], 34: [], 35: []}, 3: {35: []}, 4: {35: []}}
    assert lineage(claims, {3: 34}, rows) == [(1, 0, 34), (3, 34, 34), (4, 34, None)]


def test_clocks_are_compared() -> None:
    assert abs(clocks_differ_s()) < 2
