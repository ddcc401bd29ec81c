"""The account of a real training of two ranks, one of which is killed: it goes on, and every second is found again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.worlds import write_bert, write_messages
from tests.yards import a_yard, kill, until

STEPS = 400


def test_a_training_that_is_killed_once_is_accounted_for(tmp_path: Path) -> None:
    prices = {"prices": '{"cpu": 3600}', "currency": "EUR"}
    with a_yard("--executor", "local", cpu_slots="4", **prices) as yard:
        path = yard.job_file(
            name="counted",
            model={"name_or_path": str(write_bert(tmp_path / "bert")), "task": "sequence-classification"},
            data={"train": str(write_messages(tmp_path / "data.tsv")), "split": {"test": 0.2}, "max_length": 32},
            train={
                "max_steps": STEPS,
                "global_batch_size": 16,
                "learning_rate": 1e-3,
                "eval_every": 50,
                "log_every": 1,
            },
            strategy="ddp",
            resources={"num_processes": 2},
            checkpoint={"every_steps": 20},
        )
        job = yard.submit(path)

        def works_on() -> bool:
            """Whether something was done that no commit holds."""
            view = yard.describe(job)
            return bool(view["checkpoint"] and view["progress"]["step"] > view["checkpoint"]["step"])

        until(works_on)
        kill(yard.rank_pids(job)[1])
        assert yard.json("wait", job)["state"] == "succeeded"
        told = yard.json("goodput", job)
        seconds, slots = told["seconds"], told["slot_seconds"]
        view = yard.describe(job)
        assert told["wall_s"] == pytest.approx(view["finished_at"] - view["submitted_at"], abs=1e-6)
        assert math.fsum(seconds.values()) == pytest.approx(told["wall_s"], abs=1e-6)
        assert math.fsum(slots.values()) == pytest.approx(view["served_s"], abs=1e-3)
        for category in ("training", "evaluating", "saving", "starting", "lost", "recovering", "exporting"):
            assert seconds[category] > 0, category
        assert 0 < told["goodput"] < told["useful"] < 1
        assert told["lost_to_failures_slot_s"] == pytest.approx(slots["lost"])
        assert told["cost"] == pytest.approx(math.fsum(slots.values()))  # 3600 an hour is one a second
        assert told["energy"] == {"gpu_kwh": None, "cpu_kwh": None, "measured": 0, "ended": 2}

        first, second = told["attempts"]
        assert first["ended"].startswith("killed: ")
        assert (second["ended"], second["seconds"]["lost"]) == ("succeeded", 0.0)
        # What is lost is what the first attempt did after the copy of the checkpoint from which the second went on.
        resumed = next(event for event in view["events"] if event["kind"] == "checkpoint-resumed")
        lines = [json.loads(line) for line in yard.files(job).progress(0).read_text().splitlines()]
        saved_at = next(
            line["time"] for line in lines if line["phase"] == "save" and line["step"] == resumed["data"]["step"]
        )
        died_at = next(span["until"] for span in told["spans"] if span["attempt"] == 1 and span["seconds"].get("lost"))
        assert seconds["lost"] == pytest.approx(died_at - saved_at, abs=0.05)

        cluster = yard.json("goodput", "--since", "1h", "--plot", str(tmp_path / "cluster.png"))
        (queue,) = cluster["queues"]
        assert (queue["queue"], queue["jobs"]) == ("default", 1)
        assert queue["seconds"]["training"] == pytest.approx(seconds["training"])
        assert cluster["since"] < cluster["known_since"] < view["submitted_at"]
        idle, offered = cluster["idle_slot_s"]["cpu"], cluster["offered_slot_s"]["cpu"]
        assert offered == pytest.approx(4 * (cluster["until"] - cluster["known_since"]))
        assert offered - idle == pytest.approx(math.fsum(slots.values()))
        assert math.fsum(s for one in cluster["bins"] for s in one["slot_seconds"].values()) == pytest.approx(
            offered - idle
        )
        table = yard.run("goodput", job, "--plot", str(tmp_path / "job.png")).stdout
        assert "recovering" in table
        print(table)
        print(yard.run("goodput").stdout)
        assert {path.read_bytes()[:4] for path in tmp_path.glob("*.png")} == {b"\x89PNG"}
