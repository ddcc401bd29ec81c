"""A real Slurm of two nodes: jobs are handed over to it, and end as they would on a yard."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.attempt import ENV_RUN_ID, AttemptFiles
from launch.contract import RankExit
from orchestrator.execute.processes import carrying
from orchestrator.yard.joined import ENV_NODE
from orchestrator.yard.record import ENV_YARD
from tests.docs import Reader
from tests.slurm import Slurm, a_slurm, why_not
from tests.worlds import write_bert, write_messages
from tests.yards import Yard
from tests.yards import until as until_soon

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.timeout(900),
]
STEPS = 100

# A rank that neither listens to SIGTERM nor looks for its stop file.
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
)


until = partial(until_soon, seconds=600)
"""On a loaded machine everything takes long."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with a_slurm() as slurm:
        yield slurm


class Home(Yard):
    """A home whose jobs go to Slurm."""

    def __init__(self, home: Path, slurm: Slurm, **settings: str) -> None:
        super().__init__(home, **settings)
        self.slurm = slurm
        self.env["SLURM_CONF"] = str(slurm.conf)

    def hand_over(self, path: Path, *more: str) -> str:
        """The id of a job that Slurm has."""
        job: str = self.json("submit", "--to", "slurm", str(path), *more)["job"]
        return job

    def wait(self, job: str) -> Any:
        """What came of it."""
        done = self.run("wait", job, "-q", "-o", "json", check=False, timeout=800)
        return json.loads(done.stdout)

    def folder(self, job: str) -> Path:
        slurm_id, _, index = job.removeprefix("slurm:").partition("_")
        handed = json.loads((self.home / "slurm" / f"{slurm_id}.json").read_text())
        return self.home / "jobs" / str(handed["job_ids"][int(index or 0)])

    def files_of(self, job: str, attempt: int = 1) -> AttemptFiles:
        return AttemptFiles(self.folder(job) / f"attempt-{attempt}")

    def step(self, job: str, attempt: int = 1) -> int:
        """The last step that rank 0 told of."""
        return max(curve(self.files_of(job, attempt).progress(0)), default=0)

    def state(self, job: str) -> Any:
        return self.json("describe", job)["state"]

    def restarts(self, job: str) -> int:
        told = self.slurm.run("scontrol", "--oneliner", "show", "job", job.removeprefix("slurm:"))
        match = re.search(r"Restarts=(\d+)", told)
        assert match is not None
        return int(match[1])

    def processes(self, job: str) -> list[int]:
        """Pids of all ranks of all attempts that are alive, wherever they moved."""
        name = self.folder(job).name
        return [one.pid for attempt in range(1, 6) for one in carrying(ENV_RUN_ID, f"{name}.{attempt}")]


@pytest.fixture
def home(tmp_path: Path, slurm: Slurm) -> Home:
    return Home(tmp_path, slurm, leash="5", leash_margin="1")


def curve(path: Path) -> dict[int, float]:
    """The loss of each step that rank 0 took."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["step"]: line["loss"] for line in lines if line["phase"] == "train" and line.get("loss") is not None}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job file: two processes, ZeRO-2."""
    folder = tmp_path_factory.mktemp("world")
    job = {
        "name": "small",
        "model": {
            "name_or_path": str(write_bert(folder / "bert")), "task": "sequence-classification", "dropout": 0.0,
        },
        "data": {"train": str(write_messages(folder / "data.tsv")), "split": {"test": 0.2}, "max_length": 32},
        "train": {"max_steps": STEPS, "global_batch_size": 16, "learning_rate": 1e-3},
        "strategy": "zero2",
        "resources": {"num_processes": 2},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(json.dumps(job))
    return path


@pytest.fixture(scope="module")
def on_a_yard(training: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[str, float]]:
    """Losses by step and metrics of that job where no Slurm is."""
    yard = Yard(tmp_path_factory.mktemp("yard"))
    result = yard.json("run", "-q", str(training))
    (progress,) = yard.home.glob("runs/*/jobs/*/attempt-1/rank-0/progress.jsonl")
    losses = curve(progress)
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses, result["metrics"]


def test_two_nodes_train_as_a_yard_does(home: Home, training: Path, on_a_yard: Any) -> None:
    losses, metrics = on_a_yard
    job = home.hand_over(training, "--with", "nodes=2")
    result = home.wait(job)
    assert (result["state"], result["attempts"], result["engine"]) == ("succeeded", 1, "zero2")
    assert curve(home.files_of(job).progress(0)) == pytest.approx(losses, abs=1e-6)
    assert result["metrics"] == pytest.approx(metrics, abs=1e-6)
    told = home.json("describe", job)
    (attempt,) = told["attempts"]
    assert [(share["node"], share["processes"]) for share in attempt["nodes"]] == [("n1", 1), ("n2", 1)]
    assert (Path(result["output_dir"]) / "model.safetensors").exists()
    assert "checkpoint-committed" in {event["kind"] for event in told["events"]} or told["checkpoint"] is None
    assert home.run("logs", job, "--rank", "1").stdout
    assert home.processes(job) == []
    assert [one["id"] for one in home.json("ls", "--on", "slurm")] == [job]


def test_before_the_time_limit_it_saves_is_requeued_and_goes_on(home: Home, training: Path, on_a_yard: Any) -> None:
    losses, metrics = on_a_yard
    job = home.hand_over(training, "--with", "nodes=2")
    until(lambda: home.step(job) >= 3)
    # What `--signal=B:USR1@N` sends, and when it is the time limit's turn to send it, is a slow test.
    home.slurm.run("scancel", "--batch", "--signal=USR1", job.removeprefix("slurm:"))
    until(lambda: home.restarts(job) == 1)
    result = home.wait(job)
    assert (result["state"], result["attempts"]) == ("succeeded", 2)
    first, second = (curve(home.files_of(job, attempt).progress(0)) for attempt in (1, 2))
    assert 3 <= max(first) < STEPS
    assert min(second) == max(first) + 1  # no step is lost, none is taken twice
    assert first | second == pytest.approx(losses, abs=1e-6)
    assert result["metrics"] == pytest.approx(metrics, abs=1e-6)
    told = home.json("describe", job)
    assert told["failures"] == 0
    assert [attempt["outcome"] for attempt in told["attempts"]] == ["stopped", "succeeded"]
    sentences = [event["data"].get("reason", {}).get("sentence", "") for event in told["events"]]
    assert any(sentence.startswith("this run ends") for sentence in sentences)
    assert home.processes(job) == []


def test_scancel_leaves_no_process(home: Home) -> None:
    run = [sys.executable, "-c", STUBBORN]
    job = home.hand_over(home.job_file(name="stubborn", run=run, resources={"num_processes": 2}), "--with", "nodes=2")
    until(lambda: all(home.files_of(job).log(rank).exists() for rank in range(2)))
    until(lambda: len(home.processes(job)) >= 4)  # launchers, ranks
    home.slurm.run("scancel", job.removeprefix("slurm:"))
    until(lambda: not home.processes(job))
    until(lambda: home.state(job) == "cancelled")
    assert home.restarts(job) == 0
    assert home.wait(job)["state"] == "cancelled"
    assert home.json("cancel", job)["state"] == "cancelled"  # again: the same


def test_an_array_of_four(home: Home) -> None:
    script = home.home / "element.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "out = pathlib.Path(os.environ['TUNEYARD_OUTPUT_DIR']); out.mkdir(parents=True)\n"
        "(out / 'told').write_text(os.environ['TUNEYARD_ARRAY_INDEX'] + ' ' + sys.argv[1])\n"
        "sys.exit(sys.argv[1] == 'bad')\n"
    )
    run = [sys.executable, str(script), "x"]
    path = home.job_file(
        name="sweep", run=run, array={"run[2]": ["a", "b", "bad", "d"]}, array_at_once=2, retry={"max_restarts": 0}
    )
    handed = home.json("submit", "--to", "slurm", str(path))
    array = handed["array"]
    assert [job["job"] for job in handed["jobs"]] == [f"{array}_{index}" for index in range(4)]
    told = home.run("describe", array).stdout
    assert f"{array}_3" in told
    assert "%2" in (home.slurm.run("scontrol", "write", "batch_script", array.removeprefix("slurm:"), "-"))
    done = home.run("wait", array, "-q", "-o", "json", check=False)
    assert done.returncode == 1
    jobs = json.loads(done.stdout)["jobs"]
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded", "failed", "succeeded"]
    assert jobs[2]["error"]["exit_code"] == 1
    told_of = [(home.folder(job["job"]) / "model" / "told").read_text() for job in jobs]
    assert told_of == ["0 a", "1 b", "2 bad", "3 d"]
    refused = home.run("logs", array, check=False)
    assert (refused.returncode, f"{array}_0" in refused.stderr) == (4, True)


def test_why_it_waits_and_its_end_before_it_began(home: Home) -> None:
    path = home.job_file(name="idle", run=["true"])
    job = home.hand_over(path, "--with", "sbatch=--hold")
    told = home.json("describe", job)
    assert (told["state"], told["reason"]["code"]) == ("queued", "held")
    assert told["reason"]["remedy"] == f"`scontrol release {job.removeprefix('slurm:')}` lets it go on"
    assert home.json("cancel", job)["state"] == "cancelled"
    late = home.hand_over(path, "--with", "sbatch=[--begin=now+1hour]")
    assert home.json("describe", late)["reason"]["code"] == "backing-off"
    home.run("cancel", late, "--wait")
    refused = home.run("submit", "--to", "slurm", str(path), "--with", "sbatch=--licenses=none:1", check=False)
    assert refused.returncode == 2
    assert "error[slurm-refused]" in refused.stderr
    for wrong, code in (("partition=none", "no-partition"), ("nodes=3", "impossible-gang"), ("noeds=1", "unknown-key")):
        refused = home.run("submit", "--to", "slurm", str(path), "--with", wrong, check=False)
        assert (refused.returncode in (1, 2), f"error[{code}]" in refused.stderr) == (True, True), refused.stderr


def test_a_crash_is_tried_again_and_a_users_fault_is_not(home: Home) -> None:
    flaky = f"import os, sys; sys.exit(os.environ['{ENV_RUN_ID}'].endswith('.1'))"
    crashing = home.hand_over(home.job_file(name="flaky", run=[sys.executable, "-c", flaky], retry={"max_restarts": 1}))
    broken = home.hand_over(
        home.job_file(
            name="broken", run=[sys.executable, "-c", "import sys; sys.exit(75)"],
            retry={"max_restarts": 3, "rules": [{"exit_code": 75, "then": "fail"}]},
        )
    )  # fmt: skip
    again = home.wait(crashing)
    assert (again["state"], again["attempts"], home.restarts(crashing)) == ("succeeded", 2, 0)
    failed = home.wait(broken)
    assert (failed["state"], failed["attempts"], home.restarts(broken)) == ("failed", 1, 0)
    assert (
        f"tuneyard logs {broken} --rank 0" in failed["error"]["hint"] or "its output is in" in failed["error"]["hint"]
    )


def test_a_rendered_script_is_submitted_by_hand_once(home: Home) -> None:
    script = home.home / "job.sbatch"
    script.write_text(home.run("render", "slurm", str(home.job_file(name="hand", run=["true"]))).stdout)
    both = {home.slurm.run("sbatch", "--parsable", str(script)).strip() for _ in range(2)}

    def refused() -> set[str]:
        """Whichever begins later."""
        logs = {one: home.home / "slurm" / f"{one}.out" for one in both}
        return {one for one, log in logs.items() if log.exists() and "submitted-twice" in log.read_text()}

    (runs,) = both - until(refused)
    assert home.wait(f"slurm:{runs}")["state"] == "succeeded"
    assert len(refused()) == 1


def test_the_page_from_nothing_to_two_nodes(home: Home) -> None:
    job = home.job_file(name="page", run=["true"], resources={"num_processes": 2})
    reader = Reader("docs/slurm.md", {"/shared/me/tuneyard": str(home.home), "job.yaml": str(job)})
    env = {name: value for name, value in home.env.items() if name.startswith(("TUNEYARD_", "SLURM_"))}
    reader.by_lines("export TUNEYARD_HOME")
    reader.skips("export TUNEYARD_HOME", "it is in the environment")
    submitted = re.search(r"slurm:\d+", reader.types("tuneyard submit --to slurm", **env))
    assert submitted is not None
    reader.names["slurm:1234"] = submitted[0]
    assert submitted[0] in reader.types("tuneyard ls", **env)
    assert submitted[0] in reader.types("tuneyard describe", **env)
    reader.types("tuneyard logs", **env)
    reader.types("tuneyard wait", **env)
    assert [share["node"] for share in home.json("describe", submitted[0])["attempts"][0]["nodes"]] == ["n1", "n2"]
    reader.skips("tuneyard cancel", "it has ended; another test does that")
    reader.types("export TUNEYARD_OUTSIDE", **env)
    assert reader.left.pop().startswith("#!/bin/bash")  # a slow test's
    assert reader.left == []


# What takes minutes.


@pytest.mark.slow
def test_a_real_time_limit(home: Home, training: Path) -> None:
    trial = home.json("run", "-q", str(training), "--set", "train.max_steps=500")
    # Longer than the two minutes that it gets, and not by much, on any machine.
    steps = int(120 * trial["train"]["samples_per_s"] / 16)
    longer = ("--set", f"train.max_steps={steps}")
    whole = home.json("run", "-q", str(training), *longer)
    (progress,) = home.home.glob(f"runs/{whole['job']}/jobs/*/attempt-1/rank-0/progress.jsonl")
    undisturbed = curve(progress)
    limits = ("--with", "nodes=2", "--with", "time=2m", "--with", "warning=60s")
    job = home.hand_over(training, *longer, *limits)
    result = home.wait(job)
    assert result["state"] == "succeeded"
    assert result["attempts"] == home.restarts(job) + 1 >= 2
    told = home.json("describe", job)
    assert [attempt["outcome"] for attempt in told["attempts"][:-1]] == ["stopped"] * home.restarts(job)
    curves = [curve(home.files_of(job, attempt["number"]).progress(0)) for attempt in told["attempts"]]
    assert sum(map(len, curves)) == steps  # no step is lost, none is taken twice
    assert {step: loss for each in curves for step, loss in each.items()} == pytest.approx(undisturbed, abs=1e-5)
    assert home.processes(job) == []


@pytest.mark.slow
def test_a_node_that_fails(home: Home, training: Path, on_a_yard: Any) -> None:
    losses, metrics = on_a_yard
    often = ("--set", "checkpoint.every_steps=5", "--set", "retry.max_restarts=1")
    job = home.hand_over(training, *often, "--with", "nodes=2")
    until(lambda: home.step(job) >= 12)
    home.slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        until(lambda: home.restarts(job) == 1)
    finally:
        home.slurm.resume("n2")
    result = home.wait(job)
    assert (result["state"], result["attempts"]) == ("succeeded", 2)
    first, second = (curve(home.files_of(job, attempt).progress(0)) for attempt in (1, 2))
    assert 5 <= min(second) <= max(first) + 1
    assert {**first, **second} == pytest.approx(losses, abs=1e-6)
    assert result["metrics"] == pytest.approx(metrics, abs=1e-6)
    assert home.processes(job) == []


@pytest.mark.slow
def test_a_yard_in_an_allocation(slurm: Slurm) -> None:
    with tempfile.TemporaryDirectory(prefix="ty-", ignore_cleanup_errors=True) as folder:
        home = Home(Path(folder), slurm)
        script = home.home / "yard.sbatch"
        script.write_text(
            "#!/bin/bash\n"
            f"{sys.executable} -m orchestrator up --in-slurm && touch {home.home}/up\n"
            f"while [ ! -e {home.home}/over ]; do sleep 0.2; done\n"
            f"{sys.executable} -m orchestrator down --force\n"
        )
        first = allocated(home, script)
        assert {node["name"] for node in home.json("nodes")} == {"node-0", "n2"}
        assert {node["cpu_slots"] for node in home.json("nodes")} == {2}
        job = home.submit(home.ticker("wide", processes=4))
        until(lambda: all(home.ticks(job, rank=rank) for rank in range(4)))
        yard, nodes = home.record.id, sorted(home.home.glob("slurm-nodes/*/node.json"))
        node = json.loads(nodes[0].read_text())["id"]
        home.slurm.run("scancel", first)
        until(lambda: not (carrying(ENV_YARD, yard) or carrying(ENV_NODE, node) or home.left_of(job)))
        until(lambda: home.slurm.run("squeue", "--noheader").strip() == "")
        (home.home / "up").unlink()
        allocated(home, script)  # the next one goes on with what was running
        until(lambda: home.ticks(job, attempt=2))
        again = home.record.id
        home.run("cancel", job, "--wait")
        (home.home / "over").touch()
        until(lambda: home.slurm.run("squeue", "--noheader").strip() == "")
        assert carrying(ENV_YARD, again) == []


@pytest.mark.slow
def test_the_page_of_a_yard_in_an_allocation(slurm: Slurm) -> None:
    with tempfile.TemporaryDirectory(prefix="ty-", ignore_cleanup_errors=True) as folder:
        home = Home(Path(folder), slurm)
        job = home.job_file(name="sweep", run=["true"], resources={"num_processes": 4})
        here = {"--nodes=4": "--nodes=2", "=64 --gres=gpu:8": "=2", "8:00:00": "30", "sweep.yaml": str(job)}
        script = home.home / "yard.sbatch"
        script.write_text(Reader("docs/slurm.md", here).copies("#!/bin/bash"))
        binaries = f"{Path(sys.executable).parent}:{home.env['PATH']}"
        subprocess.run(
            ["sbatch", "--wait", str(script)], env=home.env | {"PATH": binaries}, cwd=home.home, check=True, timeout=600
        )
        (folder_of_job,) = home.home.glob("jobs/sweep-*")
        ends = [AttemptFiles(folder_of_job / "attempt-1").exit(rank) for rank in range(4)]
        assert [RankExit.model_validate_json(end.read_bytes()).code for end in ends] == [0] * 4


def allocated(home: Home, script: Path) -> str:
    """Slurm's id of an allocation of both nodes with a yard in it."""
    ask = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--chdir={home.home}")
    done = subprocess.run(
        ["sbatch", "--parsable", *ask, str(script)], env=home.env, capture_output=True, text=True, check=True
    )
    until((home.home / "up").exists)
    return done.stdout.strip()
