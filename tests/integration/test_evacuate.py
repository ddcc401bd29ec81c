"""A node goes away: what trains on it saves first. A real gang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launch.contract import ExitCode
from orchestrator.execute.evacuate import evacuate
from orchestrator.yard.joined import ENV_NODE
from tests.attempts import Job
from tests.integration.test_resume import job
from tests.worlds import write_bert, write_messages


def test_what_trains_on_a_node_that_goes_away_saves_and_ends(tmp_path: Path) -> None:
    """Attempts of other yards are left alone."""
    write_bert(tmp_path / "bert")
    write_messages(tmp_path / "messages.tsv", rows=147)
    spec = job(tmp_path, train={"max_steps": 100_000})
    here, elsewhere = Job(spec, tmp_path / "here"), Job(spec, tmp_path / "elsewhere")
    gang, other = here.begin("ddp", 2), elsewhere.begin("single", 1)
    try:
        gang.wait_for('"train"')
        other.wait_for('"train"')
        assert evacuate(tmp_path / "here", 60, (ENV_NODE, "another of this host")), "it has none"
        assert not gang.files.stop.exists()
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.execute.evacuate", "--grace", "100"],
            env=os.environ | {"TUNEYARD_HOME": str(tmp_path / "here")}, check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ended = gang.wait()
        assert [end.code for end in ended.values()] == [ExitCode.STOPPED] * 2
        result = ended[0].result
        assert result is not None
        assert result.train is not None
        assert [note.step for note in here.notes(1) if note.outcome == "committed"][-1] == result.train.steps
        assert other.launchers[0].poll() is None
        assert not other.files.stop.exists()
    finally:
        gang.end()
        other.end()
