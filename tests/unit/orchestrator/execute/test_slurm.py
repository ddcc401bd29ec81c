"""What of an allocation can be told without Slurm: GPUs' names, how long ranks are given, whose agents may be alive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.attempt import AttemptFiles
from launch.contract import ExecutionPlan, NodeShare, RunContract, StopRequest
from orchestrator.execute.request import build_request
from orchestrator.execute.slurm import SlurmExecutor
from orchestrator.execute.slurm_agent import stop_within, with_gpus
from tests.builders import a_node


def a_contract(run_dir: Path, *nodes: str, gpus: tuple[int, ...] = ()) -> RunContract:
    device = "cuda" if gpus else "cpu"
    shares = tuple(NodeShare(node=node, address=node, processes=max(1, len(gpus)), gpus=gpus) for node in nodes)
    plan = ExecutionPlan(
        engine="ddp", world_size=len(nodes) * max(1, len(gpus)), device=device, micro_batch_size=1,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    return RunContract(
        run_id="job.1", job_id="job", attempt=1, plan=plan, nodes=shares, main_port=1, run_dir=str(run_dir),
        output_dir="/out", checkpoint_dir="/check", tracker_dir="/track", command=("true",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "told", "counted"),
    [
        ("0,1,2,3", "0,2", (0, 2)),
        ("4,5,6,7", "4,6", (4, 6)),
        ("GPU-a,GPU-b,GPU-c", "GPU-a,GPU-c", ()),
    ],
)
def test_gpus_have_the_names_that_slurm_gives_them(
    tmp_path: Path, visible: str, told: str, counted: tuple[int, ...]
) -> None:
    request = with_gpus(build_request(a_contract(tmp_path, "n1", gpus=(0, 2)), 0), visible)
    assert request.env["CUDA_VISIBLE_DEVICES"] == told
    assert request.gpus == counted


def test_without_gpus_nothing_is_changed(tmp_path: Path) -> None:
    request = build_request(a_contract(tmp_path, "n1"), 0)
    assert with_gpus(request, "0,1") == request


@pytest.mark.parametrize(("grace", "ranks"), [(30, 24), (10, 5), (2, 1), (600, 594)])
def test_some_of_the_grace_is_for_ending_what_does_not_save(grace: float, ranks: float) -> None:
    assert stop_within(grace) == ranks


def an_executor(*names: str) -> SlurmExecutor:
    return SlurmExecutor([a_node(name, slots=1) for name in names], cpus=1, grace_s=30)


def test_a_stop_is_no_later_than_slurms_own(tmp_path: Path) -> None:
    executor, contract = an_executor("n1"), a_contract(tmp_path, "n1")
    stop = AttemptFiles(tmp_path).stop
    executor.stop(contract, StopRequest(reason="paused", deadline=2000.0))
    assert json.loads(stop.read_text())["deadline"] == 2000.0
    executor.hurry(1000.0)
    executor.stop(contract, StopRequest(reason="paused", deadline=2000.0))
    assert json.loads(stop.read_text()) == {"reason": "paused", "deadline": 1000.0}


def test_what_an_earlier_run_left_is_out_of_reach_unless_it_has_ended(tmp_path: Path) -> None:
    files = AttemptFiles(tmp_path)
    contract = a_contract(tmp_path, "n1", "n2")
    files.agent(0).write_text("{}")
    files.agent(1).write_text("{}")
    files.agent_exit(1).write_text("{}")
    (status,) = an_executor("n1", "n2").poll([contract], {}).values()
    assert [(one.reachable, one.ended) for one in status.reports] == [(False, False), (True, True)]
    files.agent_exit(0).write_text("{}")
    (status,) = an_executor("n7", "n8").poll([contract], {}).values()
    assert status.ended


def test_what_no_agent_has_taken_on_is_started_if_its_nodes_are_here(tmp_path: Path) -> None:
    contract = a_contract(tmp_path, "n1")
    (here,) = an_executor("n1").poll([contract], {}).values()
    (elsewhere,) = an_executor("n7").poll([contract], {}).values()
    assert (here.reachable, here.claimed) == (True, False)
    assert not elsewhere.reachable


def test_ports_are_those_of_this_machine_on_the_first_node() -> None:
    (ports,) = an_executor("n1", "n2").free_ports({"n1": 2}).values()
    assert len(set(ports)) == 2
