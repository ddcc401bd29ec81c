"""A rank that does not move is named, the stacks of all are read, and the job goes on. Real gangs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.job.lifecycle import JobState
from tests.builders import a_training_job
from tests.inhouse import carried_out
from tests.victims import ENV_VICTIM, Victim
from tests.worlds import write_bert, write_messages

STEPS = 8
CASES = [
    pytest.param(Victim(rank=1, step=6, how="stop"), "a signal has stopped its process", id="stopped"),
    pytest.param(Victim(rank=1, step=6, how="hang"), "the limit is 6 s", id="hangs"),
]


def a_job(folder: Path, steps: int = STEPS) -> Any:
    return a_training_job(
        2,
        strategy="ddp",
        model={"name_or_path": str(write_bert(folder / "bert")), "task": "sequence-classification"},
        data={"train": str(write_messages(folder / "messages.tsv")), "max_length": 32},
        # A rank that is stopped while it saves would take the checkpoint along.
        checkpoint={"every_steps": 3, "asynchronous": False},
        train={"max_steps": steps, "global_batch_size": 16, "learning_rate": 1e-3},
        retry={"hang_after": 6},
    )


@pytest.mark.parametrize(("victim", "why"), CASES)
def test_the_rank_that_keeps_the_others_waiting_is_named(tmp_path: Path, victim: Victim, why: str) -> None:
    ended = carried_out(tmp_path, a_job(tmp_path), **{ENV_VICTIM: json.dumps(asdict(victim))})
    assert ended.job.state == JobState.SUCCEEDED, ended.story()
    first, second = ended.attempts
    assert (first.outcome, second.outcome) == ("hung", "succeeded")
    assert ended.told("checkpoint-resumed")[0]["step"] == 3

    (error,) = ended.told("attempt-error")
    assert error["code"] == "hung"
    assert error["rank"] == 1
    assert error["message"].startswith("rank 1 (node ")
    assert "in step 6, in its forward part" in error["message"]
    assert why in error["message"]
    # All stacks were read: the culprit's is in the error, and tells the function that it is in.
    texts = [ended.files(1).stacks(rank).read_text() for rank in (0, 1)]
    if not all(texts):
        pytest.skip("one process may not look into another here (CAP_SYS_PTRACE)")
    assert "strike" in texts[1]
    assert "strike" in error["traceback"]
    assert "backward" in texts[0]


@pytest.mark.slow
def test_a_rank_that_all_others_wait_for_is_named(tmp_path: Path) -> None:
    victim = Victim(rank=1, step=2, how="slow")
    ended = carried_out(tmp_path, a_job(tmp_path, steps=40), **{ENV_VICTIM: json.dumps(asdict(victim))})
    assert [attempt.outcome for attempt in ended.attempts] == ["succeeded"], ended.story()
    told = ended.told("slow-rank")
    assert told[0]["rank"] == 1
    assert told[0]["by"] >= 1.5
    assert told[0]["sentence"].startswith("rank 1 (node ")
