"""Real gangs on a real Ray yard, of which ranks, agents and nodes are killed: what is trained stays the same."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.settings import Settings
from orchestrator.views import AttemptView
from orchestrator.yard.home import connect
from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_yard, kill, until

STEPS = 500
LEASH = 4.0


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    rules = json.dumps({"grow_after_s": 3})
    with a_yard("--nodes", "2", cpu_slots="2", leash=str(LEASH), leash_margin="1", rules=rules) as yard:
        yield yard


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "model": {
            "name_or_path": str(write_bert(folder / "bert", hidden=256)), "task": "sequence-classification",
            "dropout": 0.0,
        },
        "data": {"train": str(write_messages(folder / "data.tsv", rows=800)), "max_length": 48},
        # Of sums in another order Adam makes much where gradients are small; not with so large an epsilon.
        "train": {
            "max_steps": STEPS, "global_batch_size": 64, "micro_batch_size": 16, "learning_rate": 1e-4,
            "adam_epsilon": 1e-4, "log_samples": True,
        },
        "checkpoint": {"every_steps": 10},
        "retry": {"max_restarts": 9},
    }  # fmt: skip


def attempt_of(yard: Yard, job: str, number: int, ranks: int | None = None) -> AttemptView:
    """An attempt that trains, this or a later one, with so many ranks; the job has saved something by then."""
    with connect(Settings(home=yard.home)) as client:

        def look() -> AttemptView | None:
            told = client.job(job)
            assert not told.state.final, f"it was over too soon: {told.reason.sentence}"
            newest = client.attempts(job)[-1] if told.attempts >= number else None
            if newest is None or newest.state != "running" or told.checkpoint is None:
                return None
            trains = newest.progress is not None and newest.progress.phase == "train"
            return newest if trains and ranks in (None, newest.plan.world_size) else None

        found: AttemptView = until(look, 300)
        return found


def nodes_of(yard: Yard) -> dict[str, psutil.Process]:
    """Name of a node → the process that started it."""
    return {f"node-{index}": psutil.Process(process.pid) for index, process in enumerate(yard.record.ray)}


def check_steps(yard: Yard, job: str) -> dict[str, int]:
    """Every step in the lineage has the rows of its place in the order, whoever took it; returns what it cost."""
    attempts = yard.describe(job)["attempts"]
    rows: dict[int, list[int]] = {}
    again = 0
    for one in attempts:
        of_attempt: dict[int, list[int]] = {}
        for rank in range(one["plan"]["world_size"]):
            path = yard.files(job, one["number"]).samples(rank)
            for line in path.read_text().splitlines() if path.exists() else []:
                seen = json.loads(line)
                of_attempt.setdefault(seen["step"], []).extend(seen["rows"])
        if of_attempt:
            again += sum(1 for step in rows if step >= min(of_attempt))
            rows = {step: taken for step, taken in rows.items() if step < min(of_attempt)} | of_attempt
    assert sorted(rows) == list(range(1, STEPS + 1))
    assert all(len(taken) == len(set(taken)) for taken in rows.values())
    return {"attempts": len(attempts), "steps_again": again}


def weights(yard: Yard, job: str) -> dict[str, torch.Tensor]:
    assert yard.json("wait", job)["state"] == "succeeded"
    return load_file(yard.home / "jobs" / job / "model" / "model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_elastic_job_goes_on_with_what_is_left_and_grows_back(yard: Yard, world: dict[str, Any]) -> None:
    """A rank is killed; then a node, with which half of the slots are gone; then a rank of what is left; then the node
    comes back."""
    job = yard.submit(
        yard.job_file(name="elastic", strategy="zero2", resources={"num_processes": "2..4"}, **world)
    )  # fmt: skip
    first = attempt_of(yard, job, 1, 4)
    kill(yard.rank_pids(job, first.number, 4)[3])
    second = attempt_of(yard, job, 2, 4)

    starter = nodes_of(yard)["node-1"]
    argv, env, folder = starter.cmdline(), starter.environ(), starter.cwd()
    (raylet,) = [child for child in starter.children() if "raylet" in child.name()]
    lost_at = time.time()
    kill(raylet.pid)
    third = attempt_of(yard, job, second.number + 1, 2)
    assert third.created_at - lost_at < LEASH + 20, "it does not wait for the slots that it had"
    assert {share.node for share in third.nodes} < {share.node for share in second.nodes}
    (lost,) = [one for one in yard.describe(job)["attempts"] if one["number"] == second.number]
    assert lost["outcome"] in ("node-lost", "killed")  # its agent may have ended the ranks, and written that down

    kill(yard.rank_pids(job, third.number)[0])
    fourth = attempt_of(yard, job, third.number + 1, 2)
    with (yard.home / "logs" / "again.log").open("ab") as log:
        back = subprocess.Popen(argv, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        attempt_of(yard, job, fourth.number + 1, 4)
        found = weights(yard, job)
        kinds = [one["outcome"] for one in yard.describe(job)["attempts"]]
        ends = [kind for kind in kinds if kind != "stopped"]
        assert ends == ["killed", lost["outcome"], "killed", "succeeded"]
        cost = check_steps(yard, job)
        whole = yard.submit(
            yard.job_file(name="whole", strategy="zero2", resources={"num_processes": 2}, **world)
        )  # fmt: skip
        assert largest_difference(found, weights(yard, whole)) <= 1e-5
        print(cost)
    finally:
        back.kill()
        back.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_with_the_same_number_of_ranks_it_is_bitwise_the_same(yard: Yard, world: dict[str, Any]) -> None:
    """Two ranks under ZeRO-3 with dropout: one is killed, then the launcher, then the node's agent; then a pause."""
    keys = world | {"model": world["model"] | {"dropout": 0.1}, "strategy": "zero3", "resources": {"num_processes": 2}}
    job = yard.submit(yard.job_file(name="same", **keys))
    attempt_of(yard, job, 1)
    kill(yard.rank_pids(job)[1])
    attempt_of(yard, job, 2)
    kill(psutil.Process(yard.rank_pids(job, 2)[0]).ppid())
    attempt_of(yard, job, 3)
    kill(json.loads(yard.files(job, 3).agent(0).read_bytes())["pid"])
    attempt_of(yard, job, 4)
    assert yard.json("pause", job, "--wait")["state"] == "paused"
    yard.json("resume", job)
    found = weights(yard, job)
    check_steps(yard, job)
    whole = yard.submit(yard.job_file(name="undisturbed", **keys))
    assert largest_difference(found, weights(yard, whole)) == 0.0
