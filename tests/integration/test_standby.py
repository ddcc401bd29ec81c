"""A launcher forked from a standby is the launcher that would have been started, only sooner."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import orchestrator.execute.standby
from launch.attempt import RESERVED, ExitCode
from launch.config import TrainSpec
from launch.contract import RankExit, RankProcess, RunContract
from orchestrator.execute.member import LaunchRequest, Member
from orchestrator.execute.processes import carrying, of_run
from orchestrator.execute.request import build_request
from orchestrator.execute.standby import LATE, Ordered, Standby, Standbys, node_environment
from orchestrator.yard.record import ENV_YARD
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages
from tests.yards import a_yard

ENGINES = [("single", 1), ("ddp", 2), ("zero2", 2)]
# What differs from one start to the next, whoever starts it; the name of the run is the test's own.
OF_THE_START = {
    "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TUNEYARD_RUN_ID", "_", "PYTEST_CURRENT_TEST", "ACCELERATE_CONFIG_FILE",
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    world = tmp_path_factory.mktemp("world")
    return a_spec(write_bert(world / "bert"), write_messages(world / "messages.tsv", rows=60))


@pytest.fixture(scope="module", autouse=True)
def without_what_earlier_tests_imported() -> None:
    """MLflow, once imported in this process, leaves a variable in its environment."""
    os.environ.pop("_MLFLOW_TELEMETRY_SESSION_ID", None)


@pytest.fixture(autouse=True)
def pytests_own_variable_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no standby would fit a test that did not start it."""
    monkeypatch.setattr(orchestrator.execute.standby, "LATE", LATE | {"PYTEST_CURRENT_TEST"})


@pytest.fixture(scope="module")
def standbys() -> Iterator[Standbys]:
    """One, ready."""
    found = Standbys(1)
    found.want({k: v for k, v in node_environment().items() if k != "PYTEST_CURRENT_TEST"})
    until(lambda: found.tick() is None and ready(found))
    yield found
    found.close()


def ready(standbys: Standbys) -> bool:
    return all(one.alive() and one.ready for one in standbys._there.values()) and standbys.report().count > 0


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait for something that must happen; how long it takes is not tested."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def long(spec: TrainSpec, tmp_path: Path) -> RunContract:
    """An attempt that trains until it is ended."""
    long = spec.model_copy(update={"train": spec.train.model_copy(update={"max_steps": 2_000})})
    return a_contract(tmp_path / "run", a_plan(long, "ddp", 2, 8), long, run_id=f"{tmp_path.name}-{os.getpid()}.1")


def ended(member: Member, rank: int = 0) -> RankExit:
    return RankExit.model_validate_json(member.files.exit(rank).read_bytes())


@pytest.mark.parametrize(("engine", "processes"), ENGINES)
@pytest.mark.parametrize("status", [0, 7])
def test_a_rank_sees_the_same_world(spec: TrainSpec, tmp_path: Path, engine: str, processes: int, status: int) -> None:
    shown: dict[bool, list[dict[str, Any]]] = {}
    codes = {}
    contract = a_contract(tmp_path, a_plan(spec, engine, processes, 8), spec)
    for cold in (True, False):
        launched = start(contract, {"STATUS": str(status)}, module="tests.show_environment", cold=cold)
        codes[cold] = launched.launchers[0].wait(120)
        shown[cold] = []
        for rank in range(processes):
            told = json.loads((tmp_path / f"shown-{rank}.json").read_text())
            assert told["environment"].pop("TORCHELASTIC_ERROR_FILE", "/").startswith("/")
            told["environment"] = {k: v for k, v in told["environment"].items() if k not in OF_THE_START}
            shown[cold].append(told)
    for ours, theirs in zip(shown[False], shown[True], strict=True):
        assert dict(ours["environment"].items() ^ theirs["environment"].items()) == {}
        assert ours == theirs
    assert codes[False] == codes[True] == (1 if status else 0)


def test_its_processes_are_found_by_the_runs_id_and_a_killed_rank_is_told_of(
    standbys: Standbys, long: RunContract
) -> None:
    member = Member(build_request(long, 0))
    assert member.start(standbys)
    assert isinstance(member.launcher, Ordered), "the standby was not used"
    until(lambda: member.files.progress(1).exists() and '"step":2' in member.files.progress(1).read_text())
    rank, other = (json.loads(member.files.process(rank).read_text())["pid"] for rank in (1, 0))
    found = {process.pid for process in of_run(long.run_id)}  # and what a rank runs at the moment, such as git
    assert {rank, other, psutil.Process(rank).ppid()} <= found, "a launcher and two ranks"
    os.kill(rank, signal.SIGKILL)
    until(member.tick)
    assert (ended(member, 1).code, ended(member, 1).signal) == (ExitCode.KILLED, signal.SIGKILL)
    assert of_run(long.run_id) == []
    assert ready(standbys), "the standby is there for the next attempt"


def test_a_standby_that_dies_takes_no_attempt_with_it(long: RunContract) -> None:
    own = Standbys(1)
    own.want(node_environment())
    until(lambda: own.tick() is None and ready(own))
    member = Member(build_request(long, 0))
    assert member.start(own)
    until(lambda: member.files.progress(0).exists() and '"step":2' in member.files.progress(0).read_text())
    next(iter(own._there.values())).process.kill()
    steps = member.files.progress(0).stat().st_size
    until(lambda: not member.tick() and member.files.progress(0).stat().st_size > steps + 1000)
    member.files.stop.write_text(json.dumps({"reason": "test", "deadline": time.time() + 60}))
    until(member.tick)
    assert {ended(member, rank).code for rank in (0, 1)} == {ExitCode.STOPPED}
    own.close()


def test_one_that_still_imports_is_waited_for_unless_it_is_called_off(spec: TrainSpec, tmp_path: Path) -> None:
    own = Standbys(1)
    try:
        own.want(node_environment())
        own.tick()
        contracts = [
            a_contract(
                tmp_path / name, a_plan(spec, "single", 1, 8), spec, run_id=f"{tmp_path.name}-{name}-{os.getpid()}.1"
            )
            for name in ("runs", "called-off")
        ]
        runs, called_off = members = [Member(build_request(contract, 0)) for contract in contracts]
        assert all(member.start(own) for member in members)
        assert not ready(own)
        assert all(isinstance(member.launcher, Ordered) for member in members)
        called_off.files.stop.write_text(json.dumps({"reason": "test", "deadline": 0}))
        assert not called_off.tick(), "nobody knows yet whether it begins"
        until(called_off.tick)
        assert ended(called_off).code == ExitCode.STOPPED
        assert not called_off.files.process(0).exists()
        until(runs.tick)
        assert ended(runs).code == ExitCode.DONE
    finally:
        own.close()


def test_a_request_that_it_does_not_fit_starts_cold(
    standbys: Standbys, spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another environment than it has imported under; a secret; a command; an id too long to be shown."""
    contract = a_contract(tmp_path, a_plan(spec, "single", 1, 8), spec)
    assert build_request(contract, 0).standby
    monkeypatch.setenv("SECRET", "s")
    assert not build_request(contract.model_copy(update={"env_from": {"KEY": "SECRET"}}), 0).standby
    assert not build_request(contract.model_copy(update={"spec": None, "command": ("true",)}), 0).standby
    environment = {**node_environment(), "TUNEYARD_RUN_ID": "r.1"}
    argv, log = ("python",), tmp_path / "log"
    for changed in ({"HF_HUB_CACHE": "/elsewhere"}, {"TUNEYARD_RUN_ID": "r" * (RESERVED + 1)}):
        assert standbys.launch(argv, {**environment, **changed}, "/", log) is None
    assert Standbys(0).launch(argv, environment, "/", log) is None


def test_they_are_bounded_and_follow_the_newest_wishes() -> None:
    own = Standbys(2)
    base = node_environment()
    first = base
    for number in range(3):
        own.want({**base, "JOB": str(number)})
    try:
        until(lambda: own.tick() is None and own.report().count == 2)
        assert own.report().bytes > 2 << 20
        processes = [one.process for one in own._there.values()]
        own.want(first)
        assert own.report().count == 1, "the oldest wish gives way"
        assert sum(process.poll() is None for process in processes) == 1
    finally:
        own.close()
    until(lambda: all(process.poll() is not None for process in processes))
    nothing = Standbys(0)
    nothing.want(base)
    nothing.tick()
    assert nothing.report().count == 0


HOLDER = """
import os, sys, time
from pathlib import Path
from orchestrator.execute.member import LaunchRequest, Member
from orchestrator.execute.standby import Standbys, node_environment
standbys = Standbys(1); standbys.want(node_environment()); standbys.tick()
one = next(iter(standbys._there.values()))
while not (one.alive() and one.ready): time.sleep(0.05)
member = Member(LaunchRequest.loads(Path(sys.argv[1]).read_text())); member.start(standbys)
print(one.process.pid, flush=True)
while not member.tick(): time.sleep(0.1)
"""


def test_a_standby_ends_with_its_agent_and_the_attempt_does_not(long: RunContract, tmp_path: Path) -> None:
    """The leash ends the ranks, as without a standby."""
    request: LaunchRequest = build_request(long.model_copy(update={"leash_s": 3.0}), 0)
    path = tmp_path / "request.json"
    path.write_text(request.dumps())
    agent = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    standby = psutil.Process(int(agent.stdout.readline()))
    files = Member(request).files
    until(lambda: files.progress(0).exists() and '"step":2' in files.progress(0).read_text())
    agent.kill()
    agent.wait()
    until(lambda: not standby.is_running() or standby.status() == psutil.STATUS_ZOMBIE)
    size = files.progress(0).stat().st_size
    until(lambda: files.progress(0).stat().st_size > size)
    until(lambda: not of_run(long.run_id))
    assert RankExit.model_validate_json(files.exit(0).read_bytes()).code in (ExitCode.LEASH_EXPIRED, ExitCode.STOPPED)


@pytest.mark.parametrize("executor", ["ray", pytest.param("local", marks=pytest.mark.slow)])
def test_a_yard_starts_attempts_by_them(tmp_path: Path, executor: str) -> None:
    """And shows how many there are, and what they hold."""
    world = tmp_path / "world"
    job = {
        "name": "warm", "strategy": "zero2", "resources": {"num_processes": 2},
        "model": {"name_or_path": str(write_bert(world / "bert")), "task": "sequence-classification"},
        "data": {"train": str(write_messages(world / "messages.tsv")), "split": {"test": 0.2}},
        "train": {"max_steps": 2},
    }  # fmt: skip
    with a_yard("--executor", executor, standbys="1") as yard:
        until(lambda: yard.json("nodes")[0]["standbys"]["count"] == 1)
        assert yard.json("nodes")[0]["standbys"]["bytes"] > 100 << 20
        assert re.search(r"1 \(\d+ MiB\)", yard.run("nodes").stdout)
        path = yard.job_file(**job)
        for number in range(2):
            told = yard.json("submit", str(path), "--wait", "-q")
            assert (told["state"], told["engine"]) == ("succeeded", "zero2")
            assert yard.left_of(told["job"]) == []
            process = RankProcess.model_validate_json(yard.files(told["job"]).process(1).read_bytes())
            # One of a Ray node serves the next attempt at once, too; without Ray, the next may be importing still.
            assert process.standby or (number > 0 and executor == "local")
        record = yard.record
    assert carrying(ENV_YARD, record.id) == [], "no standby outlives its yard"


CHATTERER = """
import json
for number in range(2_000):
    print(json.dumps({"number": number, "code": 0}))
"""


class Unlucky:
    """A stream that cuts lines, and of which every other reader comes late with what it has read."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._reads = stream, 0

    def read(self, _size: int) -> Any:
        read = self._stream.read(100)
        self._reads += 1
        time.sleep(0.002 * (self._reads % 2))
        return read

    def close(self) -> None:
        self._stream.close()


def test_two_threads_that_listen_lose_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent's watch asks how a launcher ended while its yard asks for a report; a lost word would hang it."""
    started = subprocess.Popen

    def chatterer(_argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return started([sys.executable, "-c", CHATTERER.replace("\\\\n", "\\n")], **options)

    monkeypatch.setattr(orchestrator.execute.standby.subprocess, "Popen", chatterer)
    standby = Standby(dict(os.environ))
    standby.process.stdout = Unlucky(standby.process.stdout)  # type: ignore[assignment]
    problems: list[BaseException] = []

    def listen() -> None:
        try:
            while standby.alive():
                pass
        except ValueError as problem:
            problems.append(problem)

    listeners = [threading.Thread(target=listen) for _ in range(4)]
    for listener in listeners:
        listener.start()
    for listener in listeners:
        listener.join(60)
    standby.close()
    assert problems == []
    assert set(standby.ended) == set(range(2_000))


def test_one_that_was_closed_is_not_alive_for_those_that_still_ask() -> None:
    """As the agent of a node that has lost its raylet does, which then ends its attempts."""
    standby = Standby(dict(os.environ))
    standby.close()
    assert not standby.alive()
