"""The account of a real training of two ranks: it is paused, one of them is killed, and every second is found again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.worlds import write_bert, write_messages
from tests.yards import a_yard, kill, until

STEPS = 700


@pytest.mark.slow
def test_a_training_that_is_paused_and_killed_is_accounted_for(tmp_path: Path) -> None:
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
            strategy="zero2",  # under ddp the rank that is left would save the last step
            resources={"num_processes": 2},
            checkpoint={"every_steps": 20},
        )
        job = yard.submit(path)

        def works_on(attempt: int) -> bool:
            """Whether an attempt has committed something, and done what no commit holds."""
            view = yard.describe(job)
            saved, last = view["checkpoint"], view["progress"]
            return bool(saved and saved["id"].endswith(f".attempt-{attempt}") and last and last["step"] > saved["step"])

        until(lambda: works_on(1))
        assert yard.json("pause", job, "--wait")["state"] == "paused"
        paused = yard.json("goodput", job)
        yard.json("resume", job)
        until(lambda: works_on(2))
        kill(yard.rank_pids(job, 2)[1])
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
        assert told["energy"] == {"gpu_kwh": None, "cpu_kwh": None, "measured": 0, "ended": 3}

        # A pause saves first, so nothing of it is lost, and nothing recovers from it.
        assert paused["seconds"]["paused"] > 0
        assert (paused["seconds"]["lost"], paused["seconds"]["recovering"]) == (0, 0)
        assert told["seconds"]["paused"] >= paused["seconds"]["paused"]
        first, second, third = told["attempts"]
        assert (first["ended"], third["ended"]) == ("paused", "succeeded")
        assert second["ended"].startswith("killed: ")
        assert [(one["from_step"], one["kept_step"]) for one in (first, second, third)] == [
            (0, None), (first["step"], third["from_step"]), (third["from_step"], None),
        ]  # fmt: skip
        assert first["step"] <= third["from_step"] < second["step"]
        assert (first["seconds"]["lost"], third["seconds"]["lost"]) == (0, 0)

        # What is lost is what the second did after the copy of the checkpoint from which the third went on.
        lines = [json.loads(line) for line in yard.files(job, 2).progress(0).read_text().splitlines()]
        saved_at = next(
            line["time"] for line in lines if line["phase"] == "save" and line["step"] == third["from_step"]
        )
        died_at = next(span["until"] for span in told["spans"] if span["attempt"] == 2 and span["seconds"].get("lost"))
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
        assert {path.read_bytes()[:4] for path in tmp_path.glob("*.png")} == {b"\x89PNG"}
