"""Submits to an emulated Kubernetes API server that go wrong on the way: no job is lost, and none is doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.cluster import Answer, Cluster
from tests.kubernetes.resources import ROOT


class Home:
    """A home from which jobs are handed over, by the command line."""

    def __init__(self, folder: Path, cluster: Cluster, patience: float = 60.0) -> None:
        (folder / "volume").mkdir()
        self.cluster, self.file = cluster, folder / "volume" / "job.yaml"
        self.file.write_text("name: tick\nrun: ['true']\n")
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("TUNEYARD_")},
            **cluster.env,
            "PYTHONPATH": str(ROOT),
            "TUNEYARD_HOME": str(folder / "home"),
            "TUNEYARD_OUTSIDE": json.dumps({"k8s": {"*": {"mount": str(folder / "volume")}}}),
            "TUNEYARD_K8S_PATIENCE": str(patience),
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments], env=self.env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def ls(self) -> Any:
        process = self.start("ls", "--on", "k8s", "-o", "json")
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        return json.loads(out)

    def there(self) -> list[str]:
        try:
            return [one["metadata"]["name"] for one in self.cluster.find("rayjobs")]
        except (OSError, Answer):
            return []


def away(cluster: Cluster, tmp_path: Path, seconds: float) -> None:
    home = Home(tmp_path, cluster, patience=seconds * 2 + 30)
    cluster.control("away", seconds=seconds)
    began = time.monotonic()
    submit = home.start("submit", "--to", "k8s", str(home.file))
    out, err = submit.communicate(timeout=seconds * 2 + 60)
    assert submit.returncode == 0, err
    assert time.monotonic() - began >= seconds - 1
    assert "does not answer; waiting for it" in err
    (name,) = home.there()
    assert out.split()[0] == f"k8s:default/{name}"
    assert [one["id"] for one in home.ls()] == [f"k8s:default/{name}"]


def test_a_server_that_is_away_for_seconds(cluster: Cluster, tmp_path: Path) -> None:
    away(cluster, tmp_path, 6.0)


@pytest.mark.slow
def test_a_server_that_is_away_for_a_minute(cluster: Cluster, tmp_path: Path) -> None:
    away(cluster, tmp_path, 60.0)


@pytest.mark.parametrize("arrives", [True, False], ids=["after", "before"])
def test_a_submitter_that_is_killed(cluster: Cluster, tmp_path: Path, arrives: bool) -> None:
    """Between the server's having the job and its being told: or before the server has it at all."""
    home = Home(tmp_path, cluster)
    if arrives:
        cluster.fail(verb="create", resource="rayjobs", drop=True, times=1)
        cluster.fail(verb="create", resource="rayjobs", status=503, times=1000)
    else:
        cluster.fail(verb="create", resource="rayjobs", status=503, times=1000)
    submit = home.start("submit", "--to", "k8s", str(home.file))
    deadline = time.monotonic() + 60
    while len([one for one in cluster.asked() if one["verb"] == "create"]) < 2:
        assert time.monotonic() < deadline
        assert submit.poll() is None, submit.communicate()[1]
        time.sleep(0.02)
    submit.send_signal(signal.SIGKILL)
    submit.communicate()
    cluster.control("faults", "DELETE")
    (told,) = home.ls()
    assert told["id"].startswith("k8s:default/tick-")
    assert len(home.there()) == (1 if arrives else 0)
    assert told["state"] == ("starting" if arrives else "failed")
    if not arrives:
        assert told["reason"]["remedy"] == "submit it again"
