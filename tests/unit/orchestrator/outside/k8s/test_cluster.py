"""What the worker groups of a RayCluster say of their nodes."""

from __future__ import annotations

import pytest

from orchestrator.cluster.model import BF16_LABEL
from orchestrator.outside.k8s.cluster import groups_of


@pytest.mark.parametrize(
    ("labels", "bf16"), [({BF16_LABEL: "true"}, True), ({BF16_LABEL: "false"}, False), (None, False)]
)
def test_a_group_may_say_that_its_cpus_multiply_bf16(labels: dict[str, str] | None, bf16: bool) -> None:
    container = {"name": "worker", "resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}
    group = {
        "groupName": "cpus", "minReplicas": 0, "maxReplicas": 2, "labels": labels,
        "template": {"spec": {"containers": [container]}},
    }  # fmt: skip
    (found,) = groups_of({"spec": {"workerGroupSpecs": [group]}})
    assert found.like.bf16 is bf16
