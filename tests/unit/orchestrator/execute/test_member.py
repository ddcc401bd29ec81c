"""One node's part of an attempt, with real processes that are not launchers of anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.attempt import ENV_ALLOCATOR, ENV_RUN_ID, ExitCode, write_atomically
from launch.contract import RankExit
from orchestrator.execute.member import LaunchRequest, Member
from orchestrator.execute.oom import Death, Witness
from orchestrator.execute.processes import end_all, is_alive, of_run
from orchestrator.execute.standby import _key as standby_key

# A launcher with one rank in a session of its own, as torchelastic has them.
LAUNCHER = """
import json, os, pathlib, psutil, subprocess, sys, time
run_dir = pathlib.Path(sys.argv[1]); what = sys.argv[2]
if len(sys.argv) == 3:
    child = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "rank"], start_new_session=True)
    sys.exit(child.wait() and 1)
me = psutil.Process(); rank = run_dir / "rank-0"; rank.mkdir()
(rank / "process.json").write_text(json.dumps({"rank": 0, "pid": me.pid, "start_time": me.create_time(), "host": "h"}))
if what == "hang":
    time.sleep(1000)
if what == "leave":
    os._exit(3)
code = {"done": 0, "crash": 1}[what]
error = {"code": "oops", "message": "boom", "traceback": "Traceback"} if code else None
(rank / "exit.json").write_text(json.dumps({"rank": 0, "code": code, "time": time.time(), "error": error}))
if code:
    time.sleep(1000)  # a failed rank that does not leave
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    path = tmp_path / "launcher.py"
    path.write_text(textwrap.dedent(LAUNCHER))
    return path


@pytest.fixture
def run_id(tmp_path: Path) -> Iterator[str]:
    name = f"{tmp_path.name}-{os.getpid()}.1"
    yield name
    assert end_all(ENV_RUN_ID, name) == []


def a_member(run_id: str, launcher: Path, what: str, **changes: object) -> Member:
    run_dir = launcher.parent / "attempt"
    request = LaunchRequest(
        run_id=run_id, run_dir=str(run_dir), node_index=0, ranks=(0,),
        argv=(sys.executable, str(launcher), str(run_dir), what), env={}, env_from={}, cwd=str(launcher.parent),
        files={str(run_dir / "contract.json"): "{}"},
    )  # fmt: skip
    return Member(LaunchRequest(**({**request.__dict__, **changes})))


def until(condition: object, seconds: float = 20.0) -> None:
    """Wait for something that must happen; how long it takes is not tested."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def exit_of(member: Member) -> dict[str, object]:
    data: dict[str, object] = json.loads(member.files.exit(0).read_bytes())
    return data


def test_request_survives_its_file() -> None:
    request = LaunchRequest("r.1", "/d", 0, (0, 1), ("a",), {"A": "b"}, {}, "/", {"f": "t"}, (1, 2.5))
    assert LaunchRequest.loads(request.dumps()) == request


def test_a_good_end(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "done")
    assert member.start()
    until(member.tick)
    assert exit_of(member)["code"] == ExitCode.DONE
    assert json.loads(member.files.agent_exit(0).read_bytes())["launcher_code"] == 0
    assert of_run(run_id) == []


def test_an_attempt_starts_once(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "done")
    assert member.start()
    assert not a_member(run_id, launcher, "done").start()
    until(member.tick)


def test_a_failed_rank_that_does_not_leave_is_ended(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "crash")
    member.start()
    until(member.tick)
    assert exit_of(member)["error"] == {"code": "oops", "message": "boom", "traceback": "Traceback"}
    assert of_run(run_id) == []


def test_a_killed_rank_is_written_down_with_its_signal_missing_only_if_nobody_knows(
    run_id: str, launcher: Path
) -> None:
    member = a_member(run_id, launcher, "hang")
    member.start()
    until(lambda: member.tick() or member.files.process(0).exists())
    member.tick()
    psutil.Process(json.loads(member.files.process(0).read_bytes())["pid"]).kill()
    until(member.tick)
    assert exit_of(member)["code"] == ExitCode.KILLED


def test_a_rank_that_the_kernel_killed_for_its_memory_ran_out_of_it(
    run_id: str, launcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    death = Death("cgroup-killed", "the kernel killed it: its cgroup allows 1.0 GiB", 1 << 30, 1 << 30)
    monkeypatch.setattr(Witness, "death", lambda _witness: death)
    member = a_member(run_id, launcher, "hang")
    member.start()
    until(lambda: member.tick() or member.files.process(0).exists())
    member.tick()
    psutil.Process(json.loads(member.files.process(0).read_bytes())["pid"]).kill()
    until(member.tick)
    end = RankExit.model_validate(exit_of(member))
    assert (end.code, end.signal) == (ExitCode.OUT_OF_MEMORY, 9)
    assert end.error is not None
    assert (end.error.code, end.error.message) == (death.code, death.message)
    assert (end.error.limit_bytes, end.error.echo) == (1 << 30, False)


def test_a_rank_that_we_ended_is_an_echo_whatever_the_kernel_has_counted(
    run_id: str, launcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Witness, "death", lambda _witness: Death("cgroup-killed", "it was another", None, None))
    member = a_member(run_id, launcher, "hang")
    member.start()
    until(lambda: member.tick() or member.files.process(0).exists())
    member.tick()
    write_atomically(member.files.stop, json.dumps({"reason": "a rank failed", "deadline": 0}))
    until(member.tick)
    end = RankExit.model_validate(exit_of(member))
    assert (end.code, end.signal) == (ExitCode.KILLED, 9)
    assert end.error is not None
    assert end.error.echo
    assert end.error.message == "the node's agent ended it: it was asked to stop (a rank failed), and did not in time"


def test_a_rank_that_leaves_without_a_word_counts_as_killed(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "leave")
    member.start()
    until(member.tick)
    assert exit_of(member)["code"] == ExitCode.KILLED


def test_a_launcher_that_fails_before_its_ranks_is_a_crash_with_its_log(run_id: str, launcher: Path) -> None:
    launcher.write_text("raise SystemExit('no such option')")
    member = a_member(run_id, launcher, "done")
    member.start()
    until(member.tick)
    end = exit_of(member)
    assert end["code"] == ExitCode.CRASH
    assert "no such option" in end["error"]["traceback"]  # type: ignore[index]


@pytest.mark.parametrize("deaf", [False, True], ids=["by-the-signal", "by-itself"])
def test_a_launcher_that_is_told_to_end_before_its_ranks_is_a_stop(run_id: str, launcher: Path, deaf: bool) -> None:
    told = "raise SystemExit('SignalException: Process 7 got signal: 15')"
    handler = f"import signal\ndef told(*_): {told}\nsignal.signal(signal.SIGTERM, told)\n" if deaf else ""
    launcher.write_text(f"{handler}import pathlib, time\npathlib.Path(r'{launcher}.on').touch()\ntime.sleep(1000)")
    member = a_member(run_id, launcher, "done")
    member.start()
    until(Path(f"{launcher}.on").exists)
    assert member.launcher is not None
    os.kill(member.launcher.pid, signal.SIGTERM)  # type: ignore[union-attr]
    until(member.tick)
    assert exit_of(member)["code"] == ExitCode.STOPPED


def test_a_launcher_that_does_not_exist_is_a_crash(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "done", argv=("/nowhere/python",))
    member.start()
    assert member.tick()
    assert exit_of(member)["code"] == ExitCode.CRASH


def test_past_a_stops_deadline_everything_is_ended(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "hang")
    member.start()
    until(lambda: member.tick() or member.files.process(0).exists())
    write_atomically(member.files.stop, json.dumps({"reason": "r", "deadline": time.time() + 3600}))
    member.tick()
    assert of_run(run_id)
    write_atomically(member.files.stop, json.dumps({"reason": "r", "deadline": 0}))
    until(member.tick)
    assert of_run(run_id) == []


def test_ranks_that_are_ended_since_their_node_is_lost_are_lost_with_it(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "hang")
    member.start()
    until(lambda: member.files.process(0).exists())
    member.lose_node()
    until(member.tick)
    assert not member.files.stop.exists()  # which ranks would follow, and then count as having been stopped
    end = RankExit.model_validate_json(member.files.exit(0).read_bytes())
    assert end.code == ExitCode.LEASH_EXPIRED
    assert end.error is not None
    assert not end.error.echo  # it is the cause, whatever its peers say of it


def test_an_attempt_ends_with_its_owner(run_id: str, launcher: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(owner.pid).create_time()
    member = a_member(run_id, launcher, "hang", owner=(owner.pid, started))
    member.start()
    until(lambda: member.tick() or member.files.process(0).exists())
    assert not member.tick()
    owner.kill()
    owner.wait()
    until(member.tick)
    assert of_run(run_id) == []


def test_a_heartbeat_is_as_old_as_the_last_word_of_the_yard(run_id: str, launcher: Path) -> None:
    member = a_member(run_id, launcher, "hang")
    member.start()
    heartbeat = member.files.heartbeat(0)
    first = heartbeat.read_text()
    member._beat_at = 0.0
    member.tick(float(first) - 7)
    assert float(heartbeat.read_text()) == float(first) - 7
    member._beat_at = 0.0
    member.tick()
    assert float(heartbeat.read_text()) > float(first)


def test_environment_is_clean_and_secrets_come_from_the_agent(
    run_id: str, launcher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SECRET_THING", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    member = a_member(run_id, launcher, "done", env={"A": "b"}, env_from={"HF_TOKEN": "MY_TOKEN", "NOT": "THERE"})
    env = member._environment()
    assert env["HF_TOKEN"] == "s3cret"
    assert env["A"] == "b"
    assert env[ENV_RUN_ID] == run_id
    assert env["PATH"].startswith(str(Path(sys.executable).parent))
    assert not {"RAY_SECRET_THING", "OMP_NUM_THREADS", "NOT"} & set(env)
    assert "s3cret" not in member.request.dumps()


def test_a_reused_pid_is_another_process() -> None:
    me = psutil.Process()
    assert is_alive(me.pid, me.create_time())
    assert not is_alive(me.pid, me.create_time() - 100)
    assert not is_alive(2**22 + 1, me.create_time())


def test_the_plans_allocator_joins_what_the_node_and_the_job_say(
    launcher: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    wish = {ENV_ALLOCATOR: "tight"}
    found = a_member(run_id, launcher, "done", env=wish)._environment()
    assert found["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64,expandable_segments:True"
    assert ENV_ALLOCATOR not in found
    said = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    assert a_member(run_id, launcher, "done", env={**said, **wish})._environment() == {**found, **said}
    # A process with torch loaded has read another wish, so it is not the one for this.
    assert standby_key(found) != standby_key(a_member(run_id, launcher, "done")._environment())


def test_what_a_dead_agent_left_behind_is_ended_and_nothing_is_said_of_its_ranks(run_id: str, launcher: Path) -> None:
    """How they ended nobody knows, so that the attempt counts as lost with its node."""
    member = a_member(run_id, launcher, "hang")
    agent = "import sys; from orchestrator.execute.member import *; Member(LaunchRequest.loads(sys.argv[1])).start()"
    dead = subprocess.run([sys.executable, "-c", agent, member.request.dumps()], check=False)
    assert dead.returncode == 0
    until(member.files.process(0).exists)
    assert of_run(run_id)
    taken = Member.left_behind(member.request)
    assert taken is not None
    until(taken.tick)
    assert of_run(run_id) == []
    assert member.files.agent_exit(0).exists()
    assert not member.files.exit(0).exists()
    assert Member.left_behind(member.request) is None


def test_what_a_living_agent_holds_is_left_to_it(run_id: str, launcher: Path) -> None:
    assert Member.left_behind(a_member(run_id, launcher, "hang").request) is None  # nobody has claimed it yet
    member = a_member(run_id, launcher, "hang")
    assert member.start()
    until(member.files.process(0).exists)
    assert Member.left_behind(member.request) is None
    assert of_run(run_id)
