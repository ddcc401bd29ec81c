"""Running out of memory is a change of plan: what happens to real gangs of which one rank runs out, and to those that
run out of a real cgroup's memory. The rest is the yard's own: controller, database, node agent, ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launch.contract import ExitCode, ProgressLine, RankExit
from orchestrator.cli.describe import lines, story
from orchestrator.job.lifecycle import JobState, ReasonCode
from orchestrator.serve.views import attempt_view
from orchestrator.views import EventView
from tests.builders import a_training_job
from tests.inhouse import Ended, carried_out
from tests.victims import ENV_CGROUP, ENV_VICTIM, Victim
from tests.worlds import WORDS, write_bert, write_messages

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_messages(world / "messages.tsv")
    return world


def a_job(world: Path, processes: int = 2, strategy: str = "ddp", train: dict[str, Any] | None = None) -> Any:
    """In fp32 without dropout: whatever the plan, the same training but for rounding."""
    return a_training_job(
        processes,
        strategy=strategy,
        model={"name_or_path": str(world / "bert"), "task": "sequence-classification", "dropout": 0.0},
        data={"train": str(world / "messages.tsv"), "max_length": 32},
        checkpoint={"every_steps": 3},
        train={
            "max_steps": STEPS,
            "global_batch_size": 16,
            "learning_rate": 1e-3,
            "log_samples": True,
            **(train or {}),
        },
    )


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Ended]:
    """The same job with nothing in its way, by micro-batch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        micro: carried_out(folder / str(micro), a_job(world, train={"micro_batch_size": micro})) for micro in (8, 4)
    }


def exits(ended: Ended, attempt: int) -> list[RankExit]:
    ranks = range(ended.attempts[attempt - 1].plan.world_size)
    return [RankExit.model_validate_json(ended.files(attempt).exit(rank).read_bytes()) for rank in ranks]


def rows_of(ended: Ended, attempt: int) -> dict[int, list[int]]:
    """The rows that an attempt trained on, by step, over all ranks."""
    steps: dict[int, list[int]] = {}
    for rank in range(ended.attempts[attempt - 1].plan.world_size):
        for line in ended.files(attempt).samples(rank).read_text().splitlines():
            seen = json.loads(line)
            steps.setdefault(seen["step"], []).extend(seen["rows"])
    return {step: sorted(rows) for step, rows in steps.items()}


def losses_of(ended: Ended, attempt: int) -> dict[int, float]:
    """The losses that an attempt told of, by step."""
    told = [
        ProgressLine.model_validate_json(line) for line in ended.files(attempt).progress(0).read_text().splitlines()
    ]
    return {line.step: line.loss for line in told if line.loss is not None}


def told_by_describe(ended: Ended) -> str:
    events = [EventView.model_validate(event.model_dump()) for event in ended.events]
    attempts = [attempt_view(row) for row in ended.attempts]
    of_attempts = [story(before, one, events) for before, one in zip((None, *attempts), attempts, strict=False)]
    return "\n".join([*(line for told in of_attempts for line in told), *lines(events)])


CASES = [
    pytest.param("ddp", Victim(rank=1, step=6), [8, 8], id="ddp"),
    pytest.param("ddp", Victim(rank=1, step=6, attempts=(1, 2), where="backward", how="cpu"), [8, 8, 4], id="ddp-back"),
    pytest.param("zero2", Victim(rank=1, step=6, attempts=(1, 2), where="backward", how="host"), [8, 8, 4], id="zero2"),
]
CAUSES = {"cuda": "cuda-out-of-memory", "host": "host-out-of-memory", "cpu": "host-out-of-memory"}


@pytest.mark.parametrize(("strategy", "victim", "micros"), CASES)
def test_one_rank_that_runs_out_changes_the_plan_and_not_the_training(
    world: Path, tmp_path: Path, undisturbed: dict[int, Ended], strategy: str, victim: Victim, micros: list[int]
) -> None:
    started = time.monotonic()
    ended = carried_out(tmp_path, a_job(world, strategy=strategy), **{ENV_VICTIM: json.dumps(asdict(victim))})
    assert ended.job.state == JobState.SUCCEEDED, ended.story()
    assert time.monotonic() - started < 60, "somebody waited for somebody"
    plans = [attempt.plan for attempt in ended.attempts]
    last = len(plans)
    assert [attempt.outcome for attempt in ended.attempts] == ["out-of-memory"] * (last - 1) + ["succeeded"]
    assert ended.job.failures == 0, "it uses up no restart"

    # Rank by rank: the one that ran out says so, the other that it lost its peer.
    for number in range(1, last):
        mine, peer = exits(ended, number)[1], exits(ended, number)[0]
        assert (mine.code, mine.error and mine.error.code) == (ExitCode.OUT_OF_MEMORY, CAUSES[victim.how])
        assert peer.error is not None
        assert peer.error.echo, peer.error.message

    # The next rung each, the same global batch.
    assert [plan.micro_batch_size for plan in plans] == micros
    assert [plan.allocator for plan in plans] == ["fast"] + ["tight"] * (last - 1)
    assert all(2 * plan.micro_batch_size * plan.gradient_accumulation_steps == 16 for plan in plans)
    assert ended.job.relief is not None
    assert [taken.rung.value for taken in ended.job.relief.taken] == ["allocator", "micro-batch"][: last - 1]

    # The curve is that of the last plan from the start, with every step once.
    expected = undisturbed[micros[-1]]
    assert len(ended.losses) == STEPS
    assert ended.losses == pytest.approx(expected.losses, rel=1e-6)
    resumed = [event["step"] for event in ended.told("checkpoint-resumed")]
    saved = 5 if strategy == "ddp" else 3  # a rank that has the whole state saves that before it ends
    assert resumed == [saved] * (last - 1)
    assert list(losses_of(ended, last)) == list(range(saved + 1, STEPS + 1))

    # Steps up to what was saved were taken once; those after it again, on the same rows and with the same loss.
    rows = rows_of(expected, 1)
    for number in range(1, last + 1):
        assert rows_of(ended, number) == {step: rows[step] for step in rows_of(ended, number)}
        for step, loss in losses_of(ended, number).items():
            assert loss == pytest.approx(expected.losses[step - 1], rel=1e-6)

    told = told_by_describe(ended)
    assert f"other than before: {ended.job.relief.taken[0].sentence}, the rung allocator, because attempt 1 ran" in told
    assert "out-of-memory ran out of memory on rank 1" in told
    if last == 3:
        assert "micro-batch 8 → 4, accumulation 1 → 2" in told


def test_before_the_first_step_no_smaller_batch_is_tried(world: Path, tmp_path: Path) -> None:
    victim = Victim(rank=1, step=0, attempts=(1, 2, 3), where="load", how="cuda")
    ended = carried_out(tmp_path, a_job(world), **{ENV_VICTIM: json.dumps(asdict(victim))})
    assert ended.job.state == JobState.SUCCEEDED, ended.story()
    assert [attempt.plan.engine for attempt in ended.attempts] == ["ddp", "ddp", "zero1", "zero2"]
    assert {attempt.plan.micro_batch_size for attempt in ended.attempts} == {8}
    assert {event["phase"] for event in ended.told("out-of-memory")} == {"load"}


def test_what_no_rung_helps_fails_with_the_whole_story(world: Path, tmp_path: Path) -> None:
    """A single process on a CPU: nothing to shard over, nowhere to offload to."""
    victim = Victim(rank=0, step=1, attempts=tuple(range(1, 9)), how="host")
    fixed = {"activation_checkpointing": False, "global_batch_size": 2, "micro_batch_size": 2}
    ended = carried_out(tmp_path, a_job(world, 1, train=fixed), **{ENV_VICTIM: json.dumps(asdict(victim))})
    assert (ended.job.state, len(ended.attempts)) == (JobState.FAILED, 3)
    assert ended.job.error is not None
    assert ended.job.error["code"] == "does-not-fit"
    assert "allocator fast → tight; micro-batch 2 → 1, accumulation 1 → 2" in ended.job.error["message"]
    assert "remove `train.activation_checkpointing: false`" in ended.job.error["hint"]


def test_a_kill_that_was_nobodys_memory_is_a_kill(world: Path, tmp_path: Path) -> None:
    """Told after its peer's lost connection, and the cause all the same; no rung is taken for it."""
    victim = Victim(rank=1, step=5, how="kill")
    ended = carried_out(tmp_path, a_job(world), **{ENV_VICTIM: json.dumps(asdict(victim))})
    assert [attempt.outcome for attempt in ended.attempts] == ["killed", "succeeded"]
    assert [attempt.plan.allocator for attempt in ended.attempts] == ["fast", "fast"]
    assert (ended.job.failures, ended.job.relief) == (1, None)
    (error,) = ended.told("attempt-error")
    assert (error["rank"], error["signal"]) == (1, signal.SIGKILL)


def test_on_two_nodes_the_other_node_is_ended_too(world: Path, tmp_path: Path) -> None:
    victim = Victim(rank=1, step=4)
    ended = carried_out(tmp_path, a_job(world), nodes=2, **{ENV_VICTIM: json.dumps(asdict(victim))})
    assert [attempt.outcome for attempt in ended.attempts] == ["out-of-memory", "succeeded"], ended.story()
    assert [len(attempt.run.nodes) for attempt in ended.attempts] == [2, 2]


# In a real cgroup.

MIB = 1 << 20
LIMIT = 440 * MIB
BATCH = 256
"""Rows of a step, half of them on each rank."""


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Path]:
    """A cgroup of memory, version 1, below this process's own."""
    listed = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, kind, path in listed if kind == "memory"), None)
    if own is None:
        pytest.skip("there is no memory controller of cgroup version 1")
    group = Path("/sys/fs/cgroup/memory") / own.strip("/") / f"tuneyard-{os.getpid()}-{tmp_path.name[:20]}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError as problem:
        pytest.skip(f"a cgroup cannot be made here: {problem.strerror}")
    yield group
    deadline = time.monotonic() + 10
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    group.rmdir()


@pytest.fixture(scope="module")
def large_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short texts, and one batch of long ones, which is the fourth of the epoch: there a large micro-batch runs out."""
    world = tmp_path_factory.mktemp("large")
    write_bert(world / "bert", hidden=256, layers=3)
    draw = random.Random(0)
    sizes = ((5 * BATCH, 6), (BATCH, 60))
    texts = [" ".join(draw.choices(WORDS, k=words)) for rows, words in sizes for _ in range(rows)]
    table = ["text\tlabel", *(f"{text}\t{'ab'[number % 2]}" for number, text in enumerate(texts))]
    (world / "messages.tsv").write_text("\n".join(table) + "\n")
    return world


def a_large_job(world: Path, micro: int) -> Any:
    return a_training_job(
        2,
        strategy="ddp",
        model={"name_or_path": str(world / "bert"), "task": "sequence-classification", "dropout": 0.0},
        data={"train": str(world / "messages.tsv"), "max_length": 64},
        checkpoint={"every_steps": 2},
        train={"max_steps": 6, "global_batch_size": BATCH, "learning_rate": 1e-4, "micro_batch_size": micro},
    )


def test_a_job_that_exceeds_a_real_limit_ends_well_on_a_lower_rung_and_the_next_one_begins_there(
    large_world: Path, tmp_path: Path, cgroup: Path
) -> None:
    """The kernel kills the rank that holds the most; its peer only sees a connection go."""
    ended = carried_out(tmp_path, a_large_job(large_world, BATCH // 2), **{ENV_CGROUP: str(cgroup)})
    assert ended.job.state == JobState.SUCCEEDED, ended.story()
    plans = [attempt.plan for attempt in ended.attempts]
    assert len(plans) >= 3
    assert plans[-1].micro_batch_size < plans[0].micro_batch_size == BATCH // 2
    for event in ended.told("out-of-memory"):
        assert (event["cause"], event["limit_bytes"]) == ("cgroup-killed", LIMIT)
        assert "its cgroup allows 440 MiB" in event["message"]
        assert event["used_bytes"] > 0.9 * LIMIT
    assert all(event["step"] >= 2 for event in ended.told("checkpoint-resumed"))
    assert len(ended.told("checkpoint-resumed")) == len(plans) - 1

    whole = carried_out(tmp_path / "whole", a_large_job(large_world, plans[-1].micro_batch_size))
    assert len(whole.attempts) == 1
    assert ended.losses == pytest.approx(whole.losses, rel=1e-6)

    # Another job like it starts where that one ended.
    again = carried_out(tmp_path, a_large_job(large_world, BATCH // 2), name="job-2", **{ENV_CGROUP: str(cgroup)})
    assert [attempt.outcome for attempt in again.attempts] == ["succeeded"]
    assert again.attempts[0].plan == plans[-1]
    (told,) = again.told("remembered")
    assert "because job job-1 ran out of memory" in told["sentence"]
    assert told["sentence"] in told_by_describe(again)
    assert again.losses == pytest.approx(whole.losses, rel=1e-6)


def test_the_reason_while_it_waits_says_what_ran_out_and_what_is_next(world: Path, tmp_path: Path) -> None:
    victim = Victim(rank=1, step=2)
    ended = carried_out(tmp_path, a_job(world, train={"max_steps": 2}), **{ENV_VICTIM: json.dumps(asdict(victim))})
    (queued,) = ended.told("job-queued")
    assert queued["reason"]["code"] == ReasonCode.NEXT_RUNG
    assert queued["reason"]["sentence"].endswith("next: allocator fast → tight")
    assert queued["reason"]["remedy"]
