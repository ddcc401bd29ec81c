"""What happens to a real Ray yard of three nodes when parts of it are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from launch.attempt import ExitCode
from orchestrator.execute.local import free_port
from orchestrator.serve.secret import API_TOKEN
from orchestrator.settings import Settings
from orchestrator.yard.record import environment
from tests.redis import a_redis
from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_yard, kill, until

LEASH = 4.0


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with a_yard("--nodes", "3", leash=str(LEASH), leash_margin="1", lease="3") as yard:
        yield yard


def state(yard: Yard, job: str) -> str:
    return next(row["state"] for row in yard.json("ls") if row["id"] == job)


def test_nodes_are_seen(yard: Yard) -> None:
    nodes = yard.json("nodes")
    assert sorted(node["name"] for node in nodes) == ["node-0", "node-1", "node-2"]
    assert {node["cores"] for node in nodes} == {os.cpu_count()}


def test_a_gang_larger_than_one_node_spans_two(yard: Yard) -> None:
    slots = yard.json("nodes")[0]["cpu_slots"]
    job = yard.submit(yard.ticker("wide", processes=slots + 1, ticks=3))
    assert yard.json("wait", job)["state"] == "succeeded"
    (attempt,) = yard.describe(job)["attempts"]
    assert [share["processes"] for share in attempt["nodes"]] == [slots, 1]
    assert all(yard.ticks(job, rank=rank) for rank in range(slots + 1))
    assert yard.left_of(job) == []


def test_cancel_leaves_no_process(yard: Yard) -> None:
    job = yard.submit(yard.ticker("cancelled"))
    until(lambda: yard.ticks(job))
    assert yard.json("cancel", job, "--wait")["state"] == "cancelled"
    assert yard.left_of(job) == []
    assert yard.run("cancel", job, check=False).returncode == 0  # again: the same
    ended = json.loads(yard.files(job).exit(0).read_bytes())
    assert ended["code"] == 10  # it was asked, not killed


def test_cancel_ends_a_rank_that_does_not_listen(yard: Yard) -> None:
    stubborn = yard.home / "stubborn.py"
    stubborn.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)")
    keys = {"resources": {"num_processes": 2}, "run": [sys.executable, str(stubborn)]}
    job = yard.submit(yard.job_file(name="stubborn", **keys))
    yard.rank_pids(job)
    yard.run("cancel", job)
    stop = until(lambda: yard.files(job).stop.exists() and json.loads(yard.files(job).stop.read_bytes()))
    assert stop["deadline"] - time.time() > 30  # the default grace is a minute; the test does not wait for it
    for share in yard.describe(job)["attempts"][0]["nodes"]:
        assert share["processes"] == 2
    # The controller repeats the stored message, so the deadline is moved where the agent reads it from: the database.
    import sqlalchemy as sa

    engine = sa.create_engine(f"sqlite:///{yard.home / 'yard.db'}")
    with engine.begin() as connection:
        query = "UPDATE attempts SET stop = :stop WHERE job_id = :job"
        connection.execute(sa.text(query), {"stop": json.dumps(stop | {"deadline": 0}), "job": job})
    engine.dispose()
    assert yard.json("wait", job, check=False)["state"] == "cancelled"
    assert yard.left_of(job) == []


def test_training_goes_on_without_its_controller_and_is_adopted(yard: Yard, tmp_path: Path) -> None:
    path = yard.job_file(
        name="adopted",
        model={"name_or_path": str(write_bert(tmp_path / "bert")), "task": "sequence-classification"},
        data={"train": str(write_messages(tmp_path / "data.tsv")), "split": {"test": 0.2}, "max_length": 32},
        train={"max_steps": 300, "global_batch_size": 16, "learning_rate": 1e-3},
        strategy="zero2",
        resources={"num_processes": 2},
    )
    job = yard.submit(path)
    files = yard.files(job)

    def step() -> int:
        lines = files.progress(0).read_text().splitlines() if files.progress(0).exists() else []
        return max((json.loads(line)["step"] for line in lines), default=0)

    until(lambda: step() > 5)
    pids = yard.rank_pids(job)
    controller = yard.record.controller
    assert controller is not None
    kill(controller.pid)
    until(lambda: not controller.alive)
    reached = step()
    until(lambda: step() > reached + 20)
    assert yard.run("ls", check=False).returncode == 3  # no yard answers
    yard.run("up")
    assert yard.record.controller != controller
    result = yard.json("wait", job)
    assert (result["state"], result["attempts"]) == ("succeeded", 1)
    assert result["train"]["steps"] == 300
    assert yard.rank_pids(job) == pids
    assert yard.left_of(job) == []


def test_two_controllers_on_one_database_one_acts(yard: Yard) -> None:
    settings = Settings(home=yard.home, lease=3)
    port = free_port()
    env = environment(settings, yard.record) | yard.env | {"TUNEYARD_PORT": str(port)}
    assert yard.record.ray_address is not None
    second = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.serve", "--address", yard.record.ray_address], env=env
    )
    try:

        def acting(url: str) -> bool | None:
            try:
                return bool(httpx.get(f"{url}/healthz", trust_env=False).json()["acting"])
            except httpx.HTTPError:
                return None

        other = f"http://127.0.0.1:{port}"
        until(lambda: acting(other) is not None)
        job = yard.submit(yard.ticker("shared", ticks=10_000))
        until(lambda: yard.ticks(job))
        for _ in range(20):
            assert (acting(yard.record.url), acting(other)) == (True, False)
        first = yard.record.controller
        assert first is not None
        kill(first.pid)
        until(lambda: acting(other))
        token = (yard.home / API_TOKEN).read_text()
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.get(f"{other}/v1/jobs/{job}", headers=headers, trust_env=False).json()["attempts"] == 1
        httpx.post(f"{other}/v1/jobs/{job}/cancel", headers=headers, trust_env=False)
        until(
            lambda: httpx.get(f"{other}/v1/jobs/{job}", headers=headers, trust_env=False).json()["state"] == "cancelled"
        )
        assert yard.left_of(job) == []
    finally:
        second.kill()
        second.wait()
        yard.run("up")


def deaths(pids: list[int]) -> dict[int, float]:
    """When each process was first seen dead; filled by a thread while the test goes on."""
    seen: dict[int, float] = {}

    def watch() -> None:
        while len(seen) < len(pids):
            for pid in pids:
                if pid not in seen and not (psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"):
                    seen[pid] = time.time()
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    return seen


@pytest.mark.parametrize("agent_too", [True, False], ids=["agent-killed-too", "agent-lives"])
def test_a_node_lost_with_its_processes_alive_never_overlaps_with_the_next_attempt(yard: Yard, agent_too: bool) -> None:
    job, agent, raylet = _off_the_head(yard, f"lost-{str(agent_too).lower()}")
    pids = yard.rank_pids(job)
    died = deaths(pids)
    if agent_too:
        os.kill(agent, 19)  # SIGSTOP first, so that it cannot end its ranks when it sees the raylet go
    raylet.kill()
    if agent_too:
        kill(agent)
        assert all(psutil.pid_exists(pid) for pid in pids)
    until(lambda: yard.ticks(job, attempt=2))
    first, second = sorted(yard.describe(job)["attempts"], key=lambda one: one["number"])[:2]
    assert first["outcome"] == "node-lost"
    assert set(died) == set(pids)
    assert second["created_at"] >= max(died.values())
    last = max(tick for rank in range(2) for tick in yard.ticks(job, 1, rank))
    assert min(tick for rank in range(2) for tick in yard.ticks(job, 2, rank)) > last
    if not agent_too:  # which outlives its raylet for long enough
        ends = [json.loads(yard.files(job).exit(rank).read_bytes()) for rank in range(2)]
        assert any("the node's agent ended it" in end["error"]["message"] for end in ends), ends
    if agent_too:  # by their leash; where one was a moment faster, the launcher told the other to stop
        codes = {json.loads(yard.files(job).exit(rank).read_bytes())["code"] for rank in range(2)}
        assert ExitCode.LEASH_EXPIRED in codes
        assert codes <= {ExitCode.LEASH_EXPIRED, ExitCode.STOPPED}
    yard.run("cancel", job, "--wait")
    assert yard.left_of(job) == []


def test_what_an_agent_that_dies_alone_leaves_is_ended_by_the_next(yard: Yard) -> None:
    job, agent, raylet = _ticking(yard, "bereft")
    pids = yard.rank_pids(job)
    died = deaths(pids)
    kill(agent)
    until(lambda: yard.ticks(job, attempt=2))
    first, second = yard.describe(job)["attempts"]
    assert first["outcome"] == "node-lost"
    assert set(died) == set(pids)
    assert second["created_at"] >= max(died.values())
    assert raylet.is_running()
    yard.run("cancel", job, "--wait")
    assert yard.left_of(job) == []


def test_up_starts_nodes_again(yard: Yard) -> None:
    yard.run("up")  # the tests before have killed some
    assert len(yard.json("nodes")) == 3
    before = yard.record
    job, _, raylet = _off_the_head(yard, "again")
    raylet.kill()
    until(lambda: not yard.record.whole)
    yard.run("up")
    after = yard.record
    assert len(yard.json("nodes")) == 3
    assert (after.id, after.controller, after.ray[0]) == (before.id, before.controller, before.ray[0])
    assert sum(one != other for one, other in zip(before.ray, after.ray, strict=True)) == 1
    until(lambda: yard.ticks(job, attempt=2))
    yard.run("cancel", job, "--wait")


def _kill_head(yard: Yard) -> None:
    head = yard.record.ray[0]
    next(child for child in psutil.Process(head.pid).children() if child.name() == "gcs_server").kill()
    until(lambda: not head.alive)


@pytest.mark.slow
def test_without_redis_a_new_head_makes_the_cluster_anew_and_jobs_go_on(yard: Yard) -> None:
    job, _, _ = _off_the_head(yard, "headless")
    pids = yard.rank_pids(job)
    died = deaths(pids)
    _kill_head(yard)
    yard.run("up")
    assert len(yard.json("nodes")) == 3
    until(lambda: yard.ticks(job, attempt=2))
    assert set(died) == set(pids)
    assert yard.describe(job)["attempts"][1]["created_at"] >= max(died.values())
    yard.run("cancel", job, "--wait")
    assert yard.left_of(job) == []


@pytest.mark.slow
def test_with_redis_trainings_elsewhere_go_on_while_the_head_is_away() -> None:
    with a_redis() as redis, a_yard("--nodes", "3", redis=redis) as yard:
        job, _, _ = _off_the_head(yard, "kept")
        pids = yard.rank_pids(job)
        controller = yard.record.controller
        _kill_head(yard)
        assert yard.run("nodes", check=False).returncode != 0  # it is told, not waited for
        ticked = len(yard.ticks(job))
        until(lambda: len(yard.ticks(job)) > ticked + 20)
        yard.run("up")
        assert len(yard.json("nodes")) == 3
        assert yard.record.controller == controller
        more = yard.submit(yard.ticker("more", ticks=3))
        assert yard.json("wait", more)["state"] == "succeeded"
        told = yard.describe(job)
        assert (told["state"], len(told["attempts"])) == ("running", 1)
        assert yard.rank_pids(job) == pids
        yard.run("cancel", job, "--wait")
        assert yard.left_of(job) == []


def _ticking(yard: Yard, name: str, processes: int = 2) -> tuple[str, int, psutil.Process]:
    """A job whose ranks tick on one node, and that node's agent and raylet."""
    job = yard.submit(yard.ticker(name, processes=processes))
    until(lambda: all(yard.ticks(job, rank=rank) for rank in range(processes)))
    agent = json.loads(yard.files(job).agent(0).read_bytes())["pid"]
    raylet = psutil.Process(agent).parent()
    assert raylet is not None
    assert "raylet" in raylet.name()
    return job, agent, raylet


def _off_the_head(yard: Yard, name: str) -> tuple[str, int, psutil.Process]:
    """_ticking on a node that is not Ray's head, whose loss is another matter."""
    job, agent, raylet = _ticking(yard, name)
    if not _is_head(raylet):
        return job, agent, raylet
    yard.run("cancel", job, "--wait")
    filler, _, filled = _ticking(yard, f"{name}-filler", processes=yard.json("nodes")[0]["cpu_slots"])
    assert _is_head(filled)
    job, agent, raylet = _ticking(yard, name)
    assert not _is_head(raylet)
    yard.run("cancel", filler, "--wait")
    return job, agent, raylet


def _is_head(raylet: psutil.Process) -> bool:
    return any("--head" in argument for argument in raylet.cmdline())
