"""The command line against a yard in this process: arrays, priorities, queues, and nodes that rest."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.status import of_jobs
from orchestrator.control.loop import Controller
from orchestrator.job.lifecycle import JobState
from tests.builders import a_command_job, a_node
from tests.served import TOKEN, a_controller, listening

Tuneyard = Callable[..., tuple[int, str, str]]
COMMAND = {"name": "job", "run": ["true"]}


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with a_controller(tmp_path / "yard") as controller, listening(controller) as url:
        monkeypatch.setattr(controller.executor, "nodes", lambda: [a_node("node-0"), a_node("node-1")])
        monkeypatch.setenv("TUNEYARD_URL", url)
        monkeypatch.setenv("TUNEYARD_TOKEN", TOKEN)
        yield controller


def job_file(folder: Path, **keys: Any) -> str:
    path = folder / "job.yaml"
    path.write_text(json.dumps(COMMAND | keys))
    return str(path)


def told(done: tuple[int, str, str], status: int = 0) -> Any:
    """What a verb printed as JSON."""
    assert done[0] == status, done
    return json.loads(done[1])


def refused(done: tuple[int, str, str], status: int) -> tuple[str, str | None]:
    """Code and field of the one error that a verb printed as JSON, which has a way out."""
    (error,) = told(done, status)["errors"]
    assert error["hint"]
    return error["code"], error["field"]


# Arrays.


def test_an_array_is_submitted_with_what_its_jobs_have(
    controller: Controller, tmp_path: Path, tuneyard: Tuneyard
) -> None:
    path = job_file(tmp_path, array={"env.A": ["x", "[/y]"], "resources.num_processes": [1, 2]}, array_at_once=3)
    status, out, _ = tuneyard("submit", path)
    rows = controller.store.jobs()
    assert status == 0
    assert out.splitlines() == [
        f"{row.id} queued  env.A={letter}  resources.num_processes={number}"
        for row, (letter, number) in zip(rows, [(a, n) for a in ("x", "[/y]") for n in (1, 2)], strict=True)
    ]
    assert [row.name for row in rows] == ["job-0", "job-1", "job-2", "job-3"]
    assert {row.array_at_once for row in rows} == {3}
    (array,) = {row.array_id for row in rows}
    assert array is not None
    assert array.startswith("job-")


def test_an_array_as_json_has_every_id(controller: Controller, tmp_path: Path, tuneyard: Tuneyard) -> None:
    data = told(tuneyard("submit", job_file(tmp_path), "--set", "array={env.A: [x, y]}", "-o", "json"))
    rows = controller.store.jobs()
    assert data["array"] == rows[0].array_id
    assert [(job["job"], job["state"], job["values"]) for job in data["jobs"]] == [
        (rows[0].id, "queued", {"env.A": "x"}), (rows[1].id, "queued", {"env.A": "y"}),
    ]  # fmt: skip


@pytest.mark.parametrize(("ends", "status"), [((JobState.SUCCEEDED, JobState.CANCELLED), 5), ((JobState.FAILED,), 1)])
def test_an_array_is_waited_for_to_the_end_of_all(
    controller: Controller, tmp_path: Path, tuneyard: Tuneyard, ends: tuple[JobState, ...], status: int
) -> None:
    def run() -> None:
        """End the jobs one after the other, as soon as they are there."""
        while len(rows := controller.store.jobs(live=True)) < len(ends):
            done.wait(0.05)
        for row, state in zip(rows, ends, strict=True):
            lease = controller.store.acquire_lease("test", 0.0, 60)
            assert lease is not None
            with controller.store.acting(lease) as write:
                if state == JobState.SUCCEEDED:
                    write.set_job(row.id, JobState.STARTING, row.reason, 1.0)
                write.set_job(row.id, state, row.reason, 1.0)

    done = threading.Event()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    data = told(tuneyard("submit", job_file(tmp_path, array=len(ends)), "--wait", "-q", "-o", "json"), status)
    thread.join(60)
    assert [job["state"] for job in data["jobs"]] == [state.value for state in ends]


def test_a_dry_run_of_an_array_tells_of_each(controller: Controller, tmp_path: Path, tuneyard: Tuneyard) -> None:
    path = job_file(tmp_path, array={"resources.num_processes": [1, 3]})
    plans = told(tuneyard("submit", path, "--dry-run", "-o", "json"))
    assert [plan["plan"]["world_size"] for plan in plans] == [1, 3]
    status, out, _ = tuneyard("submit", path, "--dry-run")
    assert (status, out.count("placement")) == (0, 2)
    assert "job-1  resources.num_processes=3" in out
    assert controller.store.jobs() == []


def test_an_array_that_cannot_be_is_refused_whole(controller: Controller, tmp_path: Path, tuneyard: Tuneyard) -> None:
    def submit(**keys: Any) -> tuple[int, str, str]:
        return tuneyard("submit", job_file(tmp_path, **keys), "-o", "json")

    assert refused(submit(array={"env.A": [1]}), 2) == ("wrong-type", "env.A")
    assert refused(submit(array={"run": [["true"], ["no-such-command"]]}), 2) == ("command-not-found", "run[0]")
    assert refused(submit(array={"resources.num_processes": [1, 64]}), 2) == (
        "impossible-gang", "resources.num_processes",
    )  # fmt: skip
    assert refused(submit(array=2, after=["none-such"]), 4) == ("not-found", "after")
    assert controller.store.jobs() == []


@pytest.mark.parametrize("verb", ["run", "plan", "data"])
def test_other_verbs_take_one_job(tmp_path: Path, tuneyard: Tuneyard, verb: str) -> None:
    done = tuneyard(verb, job_file(tmp_path, array=2), "-o", "json")
    assert refused(done, 2) == ("is-array", "array")
    assert "tuneyard submit" in done[2]


def test_the_worst_end_of_several_is_the_status() -> None:
    good, failed, cancelled = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED
    assert [of_jobs(ends) for ends in ([good], [good, cancelled], [cancelled, failed, good])] == [0, 5, 1]


# Priorities.


@pytest.mark.parametrize(("value", "found"), [("low", -100), ("high", 100), ("7", 7), ("-7", -7), ("+3", 3)])
def test_a_job_is_moved(controller: Controller, tuneyard: Tuneyard, value: str, found: int) -> None:
    controller.store.add_job("job-1", a_command_job(), 1.0)
    assert tuneyard("priority", "job-1", value) == (0, f"job-1 has priority {found}\n", "")
    assert told(tuneyard("priority", "job-1", value, "-o", "json"))["priority"] == found
    assert controller.store.job("job-1").priority == found


def test_what_cannot_be_moved(controller: Controller, tuneyard: Tuneyard) -> None:
    controller.store.add_job("job-1", a_command_job(), 1.0)
    for value, code in (("urgent", "unknown-value"), ("-x", "unknown-value"), ("5000", "out-of-range")):
        assert refused(tuneyard("priority", "job-1", value, "-o", "json"), 2) == (code, "priority")
    assert refused(tuneyard("priority", "none-such", "1", "-o", "json"), 4) == ("not-found", "job")
    controller.store.request_cancel("job-1", 2.0)
    controller.step()
    assert refused(tuneyard("priority", "job-1", "1", "-o", "json"), 4) == ("already-ended", None)


# Queues.


def test_queues_are_listed_set_and_forgotten(controller: Controller, tuneyard: Tuneyard) -> None:
    controller.store.add_job("job-1", a_command_job(queue="jobs"), 1.0)
    status, out, _ = tuneyard("queues", "set", "lab", "--weight", "2.5", "--guaranteed", "4", "--no-lendable")
    assert (status, out) == (0, "queue lab: weight 2.5, guaranteed 4, ceiling -, lendable no\n")
    assert told(tuneyard("queues", "set", "lab", "--ceiling", "8", "-o", "json"))["ceiling"] == 8
    status, out, _ = tuneyard("queues")
    heading, jobs, lab = (line.split() for line in out.splitlines())
    assert (status, heading[:2]) == (0, ["QUEUE", "WEIGHT"])
    assert jobs == ["jobs", "1", "-", "-", "yes", "0", "1", "0"]
    assert lab == ["lab", "2.5", "4", "8", "no", "0", "0", "0"]
    view = told(tuneyard("queues", "set", "lab", "--guaranteed", "none", "--lendable", "-o", "json"))
    assert (view["guaranteed"], view["ceiling"], view["lendable"], view["weight"]) == (None, 8, True, 2.5)
    assert [view["name"] for view in told(tuneyard("queues", "-o", "json"))] == ["jobs", "lab"]
    assert tuneyard("queues", "rm", "lab")[0] == 0
    assert controller.store.queues() == []
    status, _, err = tuneyard("queues", "rm", "lab")
    assert (status, "error[not-found]" in err, "field: queue" in err) == (4, True, True)


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        (["q"], "nothing-to-do", None),
        (["q", "--weight", "0"], "out-of-range", "weight"),
        (["q", "--guaranteed", "many"], "wrong-type", "guaranteed"),
        (["q", "--ceiling", "1.5"], "wrong-type", "ceiling"),
        (["q", "--ceiling", "-1"], "out-of-range", "ceiling"),
        (["q", "--guaranteed", "4", "--ceiling", "2"], "inconsistent", "guaranteed"),
        (["Bad", "--weight", "1"], "bad-name", "queue"),
        (["q", "--weight", "heavy"], "usage", None),
    ],
)
def test_a_share_that_cannot_be(
    controller: Controller, tuneyard: Tuneyard, arguments: list[str], code: str, field: str | None
) -> None:
    assert refused(tuneyard("queues", "set", *arguments, "-o", "json"), 2) == (code, field)
    assert controller.store.queues() == []


# Nodes.


@pytest.mark.usefixtures("controller")
def test_nodes_show_their_marks(tuneyard: Tuneyard) -> None:
    assert tuneyard("cordon", "node-0", "--reason", "a [new] disk") == (0, "node node-0 is cordoned\n", "")
    assert told(tuneyard("drain", "node-1", "-o", "json"))["mark"] == "drained"
    status, out, _ = tuneyard("nodes")
    heading, first, second = out.splitlines()
    assert (status, heading.split()[-1]) == (0, "MARK")
    assert first.endswith("cordoned: a [new] disk")
    assert second.split()[-1] == "drained"
    assert [node["mark"] for node in told(tuneyard("nodes", "-o", "json"))] == ["cordoned", "drained"]
    for node in ("node-0", "node-1"):
        assert tuneyard("uncordon", node) == (0, f"node {node} takes attempts again\n", "")
    assert [line.split()[-1] for line in tuneyard("nodes")[1].splitlines()] == ["MARK", "-", "-"]


def test_what_cannot_be_marked(controller: Controller, tuneyard: Tuneyard) -> None:
    for verb in ("cordon", "drain"):
        assert refused(tuneyard(verb, "node-2", "-o", "json"), 4) == ("not-found", "node")
        assert refused(tuneyard(verb, "node-0", "--reason", "x" * 501, "-o", "json"), 2) == ("out-of-range", "reason")
    status, _, err = tuneyard("uncordon", "node-0")
    assert (status, "error[not-marked]" in err, "hint:" in err) == (4, True, True)
    assert controller.store.node_marks() == []
