"""A real training on a yard without Ray is paused, outlives the controller so, and goes on from where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_yard, kill, until

STEPS = 900
EVERY = 10


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with a_yard("--executor", "local", cpu_slots="4") as yard:
        yield yard


def notes(yard: Yard, job: str) -> list[Any]:
    """What rank 0 told of checkpoints in two attempts, read from its files."""
    lines = []
    for attempt in (1, 2):
        path = yard.files(job, attempt).progress(0)
        lines += [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["checkpoint"] for line in lines if "checkpoint" in line]


@contextmanager
def without_controller(yard: Yard) -> Iterator[None]:
    """The controller is killed, and after the context there is another."""
    controller = yard.record.controller
    assert controller is not None
    kill(controller.pid)
    until(lambda: not controller.alive)
    yield
    yard.run("up")
    assert yard.record.executor == "local", "the yard is what it was made as, whatever the default is"


def test_a_training_is_paused_and_resumed(yard: Yard, tmp_path: Path) -> None:
    path = yard.job_file(
        name="paused",
        model={"name_or_path": str(write_bert(tmp_path / "bert")), "task": "sequence-classification"},
        data={"train": str(write_messages(tmp_path / "data.tsv")), "split": {"test": 0.2}, "max_length": 32},
        train={"max_steps": STEPS, "global_batch_size": 16, "learning_rate": 1e-3},
        strategy="ddp",
        resources={"num_processes": 2},
        checkpoint={"every_steps": EVERY, "directory": "kept"},
        retry={"max_restarts": 0},
    )
    job = yard.submit(path)
    until(lambda: yard.describe(job)["checkpoint"])  # known while it runs
    with without_controller(yard):
        before = len(notes(yard, job))
        until(lambda: len(notes(yard, job)) > before + 1)  # told while nobody listens
    paused = yard.json("pause", job, "--wait")
    assert paused["state"] == "paused"
    assert paused["reason"]["remedy"] == f"tuneyard resume {job}"
    step = paused["checkpoint"]["step"]
    assert f"its last checkpoint is of step {step}" in paused["reason"]["sentence"]
    assert 0 < step < STEPS
    assert yard.left_of(job) == []

    # The store says the same as the yard, by the job's name as well.
    newest = next(row for row in yard.json("checkpoint", "ls", "paused") if row["state"] == "in lineage")
    assert newest["id"] == paused["checkpoint"]["id"] == f"step-{step}.attempt-1"
    assert paused["checkpoint"]["url"] == f"{yard.home}/kept/{job}/{newest['id']}"
    assert all(finding["good"] for finding in yard.json("checkpoint", "verify", job))
    assert f"last checkpoint: step {step}," in yard.run("describe", job).stdout

    with without_controller(yard):
        pass
    assert yard.describe(job)["state"] == "paused"

    yard.json("resume", job)
    result = yard.json("wait", job)
    assert (result["state"], result["attempts"]) == ("succeeded", 2)
    assert result["train"]["steps"] == STEPS

    told = yard.describe(job)
    assert told["failures"] == 0
    events = [event for event in told["events"] if event["kind"].startswith("checkpoint-")]
    heard = [(event["kind"], event["data"]["id"]) for event in events]
    assert heard == [(f"checkpoint-{note['outcome']}", note["id"]) for note in notes(yard, job)]
    resumed = [event for event in events if event["kind"] == "checkpoint-resumed"]
    assert [(event["attempt"], event["data"]["step"]) for event in resumed] == [(2, step)]


def test_a_paused_job_lets_the_yard_go_down_and_can_be_cancelled(yard: Yard) -> None:
    job = yard.submit(yard.ticker("parked"))
    until(lambda: yard.ticks(job))
    assert yard.json("pause", job, "--wait")["state"] == "paused"
    yard.run("down")
    yard.run("up", "--executor", "local")
    assert yard.describe(job)["state"] == "paused"
    assert yard.json("cancel", job, "--wait")["state"] == "cancelled"
    refused = yard.run("resume", job, "-o", "json", check=False)
    assert (refused.returncode, json.loads(refused.stdout)["errors"][0]["code"]) == (4, "already-ended")
    assert yard.left_of(job) == []
