"""`tuneyard run` with a user's own command: one real process after another, from start to whatever end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.attempt import ENV_RUN_ID, AttemptFiles
from orchestrator.execute.processes import carrying, end_all
from tests.yards import Yard, until

ENDS = 'import os, sys; print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True); '


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path, cpu_slots="4")


def attempt_dirs(yard: Yard) -> list[Path]:
    return sorted((yard.home / "runs").glob("*/jobs/*/attempt-*"))


def run_ids(yard: Yard) -> list[str]:
    return [f"{path.parent.name}.{path.name.removeprefix('attempt-')}" for path in attempt_dirs(yard)]


def left(yard: Yard) -> list[psutil.Process]:
    return [process for run_id in run_ids(yard) for process in carrying(ENV_RUN_ID, run_id)]


def python_job(yard: Yard, code: str, **keys: Any) -> Path:
    return yard.job_file(name="job", run=[sys.executable, "-c", code], **keys)


def output(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON value on stdout."""
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_each_rank_is_told_who_it_is(yard: Yard) -> None:
    path = python_job(yard, ENDS, resources={"num_processes": 2})
    done = yard.run("run", str(path), "-o", "json", "-q")
    assert done.stderr == ""
    result = output(done)
    assert result["job"].startswith("job-")
    assert (result["state"], result["attempts"], result["world_size"]) == ("succeeded", 1, 2)
    assert result["reason"]["code"] == "done"
    assert "error" not in result
    (folder,) = attempt_dirs(yard)
    for rank in range(2):
        assert f"rank {rank} of 2\n" in AttemptFiles(folder).log(rank).read_text()
        assert json.loads(AttemptFiles(folder).exit(rank).read_bytes())["code"] == 0
    assert left(yard) == []


def test_the_first_rank_that_failed_is_told(yard: Yard) -> None:
    code = ENDS + "import time; time.sleep(1000) if os.environ['RANK'] == '0' else sys.exit(3)"
    path = python_job(yard, code, resources={"num_processes": 2}, retry={"max_restarts": 0})
    done = yard.run("run", str(path), "-o", "json", check=False)
    assert done.returncode == 1
    result = output(done)
    assert (result["state"], result["attempts"]) == ("failed", 1)
    error = result["error"]
    assert (error["rank"], error["code"], error["exit_code"]) == (1, "command-failed", 1)
    assert "ended with status 3" in error["message"]
    (folder,) = attempt_dirs(yard)
    assert str(AttemptFiles(folder).log(1)) in error["hint"]
    assert left(yard) == []


def test_a_crash_is_tried_again_and_counted(yard: Yard) -> None:
    code = ENDS + f"sys.exit(os.environ['{ENV_RUN_ID}'].endswith('.1'))"
    path = python_job(yard, code, retry={"max_restarts": 2})
    done = yard.run("run", str(path), "-o", "json")
    assert (output(done)["state"], output(done)["attempts"]) == ("succeeded", 2)
    assert "the next starts in 2 s" in done.stderr
    assert [folder.name for folder in attempt_dirs(yard)] == ["attempt-1", "attempt-2"]


def test_max_duration_stops_it(yard: Yard) -> None:
    path = yard.ticker("limited", processes=1, max_duration="1s")
    done = yard.run("run", str(path), "-o", "json", check=False)
    assert done.returncode == 1
    result = output(done)
    assert (result["state"], result["error"]["code"]) == ("failed", "max-duration")
    (folder,) = attempt_dirs(yard)
    assert json.loads(AttemptFiles(folder).exit(0).read_bytes())["code"] == 10  # it was asked, not killed
    assert left(yard) == []


@contextmanager
def running(yard: Yard, path: Path, ranks: int = 2) -> Iterator[subprocess.Popen[str]]:
    """`tuneyard run` with its ranks at work; whatever it leaves is ended by its run ids."""
    child = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(path), "-o", "json"],
        env=yard.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until(
            lambda: child.poll() is not None or len(list((yard.home / "runs").glob("*/jobs/*/model/ticks-*"))) == ranks
        )
        assert child.poll() is None, child.communicate()
        yield child
    finally:
        child.kill()
        child.communicate()
        for run_id in run_ids(yard):
            assert end_all(ENV_RUN_ID, run_id) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_asks_the_ranks_to_stop(yard: Yard, number: signal.Signals) -> None:
    with running(yard, yard.ticker("interrupted")) as child:
        child.send_signal(number)
        out, err = child.communicate(timeout=120)
        assert child.returncode == 5, (out, err)
        assert "Traceback" not in err
        assert "stopping at the next step" in err
        result = json.loads(out.splitlines()[-1])
        assert (result["state"], result["reason"]["code"]) == ("cancelled", "cancelled")
        (folder,) = attempt_dirs(yard)
        ends = [json.loads(AttemptFiles(folder).exit(rank).read_bytes()) for rank in range(2)]
        assert [end["code"] for end in ends] == [10, 10]
        assert left(yard) == []


def test_a_second_interrupt_ends_ranks_that_do_not_listen(yard: Yard) -> None:
    script = yard.home / "deaf.py"
    script.write_text(
        "import os, pathlib, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "out = pathlib.Path(os.environ['TUNEYARD_OUTPUT_DIR'])\nout.mkdir(parents=True, exist_ok=True)\n"
        "(out / f'ticks-{os.environ[\"RANK\"]}').touch()\ntime.sleep(1000)\n"
    )
    path = yard.job_file(name="deaf", run=[sys.executable, str(script)])
    with running(yard, path, ranks=1) as child:
        child.send_signal(signal.SIGINT)
        (folder,) = attempt_dirs(yard)
        until(lambda: AttemptFiles(folder).stop.exists())
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
        assert child.returncode == 5, (out, err)
        assert json.loads(out.splitlines()[-1])["state"] == "cancelled"
        assert left(yard) == []


def test_ranks_do_not_outlive_a_run_that_is_killed(yard: Yard) -> None:
    with running(yard, yard.ticker("orphaned")) as child:
        assert left(yard)
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: left(yard) == [], 60)


def test_runs_do_not_see_each_other(yard: Yard) -> None:
    path = python_job(yard, ENDS)
    jobs = {output(yard.run("run", str(path), "-o", "json"))["job"] for _ in range(2)}
    assert len(jobs) == 2
    assert {folder.name for folder in (yard.home / "runs").iterdir()} == jobs
