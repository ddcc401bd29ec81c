"""A yard over three hosts, each with an address of its own: machines join, are cut off and come back, and leave."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.settings import Settings
from orchestrator.yard.joined import NodeRecord
from tests import networks
from tests.networks import Host
from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_joined_node, a_yard, until

WHY_NOT = networks.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
LEASH_S, MARGIN_S = 4.0, 1.0


@dataclass
class World:
    yard: Yard
    hosts: list[Host]
    nodes: list[Yard]
    """Of the second host and the third: homes of their own."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        hosts = stack.enter_context(networks.hosts(3))
        first, *others = hosts
        settings = {"cpu_slots": "2", "leash": str(LEASH_S), "leash_margin": str(MARGIN_S)}
        yard = stack.enter_context(a_yard(prefix=first.prefix, host=first.address, **settings))
        nodes = [
            stack.enter_context(a_joined_node(yard, f"host-{index}", host.prefix, cpu_slots="2"))
            for index, host in enumerate(others, 1)
        ]
        yield World(yard, hosts, nodes)


def names(yard: Yard) -> set[str]:
    return {node["name"] for node in yard.json("nodes")}


def test_machines_have_joined(world: World) -> None:
    found = {node["name"]: node for node in world.yard.json("nodes")}
    assert set(found) == {"node-0", "host-1", "host-2"}
    assert [found[name]["address"] for name in ("node-0", "host-1", "host-2")] == [one.address for one in world.hosts]


@pytest.mark.parametrize(("words", "code"), [(("--token-file", "wrong"), "unauthorized"), ((), "no-token")])
def test_a_wrong_token_is_refused(world: World, tmp_path: Path, words: tuple[str, ...], code: str) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    stranger = Yard(tmp_path / "home", world.hosts[1].prefix)
    words = tuple(str(tmp_path / word) if word == "wrong" else word for word in words)
    done = stranger.run("node", "join", world.yard.record.url, *words, check=False)
    assert done.returncode != 0
    assert code in done.stderr
    assert not (tmp_path / "home" / "node.json").exists()


def test_to_join_again_changes_nothing_and_another_yard_is_refused(world: World) -> None:
    token = ("--token-file", str(world.yard.home / "token"))
    before = NodeRecord.read(Settings(home=world.nodes[0].home))
    world.nodes[0].run("node", "join", world.yard.record.url, *token)
    assert NodeRecord.read(Settings(home=world.nodes[0].home)) == before
    done = world.nodes[0].run("node", "join", "http://127.0.0.1:1", *token, check=False)
    assert done.returncode != 0
    assert "tuneyard node leave" in done.stderr


def test_a_gang_over_two_hosts(world: World) -> None:
    job = world.yard.submit(world.yard.ticker("wide", processes=4, ticks=20))
    assert world.yard.json("wait", job)["state"] == "succeeded"
    (attempt,) = world.yard.describe(job)["attempts"]
    assert len({share["node"] for share in attempt["nodes"]}) >= 2
    assert all(len(world.yard.ticks(job, 1, rank)) == 20 for rank in range(4))


def test_a_host_is_cut_off_and_comes_back(world: World) -> None:
    """Its ranks live on where nobody sees them, and end by their leash before the next attempt begins."""
    yard, host = world.yard, world.hosts[1]
    for name in ("node-0", "host-2"):
        yard.run("cordon", name)
    job = yard.submit(yard.ticker("cut"))
    ranks = yard.rank_pids(job)
    until(lambda: yard.ticks(job, 1, 0) and yard.ticks(job, 1, 1))
    for name in ("node-0", "host-2"):
        yard.run("uncordon", name)
    host.cut()
    cut_at = time.time()
    try:
        until(lambda: "host-1" not in names(yard))
        until(lambda: yard.ticks(job, 2, 0) and yard.ticks(job, 2, 1))
        last = max(tick for rank in (0, 1) for tick in yard.ticks(job, 1, rank))
        begun = min(tick for rank in (0, 1) for tick in yard.ticks(job, 2, rank))
        assert last > cut_at + 1, "they did not stop at once: it is the leash that ends them"
        assert begun > last, "no two attempts at a time"
        assert len(ranks) == 2
    finally:
        host.mend()
    until(lambda: "host-1" in names(yard))
    yard.run("cancel", job)
    yard.json("wait", job, check=False)
    outcomes = [attempt["outcome"] for attempt in yard.describe(job)["attempts"]]
    assert outcomes[0] in ("node-lost", "killed", "crashed")
    again = yard.submit(yard.ticker("again", processes=6, ticks=5))
    assert yard.json("wait", again)["state"] == "succeeded", "all three hosts take ranks"


@pytest.mark.slow
def test_joining_leaving_and_another_controller_in_mid_run_lose_nothing(world: World, tmp_path: Path) -> None:
    """A training's node leaves, and joins again as it goes on elsewhere; the controller is exchanged twice."""
    yard, leaver = world.yard, world.nodes[1]
    keys = {
        "model": {"name_or_path": str(write_bert(tmp_path / "bert", hidden=128)), "task": "sequence-classification"},
        "data": {"train": str(write_messages(tmp_path / "data.tsv", rows=400)), "max_length": 48},
        "train": {"max_steps": 200, "global_batch_size": 32, "learning_rate": 1e-4, "log_samples": True},
        "strategy": "zero2",
        "resources": {"num_processes": 2},
        "checkpoint": {"every_steps": 20},
    }
    whole = yard.submit(yard.job_file(name="whole", **keys))
    assert yard.json("wait", whole)["state"] == "succeeded"

    for name in ("node-0", "host-1"):
        yard.run("cordon", name)
    job = yard.submit(yard.job_file(name="moves", **keys))
    until(lambda: steps(yard, job, 1))
    yard.run("up", "--new-controller")
    for name in ("node-0", "host-1"):
        yard.run("uncordon", name)
    leaver.run("node", "leave")
    until(lambda: names(yard) == {"node-0", "host-1"})
    url = yard.record.url
    leaver.run("node", "join", url, "--token-file", str(yard.home / "token"), "--name", "host-2")
    assert names(yard) == {"node-0", "host-1", "host-2"}
    yard.run("up", "--new-controller")
    assert yard.json("wait", job)["state"] == "succeeded"

    attempts = yard.describe(job)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["stopped", "succeeded"]
    first, second = steps(yard, job, 1), steps(yard, job, 2)
    assert [*first, *second] == list(range(1, 201)), "each step once, the next attempt from the very one"
    models = [yard.home / "jobs" / one / "model" / "model.safetensors" for one in (whole, job)]
    assert models[0].read_bytes() == models[1].read_bytes()


def steps(yard: Yard, job: str, attempt: int) -> list[int]:
    """Those that an attempt's rank 0 has begun."""
    path = yard.files(job, attempt).samples(0)
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(networks.sshd() is None, reason="there is no sshd here (openssh-server)")
def test_machines_are_joined_and_left_by_ssh(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    with networks.hosts(2) as (first, second), networks.an_ssh_server(second, tmp_path) as ssh:
        remote = ["env", f"TUNEYARD_HOME={tmp_path}/far", f"PYTHONPATH={root}", sys.executable, "-m", "orchestrator"]
        over = ("--hosts", second.address, "--ssh", shlex.join(ssh), "--remote-command", shlex.join(remote))
        with a_yard(*over, prefix=first.prefix, host=first.address, cpu_slots="2") as yard:
            assert names(yard) == {"node-0", second.address}
            job = yard.submit(yard.ticker("wide", processes=len(yard.json("nodes")) + 1, ticks=5))
            assert yard.json("wait", job)["state"] == "succeeded"
            keeper = NodeRecord.read(Settings(home=tmp_path / "far"))
            assert keeper is not None
            assert keeper.alive
            yard.run("up")
            assert NodeRecord.read(Settings(home=tmp_path / "far")) == keeper, "who is there is left alone"
        assert not keeper.alive
        assert NodeRecord.read(Settings(home=tmp_path / "far")) is None


def test_a_yard_on_loopback_takes_no_other_machines(tmp_path: Path) -> None:
    done = Yard(tmp_path / "home").run("up", "--hosts", "n2", check=False)
    assert done.returncode != 0
    assert "TUNEYARD_HOST" in done.stderr
    assert not (tmp_path / "home" / "yard.json").exists()


@pytest.mark.parametrize("words", [(), ("--join", "http://10.0.0.1:8080")])
def test_units_are_what_systemd_takes(tmp_path: Path, words: tuple[str, ...]) -> None:
    checker = shutil.which("systemd-analyze")
    text = Yard(tmp_path / "home").run("unit", *words).stdout
    assert f"TUNEYARD_HOME={tmp_path}/home" in text
    if checker is None:
        pytest.skip("there is no systemd-analyze here")
    path = tmp_path / "tuneyard.service"
    path.write_text(text)
    done = subprocess.run([checker, "verify", str(path)], capture_output=True, text=True, check=False)
    assert str(path) not in done.stderr, done.stderr
    assert "tuneyard.service" not in done.stderr, done.stderr
