"""A short run of benchmarks.chaos, on a real yard: nothing is lost, whatever the machine's speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import kinds_in_turn
from benchmarks.chaos_audit import Audit, check_rows, lineage
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.manifest import CheckpointId
from launch.checkpoint.storage import open_storage

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


def test_the_lineage_is_that_of_the_claims(tmp_path: Path) -> None:
    """The third attempt goes on from the first's checkpoint: the second has saved nothing that counts."""
    catalogue = Catalogue(open_storage(str(tmp_path)))
    for attempt, start in ((1, None), (2, CheckpointId(30, 1)), (3, CheckpointId(20, 1))):
        catalogue.begin(attempt)
        catalogue.claim(attempt, start)
    assert lineage(catalogue, 3) == [(1, 0, 20), (3, 20, None)]
