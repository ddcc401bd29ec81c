"""Cluster files."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.document import parse_document, read_document
from orchestrator.cluster.gpus import KNOWN, gpu_type
from orchestrator.cluster.model import Gpu
from orchestrator.cluster.spec import GB, kind_of, load_cluster
from orchestrator.errors import SpecError
from tests.builders import a_node

CLUSTERS = sorted((Path(__file__).parents[4] / "configs" / "clusters").glob("*.yaml"))

NODES = """\
nodes:
  - name: big
    count: 2
    cores: 96
    memory_gb: 1000
    gpus: {type: h100, count: 8}
    network_gbit: 400
  - {name: small, cores: 16, memory_gb: 64, slots: 4}
  - {name: new, cores: 16, memory_gb: 64, bf16: true}
"""


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_shipped_files_are_read(path: Path) -> None:
    assert load_cluster(read_document(path))


def test_kinds_of_nodes() -> None:
    big, small, new = load_cluster(parse_document(NODES))
    assert (big.device, big.slots, big.most, big.link) == ("cuda", 8, 16, "nvlink")
    assert big.gpu_memory_bytes == KNOWN["h100"].memory_bytes
    assert (small.device, small.most, small.memory_bytes) == ("cpu", 4, 64 * GB * 9 // 10)
    assert [kind.takes("any") for kind in (big, small)] == [True, True]
    assert [kind.takes("H100") for kind in (big, small)] == [True, False]
    assert [kind.takes("cpu") for kind in (big, small)] == [False, True]
    assert big.gpu_link_bytes_s == 450 * GB
    assert big.local(12) == 8
    assert [kind.bf16 for kind in (big, small, new)] == [True, False, True]


def test_a_kind_answers_to_its_family() -> None:
    (kind,) = load_cluster(
        parse_document("nodes: [{name: n, cores: 8, memory_gb: 64, gpus: {type: A100-40GB, count: 1}}]")
    )
    assert kind.takes("A100")
    assert not kind.takes("A10")


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        (
            "nodes: [{name: n, cores: 8, memory_gb: 64, gpus: {type: X9, count: 1}}]",
            "unknown-gpu",
            "nodes[0].gpus.type",
        ),
        ("nodes: [{name: n, cores: 8, memory: 64}]", "unknown-key", "nodes[0].memory"),
        ("nodes: [{name: n, cores: 0, memory_gb: 64}]", "out-of-range", "nodes[0].cores"),
        ("nodes: []", "out-of-range", "nodes"),
    ],
)
def test_faults_are_told_where_they_are(text: str, code: str, field: str) -> None:
    with pytest.raises(SpecError) as told:
        load_cluster(parse_document(text))
    assert told.value.field == field
    assert told.value.line == 1
    if code == "unknown-gpu":
        assert told.value.code == code
        assert told.value.hint


def test_memory_given_makes_a_type_known() -> None:
    text = "nodes: [{name: n, cores: 8, memory_gb: 64, gpus: {type: X9, count: 2, memory_gb: 10}}]"
    (kind,) = load_cluster(parse_document(text))
    assert (kind.gpu_memory_bytes, kind.slots, kind.takes("x9")) == (10 * GB, 2, True)


def test_node_of_a_yard() -> None:
    node = a_node(slots=4).model_copy(update={"memory_bytes": 8 * GB})
    assert (kind_of(node).most, kind_of(node).memory_bytes) == (4, 8 * GB)
    with_gpu = node.model_copy(update={"gpus": (Gpu(index=0, type="H100", memory_bytes=5 * GB),)})
    assert (kind_of(with_gpu).device, kind_of(with_gpu).gpu_memory_bytes) == ("cuda", 5 * GB)
    with pytest.raises(SpecError):
        kind_of(a_node())


def test_types_are_found_whatever_the_case() -> None:
    assert gpu_type("l40s") is KNOWN["l40s"]
    assert gpu_type("nothing") is None
    assert all(one.memory_gib > 0 and one.tflops > one.tflops_fp32 for one in KNOWN.values())
