"""Pages of the documentation, whose commands are typed as they stand there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.execute.processes import end_all
from orchestrator.settings import Settings
from orchestrator.yard.joined import ENV_NODE, NodeRecord
from orchestrator.yard.record import ENV_YARD, read_yard
from tests import networks
from tests.docs import ROOT, Reader
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.operators import Operators
from tests.yards import Yard, until


@pytest.mark.slow
@pytest.mark.skipif(networks.why_not() is not None, reason=networks.why_not() or "")
def test_plain_machines(tmp_path: Path) -> None:
    homes = [tmp_path / "first", tmp_path / "second"]
    with networks.hosts(2) as (first, second):
        reader = Reader("docs/machines.md", {"10.0.0.1": first.address, "8080": "18080"})
        common = {"TUNEYARD_STANDBYS": "0", "TUNEYARD_CPU_SLOTS": "2", "HF_HUB_OFFLINE": "1"}
        ours, theirs = ({**common, "TUNEYARD_HOME": str(home)} for home in homes)
        try:
            reader.types("export TUNEYARD_HOST", first.prefix, **ours)
            (tmp_path / "token").write_text((homes[0] / "token").read_text())
            reader.types("tuneyard node join", second.prefix, tmp_path, **theirs)
            yard = Yard(homes[0], first.prefix, host=first.address, cpu_slots="2")
            assert len(yard.json("nodes")) == 2
            job = yard.submit(yard.ticker("wide", processes=3, ticks=5))
            assert yard.json("wait", job)["state"] == "succeeded"
            reader.skips("tuneyard up --hosts", "tests/faults/test_join.py does that, with a server of its own")
            before = yard.record.controller
            reader.types("tuneyard up --new-controller", first.prefix, TUNEYARD_HOST=first.address, **ours)
            assert yard.record.controller != before
            until(lambda: len(yard.json("nodes")) == 2)
            assert reader.left == []
        finally:
            record, node = read_yard(Settings(home=homes[0])), NodeRecord.read(Settings(home=homes[1]))
            if node is not None:
                Yard(homes[1], second.prefix).run("node", "leave", "--force", check=False)
                end_all(ENV_NODE, node.id)
            if record is not None:
                end_all(ENV_YARD, record.id)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_jobs_on_kubernetes(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: small\nrun: ['true']\nresources: {num_processes: 2}\n")
    names = {"job.yaml": f"{tmp_path}/job.yaml --with mount={tmp_path}"}
    home = {"TUNEYARD_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **cluster.env}
    reader, cluster.namespace = Reader("docs/kubernetes-jobs.md", names), "lab"
    try:
        reader.skips("kubectl create namespace", "kubectl sends protobuf, which the emulated server does not read")
        reader.types("kubectl apply", **home)
        printed = reader.types("export TUNEYARD_OUTSIDE", **home)
        (rayjob,) = cluster.find("rayjobs")
        job = f"k8s:lab/{rayjob['metadata']['name']}"
        assert printed.splitlines()[-1] == f"{job} starting"
        reader.names |= {"k8s:lab/small-x1y2z": job}
        assert rayjob["metadata"]["name"] in reader.types("kubectl get rayjobs", **home)
        with Operators(cluster).at_work():
            told = reader.types("tuneyard ls", **home)
        assert "cancelled by its user" in told
        reader.skips("export TUNEYARD_OUTSIDE", "tests/unit/orchestrator/outside/k8s has kinds of nodes")
        assert reader.left == []
    finally:
        cluster.empty()
        cluster.namespace = "default"
