"""Gangs that start together on a real Ray yard, where slots are taken by somebody else and an agent is silent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.yards import a_yard


def test_a_gang_that_cannot_start_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    with a_yard("--nodes", "3") as yard:
        address, env = yard.without_controller()
        done = subprocess.run(
            [sys.executable, "-m", "tests.ray_starts", address, str(tmp_path)],
            env=env, capture_output=True, text=True, timeout=200, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout.splitlines()[-1])
    assert len(seen["ports"]["good"]) == 50
    assert seen["ports"]["others"] == {}
    assert set(seen["failed"]) == {"taken.1", "silent.1", "half.1"}
    assert "did not reserve" in seen["failed"]["taken.1"]
    assert "does not answer" in seen["failed"]["silent.1"]
    assert "on a node that is lost by now" in seen["lost"]
    assert seen["again"] == []
    assert {"fine.1", "reserved.1"} <= set(seen["claimed"])
    assert "taken.1" not in seen["claimed"]
    assert seen["kept"] == ["fine.1", "half.1", "reserved.1", "silent.1"]
