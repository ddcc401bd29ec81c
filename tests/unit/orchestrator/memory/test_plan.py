"""From a job and a world size to a plan."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.memory.plan import MAX_MICRO_BATCH, plan
from tests.builders import a_command_job, a_training_job


@pytest.mark.parametrize(
    ("strategy", "world_size", "engine"),
    [
        ("auto", 1, "single"), ("auto", 2, "ddp"), ("ddp", 1, "single"), ("ddp", 4, "ddp"), ("single", 1, "single"),
        ("zero1", 1, "zero1"), ("zero2", 2, "zero2"), ("zero3", 2, "zero3"),
    ],
)  # fmt: skip
def test_engines(strategy: str, world_size: int, engine: str) -> None:
    job = a_training_job(1, strategy=strategy, offload="optimizer" if strategy.startswith("zero") else "none")
    chosen = plan(job, world_size, "cpu")
    assert (chosen.engine, chosen.world_size, chosen.device) == (engine, world_size, "cpu")
    assert chosen.offload == job.offload  # type: ignore[union-attr]


def test_offload_goes_where_auto_shards_nothing() -> None:
    assert plan(a_training_job(2, offload="optimizer"), 2, "cuda").offload == "none"


@pytest.mark.parametrize(
    ("wish", "bf16", "taken"), [("auto", True, "bf16"), ("auto", False, "fp32"), ("bf16", False, "bf16")]
)
def test_the_precision_is_the_jobs_or_the_hardwares(wish: str, bf16: bool, taken: str) -> None:
    job = a_training_job(1, train={"max_steps": 1, "precision": wish})
    assert plan(job, 1, "cpu", bf16=bf16).precision == taken


def test_a_command_has_no_batch() -> None:
    chosen = plan(a_command_job(2), 2, "cpu")
    assert (chosen.engine, chosen.micro_batch_size, chosen.gradient_accumulation_steps) == ("ddp", 1, 1)


@given(rows=st.integers(1, 4096), wanted=st.none() | st.integers(1, 512), data=st.data())
def test_the_gang_takes_the_whole_batch_in_as_few_passes_as_it_can(
    rows: int, wanted: int | None, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, min(rows, 64)))
    train = {"max_steps": 1, "global_batch_size": rows, "micro_batch_size": wanted, "precision": "bf16"}
    chosen = plan(a_training_job(world_size, train=train), world_size, "cuda")
    micro, passes = chosen.micro_batch_size, chosen.gradient_accumulation_steps
    assert micro * passes * world_size >= rows
    assert micro * (passes - 1) * world_size < rows  # one pass fewer would not do
    assert 1 <= micro <= (wanted or MAX_MICRO_BATCH)
    assert micro <= -(-rows // world_size)
    assert chosen.precision == "bf16"
