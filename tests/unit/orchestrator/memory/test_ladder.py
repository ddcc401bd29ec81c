"""The ladder: what is changed next, what is kept, and that it ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.contract import ExecutionPlan
from orchestrator.memory.ladder import (
    NOTHING,
    OF_PASSES,
    Relief,
    Rung,
    Trouble,
    climb,
    demands_no_more,
    difference,
    eased,
    limits_of,
    steps,
    would_help,
)
from orchestrator.memory.plan import plan
from tests.builders import a_command_job, a_training_job

MODEL = {"name_or_path": "org/model"}
CAUSAL = {**MODEL, "task": "causal-lm"}


def climbed(job: Any, world_size: int, device: Any, trouble: Trouble = Trouble()) -> list[tuple[Rung, ExecutionPlan]]:
    """Every rung to the top, with the plan that it leads to."""
    found, relief = [], NOTHING
    ran = plan(job, world_size, device)
    while (higher := climb(job, ran, relief, trouble)) is not None:
        relief, ran = higher, plan(job, world_size, device, higher)
        found.append((relief.taken[-1].rung, ran))
        assert len(found) < 40
    return found


def rungs(*arguments: Any) -> list[Rung]:
    return [rung for rung, _ in climbed(*arguments)]


BATCH_16 = {"max_steps": 1, "global_batch_size": 16}


def test_all_rungs_in_order_on_gpus() -> None:
    job = a_training_job(2, train=BATCH_16)
    assert rungs(job, 2, "cuda") == [
        Rung.ALLOCATOR, Rung.MICRO_BATCH, Rung.MICRO_BATCH, Rung.MICRO_BATCH, Rung.CHECKPOINTING,
        Rung.STAGE, Rung.STAGE, Rung.STAGE, Rung.OFFLOAD_OPTIMIZER, Rung.OFFLOAD_ALL,
    ]  # fmt: skip
    last = climbed(job, 2, "cuda")[-1][1]
    assert (last.engine, last.offload, last.micro_batch_size, last.allocator) == ("zero3", "all", 1, "tight")


def test_a_single_process_shards_nothing_but_needs_zero_to_offload() -> None:
    job = a_training_job(1, train={"max_steps": 1, "global_batch_size": 1})
    found = climbed(job, 1, "cuda")
    assert [rung for rung, _ in found] == [
        Rung.ALLOCATOR, Rung.CHECKPOINTING, Rung.OFFLOAD_OPTIMIZER, Rung.OFFLOAD_ALL,
    ]  # fmt: skip
    assert [(one.engine, one.offload) for _, one in found[-2:]] == [("zero2", "optimizer"), ("zero3", "all")]


def test_on_a_cpu_there_is_nowhere_to_offload_to() -> None:
    assert rungs(a_training_job(1, train={"max_steps": 1, "global_batch_size": 1}), 1, "cpu") == [
        Rung.ALLOCATOR, Rung.CHECKPOINTING,
    ]  # fmt: skip
    assert rungs(a_training_job(2, train=BATCH_16), 2, "cpu")[-1] == Rung.STAGE


def test_a_whole_loss_is_chunked_for_language_models_alone() -> None:
    for model, has_rung in ((CAUSAL, True), ({**MODEL, "task": "sequence-classification"}, False)):
        job = a_training_job(1, model=model, train={"max_steps": 1, "global_batch_size": 1})
        ran = plan(job, 1, "cpu").model_copy(update={"allocator": "tight", "loss": "whole"})
        relief = climb(job, ran, Relief(allocator="tight"))
        assert relief is not None
        assert (relief.taken[-1].rung == Rung.CHUNKED_LOSS) is has_rung


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"train": {**BATCH_16, "activation_checkpointing": False}}, {"activation_checkpointing": False}),
        ({"train": {**BATCH_16, "loss_mode": "whole"}, "model": CAUSAL}, {"loss": "whole"}),
        ({"train": BATCH_16, "offload": "none"}, {"offload": "none"}),
    ],
)
def test_what_the_file_says_is_kept(keys: dict[str, Any], kept: dict[str, Any]) -> None:
    job = a_training_job(2, **keys)
    for _, after in climbed(job, 2, "cuda"):
        assert {name: getattr(after, name) for name in kept} == kept
    assert "because the job file says it" in would_help(job, plan(job, 2, "cuda"))


def test_strategy_and_micro_batch_say_where_to_begin() -> None:
    job = a_training_job(2, strategy="zero2", train={**BATCH_16, "micro_batch_size": 8})
    found = climbed(job, 2, "cuda")
    assert found[1] == (Rung.MICRO_BATCH, found[1][1])
    assert (found[1][1].micro_batch_size, found[1][1].gradient_accumulation_steps) == (4, 2)
    assert [after.engine for rung, after in found if rung == Rung.STAGE] == ["zero3"]


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw-8bit", "lion-8bit"])
def test_what_needs_whole_weights_never_gets_zero(optimizer: str) -> None:
    job = a_training_job(2, train={**BATCH_16, "optimizer": optimizer})
    assert {after.engine for _, after in climbed(job, 2, "cuda")} == {"ddp"}
    assert "another optimizer" in would_help(job, plan(job, 2, "cuda"))


def test_what_is_offloaded_goes_where_the_file_says() -> None:
    """Which only ZeRO-3 can."""
    job = a_training_job(2, train=BATCH_16, strategy="zero2").model_copy(update={"offload_path": "/disk"})
    found = dict(climbed(job, 2, "cuda"))
    assert found[Rung.STAGE].offload_path is None
    for rung, offload in ((Rung.OFFLOAD_OPTIMIZER, "optimizer"), (Rung.OFFLOAD_ALL, "all")):
        assert (found[rung].engine, found[rung].offload, found[rung].offload_path) == ("zero3", offload, "/disk")
    job = a_training_job(2, train=BATCH_16, strategy="zero3", offload="optimizer", offload_path="/disk")
    assert (plan(job, 2, "cuda").offload_path, plan(job, 2, "cpu").offload_path) == ("/disk", "/disk")


def test_before_the_first_pass_passes_are_left_as_they_are() -> None:
    job = a_training_job(2, train=BATCH_16)
    assert not OF_PASSES & set(rungs(job, 2, "cuda", Trouble(loading=True)))


def test_a_gpus_host_is_helped_by_sharding_alone() -> None:
    job = a_training_job(2, train=BATCH_16)
    assert set(rungs(job, 2, "cuda", Trouble(host=True))) == {Rung.STAGE}
    assert Rung.MICRO_BATCH in rungs(job, 2, "cpu", Trouble(host=True))  # there it is one memory


def test_half_precision_would_help_who_ran_without() -> None:
    job = a_training_job(2, train={"max_steps": 1, "precision": "auto"})
    told = [would_help(job, plan(job, 2, "cpu", bf16=bf16)) for bf16 in (False, True)]
    assert ["precision: bf16" in one for one in told] == [True, False]


def test_a_command_is_left_as_it_is() -> None:
    job = a_command_job(2)
    assert rungs(job, 2, "cuda") == []
    assert "command" in would_help(job, plan(job, 2, "cuda"))


def test_a_difference_is_told_in_words() -> None:
    job = a_training_job(2, train=BATCH_16)
    before = plan(job, 2, "cpu")
    after = eased(job, before, Relief(max_micro_batch=3, activation_checkpointing=True, min_stage=1))
    assert difference(before, after) == (
        "engine ddp → zero1, micro-batch 8 → 3, accumulation 1 → 3, activation checkpointing off → on"
    )
    assert [taken.rung for taken in steps(before, after)] == [Rung.MICRO_BATCH, Rung.CHECKPOINTING, Rung.STAGE]
    assert difference(before, before) == ""


JOBS = st.builds(
    lambda rows, micro, optimizer, strategy, offload, checkpointing, task, loss: a_training_job(
        2 if strategy != "single" and rows > 1 else 1,
        strategy=strategy if rows > 1 or strategy != "ddp" else "auto",
        model={**MODEL, "task": task},
        offload=offload if strategy.startswith("zero") or offload is None else None,
        train={
            "max_steps": 1, "global_batch_size": rows, "micro_batch_size": micro, "optimizer": optimizer,
            "activation_checkpointing": checkpointing, "loss_mode": loss,
        },
    ),
    st.integers(1, 300),
    st.none() | st.integers(1, 64),
    st.sampled_from(["adamw", "lion"]),
    st.sampled_from(["auto", "single", "ddp", "zero1", "zero2", "zero3"]),
    st.sampled_from([None, "none", "optimizer"]),
    st.none() | st.booleans(),
    st.sampled_from(["causal-lm", "sequence-classification"]),
    st.none() | st.just("whole"),
)  # fmt: skip


@given(job=JOBS, device=st.sampled_from(["cpu", "cuda"]), loading=st.booleans(), other=st.integers(1, 8))
def test_the_ladder_ends_and_every_rung_takes_less_at_the_same_global_batch(
    job: Any, device: Any, loading: bool, other: int
) -> None:
    low, _ = job.resources.bounds
    rows = job.train.global_batch_size
    before = plan(job, low, device)
    for _, after in climbed(job, low, device, Trouble(loading=loading)):
        assert after != before
        assert demands_no_more(after, before)
        passes = after.gradient_accumulation_steps
        assert after.micro_batch_size * passes * low >= rows > after.micro_batch_size * (passes - 1) * low
        assert after.precision == before.precision
        before = after
    # What was given up is given up on another number of ranks, too.
    assert plan(job, low, device, limits_of(before)) == before
    if other <= rows and job.strategy != "single":
        assert plan(job, other, device, limits_of(before)).micro_batch_size <= before.micro_batch_size
