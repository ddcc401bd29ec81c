"""How attempts end: each with its exit code, its exit.json on every rank, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from launch.config import TrainSpec
from launch.contract import ENV_HEARTBEAT, ExitCode, NodeShare, RankExit, StopRequest
from tests.worlds import Launched, a_contract, a_plan, a_spec, start, write_bert, write_messages


@pytest.fixture(scope="module")
def long_job(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A job that would train for minutes."""
    world = tmp_path_factory.mktemp("world")
    return a_spec(write_bert(world / "bert"), write_messages(world / "messages.tsv"), train={"max_steps": 100_000})


def codes(ended: dict[int, RankExit]) -> dict[int, ExitCode]:
    return {rank: exit_.code for rank, exit_ in ended.items()}


def last_step(launched: Launched, rank: int) -> int:
    return int(json.loads(launched.files.progress(rank).read_text().splitlines()[-1])["step"])


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_stop_message_ends_all_ranks_at_the_same_step(long_job: TrainSpec, tmp_path: Path, engine: str) -> None:
    launched = start(a_contract(tmp_path, a_plan(long_job, engine, 2, 8), long_job))
    launched.wait_for('"step":3')
    launched.files.stop.write_text(StopRequest(reason="test", deadline=time.time() + 60).model_dump_json())
    ended = launched.wait()
    assert codes(ended) == {0: ExitCode.STOPPED, 1: ExitCode.STOPPED}, launched.logs()
    assert last_step(launched, 0) == last_step(launched, 1)
    result = ended[0].result
    assert result is not None
    assert result.train is not None
    assert len(result.train.losses) == result.train.steps == last_step(launched, 0)
    assert not (tmp_path / "model").exists()


def test_sigterm_to_one_rank_stops_both(long_job: TrainSpec, tmp_path: Path) -> None:
    launched = start(a_contract(tmp_path, a_plan(long_job, "ddp", 2, 8), long_job))
    launched.wait_for('"step":3')
    os.kill(json.loads(launched.files.process(1).read_text())["pid"], signal.SIGTERM)
    assert codes(launched.wait()) == {0: ExitCode.STOPPED, 1: ExitCode.STOPPED}, launched.logs()


def test_a_silent_agent_ends_the_ranks(long_job: TrainSpec, tmp_path: Path) -> None:
    """The heartbeat stops, then vanishes; ranks live until the leash is over and no longer."""
    heartbeat = tmp_path / "heartbeat"
    silent = threading.Event()

    def beat() -> None:
        while not silent.wait(0.2):
            (tmp_path / ".heartbeat").write_text(str(time.monotonic()))
            (tmp_path / ".heartbeat").replace(heartbeat)

    agent = threading.Thread(target=beat)
    agent.start()
    try:
        contract = a_contract(tmp_path / "run", a_plan(long_job, "ddp", 2, 8), long_job, leash_s=3.0)
        launched = start(contract, {ENV_HEARTBEAT: str(heartbeat)})
        launched.wait_for('"step":3')
    finally:
        silent.set()
        agent.join()
    silent_since = time.time()
    heartbeat.unlink()
    ended = launched.wait()
    assert ExitCode.LEASH_EXPIRED in codes(ended).values(), launched.logs()
    # The first to go takes the other's connections with it: its crash is an echo.
    first = min(ended.values(), key=lambda exit_: exit_.time)
    assert first.code == ExitCode.LEASH_EXPIRED
    assert 2.5 < first.time - silent_since < 6


def test_a_wrong_number_of_processes_is_refused(long_job: TrainSpec, tmp_path: Path) -> None:
    """The contract says three ranks, the launcher is told of two."""
    contract = a_contract(tmp_path, a_plan(long_job, "ddp", 3, 2), long_job)
    here = NodeShare(node="here", address="127.0.0.1", processes=2)
    launched = start(contract.model_copy(update={"nodes": (here,)}))
    ended = launched.wait()
    # The launcher ends the other rank as soon as one has ended, maybe before it could say anything.
    assert ended
    assert set(codes(ended).values()) == {ExitCode.CONTRACT_MISMATCH}, launched.logs()


def test_deepspeed_that_would_be_ddp_is_refused(long_job: TrainSpec, tmp_path: Path) -> None:
    launched = start(a_contract(tmp_path, a_plan(long_job, "zero2", 1, 8), long_job), {"ACCELERATE_USE_CPU": "true"})
    ended = launched.wait()
    assert codes(ended) == {0: ExitCode.CONTRACT_MISMATCH}, launched.logs()
    error = ended[0].error
    assert error is not None
    assert "plain DDP" in error.message


def test_a_plan_that_is_not_the_global_batch_is_refused(long_job: TrainSpec, tmp_path: Path) -> None:
    plan = a_plan(long_job, "single", 1, 8, gradient_accumulation_steps=3)
    ended = start(a_contract(tmp_path, plan, long_job)).wait()
    assert codes(ended) == {0: ExitCode.CONTRACT_MISMATCH}


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"data": {"text_column": "txt"}}, ExitCode.DATA_ERROR, "data.text_column"),
        ({"model": {"name_or_path": "/nowhere"}}, ExitCode.USER_ERROR, "model.name_or_path"),
        ({"train": {"precision": "fp16"}}, ExitCode.USER_ERROR, "train.precision"),
        ({"train": {"learning_rate": 1e30, "max_grad_norm": None}}, ExitCode.USER_ERROR, "train.learning_rate"),
    ],
)
def test_a_fault_of_the_job_is_told_with_its_field(
    long_job: TrainSpec, tmp_path: Path, change: dict[str, dict[str, object]], code: ExitCode, field: str
) -> None:
    [(section, keys)] = change.items()
    spec = long_job.model_copy(update={section: getattr(long_job, section).model_copy(update=keys)})
    launched = start(a_contract(tmp_path, a_plan(spec, "single", 1, 16), spec))
    ended = launched.wait()
    assert codes(ended) == {0: code}, launched.logs()
    error = ended[0].error
    assert error is not None
    assert error.field == field
    assert error.hint
    assert error.traceback


SCRIPT = """
import json, os, sys, time
from pathlib import Path
rank = os.environ["RANK"]
out = Path(os.environ["TUNEYARD_OUTPUT_DIR"]); out.mkdir(parents=True, exist_ok=True)
names = ["TUNEYARD_CHECKPOINT_DIR", "TUNEYARD_OUTPUT_DIR", "TUNEYARD_STOP_FILE", "TUNEYARD_PROGRESS_FILE"]
(out / f"{rank}.json").write_text(json.dumps({**{n: os.environ[n] for n in names}, "cwd": os.getcwd(),
    "world": os.environ["WORLD_SIZE"], "pid": os.getpid()}))
with open(os.environ["TUNEYARD_PROGRESS_FILE"], "a") as progress:
    progress.write('{"time": 0, "phase": "train", "step": 3}\\n')
print("hello from", rank, flush=True)
if sys.argv[1] == "fail" and rank == "1":
    sys.exit(7)
while sys.argv[1] == "wait" and not os.path.exists(os.environ["TUNEYARD_STOP_FILE"]):
    time.sleep(0.05)
"""


def command(tmp_path: Path, how: str, world_size: int = 2, **changes: object) -> Launched:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    spec = a_spec(tmp_path, tmp_path)
    contract = a_contract(
        tmp_path / "run",
        a_plan(spec, "ddp", world_size, 8),
        command=(sys.executable, str(script), how),
        working_dir=str(tmp_path),
        **changes,
    )
    return start(contract)


def test_a_command_runs_on_every_rank_with_its_environment(tmp_path: Path) -> None:
    launched = command(tmp_path, "go")
    assert codes(launched.wait()) == {0: ExitCode.DONE, 1: ExitCode.DONE}, launched.logs()
    for rank in (0, 1):
        seen = json.loads((tmp_path / "run" / "model" / f"{rank}.json").read_text())
        assert seen["TUNEYARD_PROGRESS_FILE"] == str(launched.files.progress(rank))
        assert seen["TUNEYARD_STOP_FILE"] == str(launched.files.stop)
        assert seen["TUNEYARD_CHECKPOINT_DIR"] == launched.contract.checkpoint_dir
        assert (seen["cwd"], seen["world"]) == (str(tmp_path), "2")
        assert f"hello from {rank}" in launched.files.log(rank).read_text()


def test_a_command_that_fails_says_how(tmp_path: Path) -> None:
    ended = command(tmp_path, "fail").wait()
    assert ended[1].code == ExitCode.CRASH
    assert ended[1].error is not None
    assert "ended with status 7" in ended[1].error.message


def test_a_command_sees_the_stop_message(tmp_path: Path) -> None:
    launched = command(tmp_path, "wait")
    launched.wait_for('"step": 3')
    launched.files.stop.write_text(StopRequest(reason="test", deadline=time.time() + 60).model_dump_json())
    assert codes(launched.wait()) == {0: ExitCode.STOPPED, 1: ExitCode.STOPPED}, launched.logs()


def test_a_command_dies_with_its_rank(tmp_path: Path) -> None:
    launched = command(tmp_path, "wait")
    launched.wait_for('"step": 3')
    child = json.loads((tmp_path / "run" / "model" / "0.json").read_text())["pid"]
    os.kill(json.loads(launched.files.process(0).read_text())["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the command outlived its rank"
        time.sleep(0.05)
    launched.wait()


def test_a_command_that_is_not_there_is_the_users_error(tmp_path: Path) -> None:
    spec = a_spec(tmp_path, tmp_path)
    contract = a_contract(tmp_path, a_plan(spec, "single", 1, 8), command=("no-such-program",))
    ended = start(contract).wait()
    assert codes(ended) == {0: ExitCode.USER_ERROR}
