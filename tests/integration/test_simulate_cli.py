"""`tuneyard simulate`: from a trace to a table, to JSON and to a picture; and what it says of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli

FOUR = Path(__file__).parents[1] / "unit" / "orchestrator" / "simulate" / "four-jobs.csv"
CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The verb: exit status, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tuneyard", "simulate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return call


def told(done: tuple[int, str, str]) -> dict[str, Any]:
    status, out, err = done
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_one_policy_as_json(simulate: Run) -> None:
    found = told(simulate("--trace", FOUR, "--nodes", "1", "--gpus-per-node", "4", "--policy", "fifo", "-o", "json"))
    assert (found["policy"], found["avg_wait_s"], found["makespan_s"], found["jobs"]) == ("fifo", 110, 400, 4)
    assert found["conditions"]["preemption_cost_s"] == 60
    assert found["placement"] == "consolidate"
    assert found["eta_mape"] is None


def test_the_yard_foretells_its_starts(simulate: Run) -> None:
    common = ("--nodes", "1", "--generate", "jobs=80,load=1.5", "--seed", "3", "-o", "json")
    one, two = (told(simulate(*common)) for _ in range(2))
    assert one["policy"] == "yard"
    assert one["eta_asked"] > 10
    assert one["eta_mape"] > 0
    same = {"wall_s": 0, "cpu_s": 0}
    assert one | same == two | same
    assert told(simulate(*common, "--seed", "4"))["avg_jct_s"] != one["avg_jct_s"]


def test_several_policies_side_by_side_and_a_picture(simulate: Run, tmp_path: Path) -> None:
    picture = tmp_path / "four.png"
    common = ("--trace", FOUR, "--nodes", "1", "--gpus-per-node", "4", "--placement", "count", "--oracle")
    policies = ("--policy", "easy-strict", "--policy", "fifo", "--policy", "yard")
    status, out, _ = simulate(*common, *policies, "--plot", picture)
    assert status == 0
    lines = out.splitlines()
    assert "4 jobs of" in lines[0]
    assert lines[1].split() == ["EASY-STRICT", "FIFO", "YARD"]
    wait = next(line for line in lines if line.startswith("average wait"))
    assert wait.split() == ["average", "wait,", "s", "65", "110", "×1.69", "65", "×1.00"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = told(simulate(*common, *policies, "-o", "json"))
    assert {name: one["avg_wait_s"] for name, one in found["policies"].items()} == {
        "easy-strict": 65, "fifo": 110, "yard": 65,
    }  # fmt: skip


def test_a_cluster_file_failures_and_queues(simulate: Run, tmp_path: Path) -> None:
    queues = tmp_path / "queues.yaml"
    queues.write_text("queues:\n  t1: {weight: 3.0, guaranteed: 4}\n")
    arguments = (
        "--generate", "jobs=60,load=1.2,elastic=0.5", "--cluster", CLUSTERS / "h100-8.yaml", "--queues", queues,
        "--mtbf", "12h", "--repair", "20m", "--checkpoint-every", "10m", "--startup", "45s",
        "--set", "rules.patience_s=5",
    )  # fmt: skip
    found = told(simulate(*arguments, "-o", "json"))
    assert (found["gpus"], found["conditions"]["tenants_as_queues"]) == (8, True)
    assert found["failures"] > 0
    assert found["lost_to_startup_gpu_s"] > 0
    status, out, _ = simulate(*arguments)
    assert status == 0
    assert "nodes lost" in out
    assert "TENANT" in out


def test_a_public_trace_says_what_was_left_out(simulate: Run, tmp_path: Path) -> None:
    path = tmp_path / "cluster_job_log"
    attempt = {"start_time": "2017-10-07 01:12:00", "end_time": "2017-10-07 01:13:00", "detail": [{"gpus": ["gpu0"]}]}
    job = {"jobid": "a", "vc": "v", "submitted_time": "2017-10-07 01:11:00", "attempts": [attempt]}
    path.write_text(json.dumps([job, job | {"attempts": []}]))
    status, out, err = simulate("--trace", path, "--nodes", "1", "--format", "philly", "-o", "json")
    assert status == 0
    assert "left out: 1 jobs: never began" in err
    assert json.loads(out)["jobs"] == 1


FOUR_ON_ONE = ("--trace", str(FOUR), "--nodes", "1", "--gpus-per-node", "4")


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        (("--nodes", "1"), "which-jobs", "trace"),
        (("--trace", "x.csv", "--generate", "jobs=3", "--nodes", "1"), "which-jobs", "trace"),
        (("--trace", str(FOUR)), "which-cluster", "nodes"),
        ((*FOUR_ON_ONE, "--cluster", "x.yaml"), "which-cluster", "nodes"),
        (("--trace", "absent.csv", "--nodes", "1"), "file-not-found", None),
        (("--trace", str(FOUR), "--nodes", "1", "--gpus-per-node", "2"), "impossible-gang", "num_gpus"),
        (("--generate", "jbos=3", "--nodes", "1"), "bad-generate", "jbos"),
        ((*FOUR_ON_ONE, "--preemption-cost", "soon"), "wrong-type", "preemption-cost"),
        ((*FOUR_ON_ONE, "--mtbf", "0"), "wrong-type", "mtbf"),
        ((*FOUR_ON_ONE, "--set", "rules.patience=3"), "bad-override", "rules.patience"),
        ((*FOUR_ON_ONE, "--queues", "absent.yaml"), "file-not-found", None),
        ((*FOUR_ON_ONE, "--plot", "four.jpeg"), "bad-plot", "plot"),
        ((*FOUR_ON_ONE, "--plot", "no/such/four.png"), "bad-plot", "plot"),
        ((*FOUR_ON_ONE, "--format", "pai"), "bad-trace", None),
        ((*FOUR_ON_ONE, "--policy", "best"), "usage", None),
        (("--trace", str(FOUR), "--nodes", "0"), "usage", None),
    ],
)
def test_bad_input_has_a_code_and_a_way_out(
    simulate: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: str,
    field: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = simulate(*arguments, "-o", "json")
    assert status == 2
    error = json.loads(out)["errors"][0]
    assert (error["code"], error["field"]) == (code, field)
    assert error["hint"]
    assert err
    assert "Traceback" not in err


def test_what_can_never_start_ends_with_one_sentence(simulate: Run, tmp_path: Path) -> None:
    queues = tmp_path / "queues.yaml"
    queues.write_text("queues:\n  x: {ceiling: 1}\n")
    status, out, err = simulate(*FOUR_ON_ONE, "--queues", queues, "-o", "json")
    assert status == 1
    assert json.loads(out)["errors"][0]["code"] == "stuck"
    assert "queue x holds 0 of at most 1" in err


def test_failures_of_a_file(simulate: Run, tmp_path: Path) -> None:
    path = tmp_path / "failures.yaml"
    path.write_text("failures:\n  - {at_s: 50, node: 0, repair_s: 5}\n")
    common = ("--trace", FOUR, "--nodes", "1", "--gpus-per-node", "4", "--policy", "fifo", "--failures", path)
    found = told(simulate(*common, "-o", "json"))
    assert found["failures"] >= 1
    assert found["goodput"] < 1
    assert found["conditions"]["failures"] == [{"at_s": 50, "node": 0, "repair_s": 5}]
    path.write_text("failures:\n  - {at_s: 50, node: n7}\n")
    status, _, err = simulate(*common)
    assert status != 0
    assert "there is no node n7" in err
    assert "failures[0].node" in err
