"""What Slurm's commands print, read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.errors import ExecutorError, YardError
from orchestrator.outside.slurm.commands import (
    ask,
    fields_of,
    gpu_word,
    gres_type,
    parse_gres,
    parse_moment,
    parse_node,
    parse_partitions,
    parse_queued,
    parse_time,
    time_text,
)

SINFO = """\
gpu|2-00:00:00|1:00:00|g1|mixed|64|515000|gpu:h100:8(S:0-1)
gpu|2-00:00:00|1:00:00|g2|drained*|64|515000|gpu:h100:8(S:0-1)
cpu*|infinite|n/a|c1|idle|128|257000|(null)
cpu*|infinite|n/a|c2|down~|128|257000|(null)
"""


def test_a_partition_is_its_nodes_that_are_up() -> None:
    gpu, default = parse_partitions(SINFO, "gpu"), parse_partitions(SINFO, None)
    assert gpu is not None
    assert default is not None
    assert (gpu.name, [node.name for node in gpu.nodes]) == ("gpu", ["g1"])
    assert (gpu.limit_s, gpu.default_s) == (172800.0, 3600.0)
    (node,) = gpu.nodes
    assert ([one.type for one in node.gpus], node.cores) == (["H100"] * 8, 64)
    assert node.gpus[0].memory_bytes is not None
    assert (default.name, [node.name for node in default.nodes]) == ("cpu", ["c1"])
    assert (default.limit_s, default.default_s) == (None, None)
    assert parse_partitions(SINFO, "none") is None
    assert parse_partitions(SINFO, "cpu") == default


@pytest.mark.parametrize(
    ("gres", "types"),
    [
        ("(null)", []),
        ("gpu:4", ["GPU"] * 4),
        ("gpu:a100:2(S:0-1),gpu:v100:1", ["A100", "A100", "V100"]),
        ("gpu:nvidia_h100_80gb_hbm3:2", ["H100", "H100"]),
        ("craynetwork:4,gpu:weird-card:1(IDX:0)", ["weird-card"]),
        ("shard:h100:16,mps:100", []),
    ],
)
def test_gpus_of_a_gres(gres: str, types: list[str]) -> None:
    assert parse_gres(gres) == types


def test_gpus_have_two_names() -> None:
    assert gpu_word("a100-40gb") == "A100-40GB"
    assert gres_type("gpu:nvidia_h100_80gb_hbm3:8(S:0)", "H100") == "nvidia_h100_80gb_hbm3"
    assert gres_type("gpu:8", "GPU") is None


@pytest.mark.parametrize("state", ["down", "down*", "drained", "draining", "maint", "fail", "unknown*"])
def test_nothing_starts_on_a_node_that_is_away(state: str) -> None:
    assert parse_node(f"n|{state}|4|1000|(null)") is None


@pytest.mark.parametrize("state", ["idle", "mixed", "allocated", "idle~", "completing", "planned"])
def test_others_may_be_waited_for(state: str) -> None:
    assert parse_node(f"n|{state}|4+|1000+|(null)") is not None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1:00", 60), ("30:00", 1800), ("1:00:00", 3600), ("2-12:00:00", 216000), ("infinite", None), ("n/a", None)],
)
def test_time_limits(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds


def test_time_limits_are_whole_minutes() -> None:
    assert [time_text(seconds) for seconds in (1, 60, 61, 3600, 90061)] == [
        "00:01:00", "00:01:00", "00:02:00", "01:00:00", "1-01:02:00",
    ]  # fmt: skip


def test_a_row_of_the_queue() -> None:
    row = parse_queued("12_3|15|PENDING|1795741289|1795737689|2|main||ReqNodeNotAvail, UnavailableNodes:n[1-2]")
    assert (row.id, row.raw_id, row.state, row.nodes, row.partition) == ("12_3", "15", "PENDING", 2, "main")
    assert (row.start, row.submitted) == (1795741289.0, 1795737689.0)
    assert row.reason == "ReqNodeNotAvail, UnavailableNodes:n[1-2]"
    assert parse_moment("N/A") is None


def test_fields_of_a_record() -> None:
    record = fields_of("JobId=1 JobName=a Reason=None EndTime=17 Command=/x y=z TRES=cpu=2,mem=1M")
    assert (record["JobId"], record["EndTime"], record["TRES"]) == ("1", "17", "cpu=2,mem=1M")


def test_without_slurm_that_is_said() -> None:
    with pytest.raises(YardError) as caught:
        ask("no-such-command-of-slurms")
    assert caught.value.code == "no-slurm"


def a_command(folder: Path, text: str, status: int) -> str:
    path = folder / "sinfo"
    path.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def test_a_controller_that_is_away_is_another_trouble_than_a_refusal(tmp_path: Path) -> None:
    away = "slurm_load_partitions: Unable to contact slurm controller (connect failure)"
    with pytest.raises(YardError) as caught:
        ask(a_command(tmp_path, away, 1))
    assert caught.value.code == "slurm-unreachable"
    with pytest.raises(ExecutorError, match="no such licence") as refused:
        ask(a_command(tmp_path, "no such licence", 1))
    assert refused.value.code == "slurm-refused"


def test_times_are_asked_for_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "show"
    path.write_text('#!/bin/sh\necho "$SLURM_TIME_FORMAT"\n')
    path.chmod(0o755)
    assert "SLURM_TIME_FORMAT" not in os.environ
    assert ask(str(path)).strip() == "%s"
