"""Ranks are killed, and the next attempt goes on from the last step: from copies in memory, or from what a rank that
was not killed has left. Real gangs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoint import copies
from orchestrator.job.lifecycle import JobState
from tests.builders import a_training_job
from tests.inhouse import Ended, carried_out
from tests.victims import ENV_VICTIM, Victim
from tests.worlds import write_bert, write_messages

STEPS, EVERY = 12, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_messages(world / "messages.tsv", rows=147)
    return world


def run(world: Path, folder: Path, engine: str, dropout: float, victim: Victim | None, **options: Any) -> Ended:
    """The job in which `victim` is killed; `options` are of its checkpoint section, or `nodes`."""
    nodes = options.pop("nodes", 1)
    job = a_training_job(
        2,
        strategy=engine,
        model={"name_or_path": str(world / "bert"), "task": "sequence-classification", "dropout": dropout},
        data={"train": str(world / "messages.tsv"), "split": {"test": 0.2}, "max_length": 32},
        checkpoint={"every_steps": EVERY, **options},
        train={
            "max_steps": STEPS, "global_batch_size": 16, "learning_rate": 1e-3, "log_samples": True, "eval_every": 4,
            "keep_best": True,
        },
    )  # fmt: skip
    environment = {ENV_VICTIM: json.dumps(asdict(victim))} if victim is not None else {}
    ended = carried_out(folder, job, nodes=nodes, patience_s=300, **environment)
    assert ended.job.state == JobState.SUCCEEDED, ended.story()
    return ended


def model(ended: Ended) -> bytes:
    return (Path(ended.attempts[-1].run.output_dir) / "model.safetensors").read_bytes()


def begun(ended: Ended, attempt: int) -> list[int]:
    """The steps that an attempt's rank 0 has begun."""
    return [json.loads(line)["step"] for line in ended.files(attempt).samples(0).read_text().splitlines()]


def check_one_step_lost(ended: Ended, step: int, attempts: int = 2) -> None:
    """Step `step` was begun by each attempt, and no other one twice; nothing of the copies is left."""
    assert [begun(ended, attempt)[0] for attempt in range(1, attempts + 1)] == [1, *[step] * (attempts - 1)]
    assert [begun(ended, attempt)[-1] for attempt in range(1, attempts)] == [step] * (attempts - 1)
    resumed = ended.told("checkpoint-resumed")
    assert [(note["step"], note.get("source")) for note in resumed] == [
        (step - 1, "memory" if number == 0 else None) for number in range(attempts - 1)
    ]
    url = ended.attempts[0].run.checkpoint_dir
    assert not copies.home(url).exists()
    assert not (Path(url) / copies.AREA).exists()


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """The same job, of which no rank is killed."""

    @functools.cache
    def whole(engine: str, dropout: float, nodes: int = 1) -> Ended:
        return run(world, tmp_path_factory.mktemp("whole"), engine, dropout, None, nodes=nodes)

    return whole


CASES = [
    pytest.param("ddp", Victim(rank=1, step=9, how="kill"), 1, id="ddp"),
    pytest.param("zero2", Victim(rank=0, step=9, how="kill"), 1, id="zero2"),
    pytest.param("zero3", Victim(rank=1, step=9, how="kill"), 1, id="zero3"),
    pytest.param("zero2", Victim(rank=1, step=9, how="kill"), 2, id="two-nodes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "victim", "nodes"), CASES)
def test_a_killed_rank_costs_one_step(
    world: Path, tmp_path: Path, undisturbed: Callable[..., Ended], engine: str, victim: Victim, nodes: int
) -> None:
    """With dropout, evaluations before and after, and the weights of the best: all as if nobody had been killed."""
    ended = run(world, tmp_path, engine, 0.2, victim, nodes=nodes, memory_every_steps=1)
    check_one_step_lost(ended, 9)
    whole = undisturbed(engine, 0.2, nodes)
    assert ended.losses == whole.losses
    assert model(ended) == model(whole)


def test_a_copy_that_is_torn_is_not_used(world: Path, tmp_path: Path, undisturbed: Callable[..., Ended]) -> None:
    """Rank 1 is killed while it copies the state after step 8; rank 0 may have copied that. Both have step 7's."""
    victim = Victim(rank=1, step=8, where="copy", how="kill")
    ended = run(world, tmp_path, "zero2", 0.2, victim, memory_every_steps=1)
    assert ended.told("checkpoint-resumed")[0]["step"] == 7
    assert begun(ended, 2)[0] == 8
    assert model(ended) == model(undisturbed("zero2", 0.2))


LEFT = [
    pytest.param("forward", "kill", (1, 2), id="killed-twice"),
    pytest.param("backward", "kill", (1,), id="killed", marks=pytest.mark.slow),
    pytest.param("backward", "cpu", (1,), id="out-of-memory", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("where", "how", "attempts"), LEFT)
def test_under_ddp_a_rank_that_is_left_saves_the_last_step(
    world: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Ended],
    where: str,
    how: str,
    attempts: tuple[int, ...],
) -> None:
    """Without any copies in memory. The killed rank's random numbers are gone, so there is no dropout."""
    victim = Victim(rank=1, step=9, where=where, how=how, attempts=attempts)
    ended = run(world, tmp_path, "ddp", 0.0, victim)
    check_one_step_lost(ended, 9, attempts=len(attempts) + 1)
    if how == "kill":  # out of memory, it goes on with smaller micro-batches, which sum in another order
        whole = undisturbed("ddp", 0.0)
        assert ended.losses == whole.losses
        assert model(ended) == model(whole)
