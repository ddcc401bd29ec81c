"""What a rank holds, by numbers that were worked out by hand: bytes in millions, so that they can be read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.contract import ExecutionPlan
from launch.engine_config import NEARBY_BYTES
from launch.footprint_record import Footprint, Line, Passes
from orchestrator.memory.estimate import (
    CUDA_CONTEXT,
    CUDA_PROCESS,
    EXPORTING,
    RESERVED,
    SETTLED,
    SETTLED_CODE,
    Side,
    predict,
)

M = 1_000_000
LONG = 10_000 * M
"""Activations beside which everything else is little."""


def a_footprint(activations: float = LONG, loss: float = 0.0, reducing: float = 30 * M, **changes: Any) -> Footprint:
    """40 million weights, all trained by AdamW, the largest layer a quarter of them; more than a bucket holds."""

    def line(more: float) -> Line:
        return Line(base=0, per_row=activations + more)

    passes = tuple(
        Passes(
            precision=precision, native=native, activation_checkpointing=False, loss="whole",
            at_loss=line(0), beside_gradients=line(loss), with_gradients=line(loss + 30 * M),
            while_reducing=line(loss + 3 * reducing), while_halving=line(loss + 5 * reducing),
        )
        for precision, native in (("fp32", False), ("bf16", False), ("bf16", True))
    )  # fmt: skip
    values = {"parameters": 40 * M, "trainable": 40 * M, "moments_bytes": 320 * M, "small": 1 * M, "largest": 10 * M}
    values |= {"runtime_bytes": 500 * M, "code_bytes": 150 * M}
    return Footprint(source="traced", length=8, passes=passes, **(values | changes))


def a_plan(engine: str, **changes: Any) -> ExecutionPlan:
    values = {"engine": engine, "world_size": 1 if engine == "single" else 4, "device": "cpu", "micro_batch_size": 1}
    return ExecutionPlan.model_validate(values | {"gradient_accumulation_steps": 1, "loss": "whole"} | changes)


def device(engine: str, footprint: Footprint | None = None, **changes: Any) -> Side:
    return predict(footprint or a_footprint(), a_plan(engine, **changes)).device


def millions(side: Side, *names: str) -> list[float]:
    return [side.breakdown.get(name, 0) / M for name in names]


STATE = [
    # engine, precision: weights, optimizer, gradients that are there all the time, buckets
    ("single", "fp32", [160, 320, 30, 0]),  # of the gradients, what is beside the activations at their peak
    ("single", "bf16", [160, 320, 30, 0]),  # autocast: the weights stay in fp32
    ("ddp", "fp32", [160, 320, 160, 0]),
    ("ddp", "bf16", [160, 320, 160, 0]),
    ("zero3", "fp32", [40 + 4, 80 + 40, 40, 80]),  # a quarter each; weights of 1 M stay whole; a bucket of 20 M
    ("zero3", "bf16", [20 + 2, 80 + 40, 20, 40]),  # 2 bytes a weight, the master in 4
]


@pytest.mark.parametrize(("engine", "precision", "expected"), STATE)
def test_state_of_plain_training_and_of_stage_3(engine: str, precision: str, expected: list[float]) -> None:
    side = device(engine, precision=precision)
    assert side.moment == ("reduce" if engine == "zero3" else "passes")
    assert millions(side, "weights", "optimizer", "gradients", "buckets") == expected


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_stages_1_and_2_divide_the_optimizer_and_reduce_by_buckets(engine: str, precision: str, width: int) -> None:
    """At its peak the backward pass holds the bucket, and of each gradient that was complete then a quarter."""
    side = device(engine, precision=precision)
    assert side.moment == "reduce"
    assert millions(side, "weights", "optimizer", "buckets") == [40 * width, 80 + 40, 20 * width]
    assert millions(side, "gradients") == [(150 - 90) * 2 / 4]
    assert millions(side, "activations") == [LONG / M + 90 - 20 * width]


def test_gradients_wait_for_the_last_micro_batch() -> None:
    """Whole, but for those that stage 2 has divided already."""
    found = a_footprint(activations=200 * M, loss=2000 * M, reducing=0)
    expected = {
        "single": ("later passes", 160),
        "ddp": ("passes", 160),
        "zero1": ("later passes", 160),
        "zero2": ("later passes", 40),
        "zero3": ("passes", 40),
    }
    for engine, (moment, bytes_) in expected.items():
        side = device(engine, found, gradient_accumulation_steps=2)
        assert side.moment == moment
        assert millions(side, "gradients") == [bytes_], engine
        assert millions(side, "activations", "loss") == [200, 2000]


def test_gradients_wait_for_rows_that_are_left() -> None:
    """Of seven rows, five come with no gradients there and two with all of them."""
    found, plan = a_footprint(activations=200 * M), a_plan("single", micro_batch_size=5, gradient_accumulation_steps=2)
    sides = {rows: predict(found, plan, rows=rows).device for rows in (6, 7, 10)}
    assert {rows: side.moment for rows, side in sides.items()} == {6: "passes", 7: "passes", 10: "later passes"}
    assert millions(sides[7], "activations", "gradients") == [5 * 200, 5 * 30]
    assert millions(sides[10], "activations", "gradients") == [5 * 200, 160]


STEP = [
    ("single", "fp32", 160 + 320, 160, 7),
    ("ddp", "fp32", 160 + 320 + 160, 0, 7),  # its buckets are there all the time
    ("zero1", "fp32", 160 + 120, 40, 40),  # the shard's gradients, laid end to end
    ("zero2", "bf16", 80 + 120, 20, 20 + 40),  # and in fp32
    ("zero3", "fp32", 44 + 120 + 40 + 80, 40, 40),
    ("zero3", "bf16", 22 + 120 + 20 + 40, 20, 40),
]


@pytest.mark.parametrize(("engine", "precision", "state", "gradients", "step"), STEP)
def test_without_activations_the_step_is_the_worst_or_the_export(
    engine: str, precision: str, state: int, gradients: int, step: int
) -> None:
    nothing = a_footprint(0, reducing=0, step_bytes=7 * M)
    at_step = state + gradients + step
    at_export = state + 160 + EXPORTING / M
    passes = [one for one in nothing.passes if one.precision == precision][-1]
    passes = passes.model_copy(update={"with_gradients": Line(base=0, per_row=0)})
    found = device(engine, nothing.model_copy(update={"passes": (passes,)}), precision=precision)
    assert found.peak_bytes / M == pytest.approx(max(at_step, at_export), abs=1)
    assert found.moment == ("step" if at_step > at_export else "export")


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_what_stage_3_gathers(where: str) -> None:
    """All weights, up to a billion, when the backward pass begins; while a bucket is reduced, those without its own."""
    found = {
        side.moment: millions(side, "gathered")
        for side in (device("zero3", a_footprint(reducing=bytes_), device=where) for bytes_ in (0, 30 * M))
    }
    assert found == {"passes": [4 * 40], "reduce": [4 * (40 - 20)]}
    large = a_footprint(reducing=0, parameters=2000 * M)
    assert millions(device("zero3", large, device=where, precision="bf16"), "gathered") == [2 * 1000]


def test_a_cpu_is_one_memory_of_which_the_process_has_its_part() -> None:
    told = predict(a_footprint(), a_plan("ddp"))
    assert told.peak_bytes == told.device.peak_bytes + told.host.peak_bytes
    expected = {"process": 350 * M, "code": 150 * M + SETTLED_CODE, "settled": SETTLED["ddp"]}
    assert told.host.breakdown == expected | {"checkpoint_buffer": 480 * M // 4}
    assert "context" not in told.device.breakdown
    zero = predict(a_footprint(), a_plan("zero2"), save_buffer=False).host.breakdown
    assert zero == expected | {"settled": SETTLED["zero"]}


def test_best_weights_are_kept_as_a_rank_holds_them() -> None:
    def kept(engine: str, precision: str = "fp32") -> float:
        told = predict(a_footprint(), a_plan(engine, precision=precision), keep_best=True)
        return told.host.breakdown["best_weights"] / M

    assert [kept("single"), kept("ddp"), kept("zero2"), kept("zero3")] == [160, 160, 160, 40]
    assert [kept("ddp", "bf16"), kept("zero1", "bf16"), kept("zero3", "bf16")] == [160, 80, 20]


def test_a_gpu_holds_its_context_and_what_its_allocator_keeps() -> None:
    tight, fast = (predict(a_footprint(), a_plan("ddp", device="cuda", allocator=which)) for which in ("tight", "fast"))
    for told, share in ((tight, RESERVED), (fast, 3 * RESERVED)):
        tensors = told.device.peak_bytes - told.device.breakdown["allocator"] - told.device.breakdown["context"]
        assert told.device.breakdown["context"] == CUDA_CONTEXT
        assert told.device.breakdown["allocator"] == pytest.approx(share * tensors, rel=1e-6)
        assert tensors == 160 * M + 320 * M + 160 * M + LONG
    assert (tight.host.moment, tight.device.moment) == ("export", "passes")
    loaded = predict(a_footprint(), a_plan("ddp", device="cuda"), save_buffer=False, local=4)
    assert loaded.host.breakdown == {"process": CUDA_PROCESS, "weights": 160 * M}
    assert loaded.host.moment == "load"


@pytest.mark.parametrize(
    ("engine", "world", "local", "each"),
    [("single", 1, 1, 480), ("ddp", 4, 1, 480), ("ddp", 4, 2, 240), ("zero1", 4, 2, 120), ("zero3", 4, 4, 120)],
)
def test_two_copies_in_memory_are_a_part_of_the_state_each(engine: str, world: int, local: int, each: float) -> None:
    plan = a_plan(engine, world_size=world)
    told = predict(a_footprint(), plan, memory_copies=True, local=local).host
    assert millions(told, "memory_copies") == [2 * each]
    assert "memory_copies" not in predict(a_footprint(), plan, local=local).host.breakdown
    best = predict(a_footprint(), plan, memory_copies=True, keep_best=True, local=local).host
    assert millions(best, "memory_copies") == [2 * each * 640 / 480]


@pytest.mark.parametrize(
    ("engine", "device", "local", "each"),
    [
        ("ddp", "cpu", 4, 4),
        ("ddp", "cpu", 2, 0),
        ("ddp", "cuda", 4, 0),
        ("zero2", "cpu", 4, 0),
        ("single", "cpu", 1, 0),
    ],
)
def test_ranks_on_one_host_see_what_they_average_gradients_in(engine: str, device: str, local: int, each: int) -> None:
    host = predict(a_footprint(), a_plan(engine, device=device), local=local).host
    assert host.breakdown.get("exchange", 0) == each * 2 * NEARBY_BYTES
    little = predict(a_footprint(trainable=1000), a_plan(engine, device=device), local=local).host
    assert little.breakdown.get("exchange", 0) == each * 2 * 4000


@pytest.mark.parametrize(("local", "precision", "width"), [(1, "fp32", 4), (4, "fp32", 4), (4, "bf16", 2)])
def test_one_rank_of_a_host_exports_from_its_gpu(local: int, precision: str, width: int) -> None:
    """Measured once, on an H200: 8.12 GB where this says 8.09."""
    plan = a_plan("zero3", device="cuda", precision=precision)
    host = predict(a_footprint(), plan, local=local).host
    assert host.moment == "export"
    assert host.breakdown == {
        "process": CUDA_PROCESS, "checkpoint_buffer": 120 * M, "export": round((width * 40 * M + EXPORTING) / local)
    }  # fmt: skip
    adapter = predict(a_footprint(trainable=4 * M), plan, local=local, adapter_alone=True).host
    assert adapter.breakdown.get("export", 0) <= round((width * 4 * M + EXPORTING) / local)


def test_offload_moves_to_the_host() -> None:
    def told(engine: str, offload: str, where: str = "cuda") -> Any:
        plan = a_plan(engine, device=where, offload=offload, precision="bf16")
        return predict(a_footprint(), plan, save_buffer=False)

    some = told("zero2", "optimizer")
    assert millions(some.device, "weights", "optimizer") == [80, 0]
    assert millions(some.host, "optimizer", "offload") == [120, 2 * 40 + 2 * 4 * 10]
    third = told("zero3", "optimizer")
    assert millions(third.device, "weights", "optimizer", "buckets") == [22, 0, 0]
    assert millions(third.host, "optimizer", "offload", "weights") == [120, 40, 0]
    everything = told("zero3", "all")
    assert millions(everything.device, "weights") == [2], "what is small stays"
    assert millions(everything.host, "weights") == [20]
    # On a CPU nothing moves, and the buffers are there all the same.
    here = told("zero2", "optimizer", "cpu")
    assert millions(here.device, "weights", "optimizer", "offload") == [80, 120, 160]


def test_an_adapter_divides_little() -> None:
    found = a_footprint(trainable=1 * M, moments_bytes=8 * M)
    assert millions(device("zero1", found), "weights", "optimizer", "buckets") == [160, 2 + 1, 4]
    assert millions(device("ddp", found), "weights", "optimizer", "gradients") == [160, 8, 4]


def test_what_nobody_traced_is_not_predicted() -> None:
    with pytest.raises(KeyError, match="checkpointing True"):
        predict(a_footprint(), a_plan("ddp", activation_checkpointing=True))


plans = st.builds(
    a_plan,
    st.sampled_from(["single", "ddp", "zero1", "zero2", "zero3"]),
    device=st.sampled_from(["cpu", "cuda"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    micro_batch_size=st.integers(1, 64),
    gradient_accumulation_steps=st.integers(1, 3),
    allocator=st.sampled_from(["fast", "tight"]),
    offload=st.sampled_from(["none", "optimizer"]),
)
footprints = st.builds(
    a_footprint,
    st.floats(0, 1e9),
    st.floats(0, 1e9),
    parameters=st.integers(40 * M, 10_000 * M),
    trainable=st.integers(1, 40 * M),
    step_bytes=st.integers(0, 100 * M),
)


@given(footprints, plans, st.booleans(), st.booleans())
def test_a_breakdown_adds_up(footprint: Footprint, plan: ExecutionPlan, buffer: bool, best: bool) -> None:
    told = predict(footprint, plan, save_buffer=buffer, keep_best=best)
    for side in (told.device, told.host):
        assert side.peak_bytes == sum(side.breakdown.values())
        assert all(size > 0 for size in side.breakdown.values())
    assert ("checkpoint_buffer" in told.host.breakdown) <= buffer
    assert ("best_weights" in told.host.breakdown) <= best


@given(footprints, plans, st.integers(1, 16))
def test_more_rows_never_take_less(footprint: Footprint, plan: ExecutionPlan, more: int) -> None:
    larger = plan.model_copy(update={"micro_batch_size": plan.micro_batch_size + more})
    few, many = predict(footprint, plan), predict(footprint, larger)
    assert few.device.peak_bytes <= many.device.peak_bytes + 9  # rounded by line
    assert few.host == many.host


@given(footprints, plans.filter(lambda plan: plan.engine != "single"), st.integers(1, 60))
def test_more_ranks_never_take_more(footprint: Footprint, plan: ExecutionPlan, more: int) -> None:
    wider = plan.model_copy(update={"world_size": plan.world_size + more})
    few, many = predict(footprint, plan), predict(footprint, wider)
    assert many.device.peak_bytes <= few.device.peak_bytes + 9
    assert many.host.peak_bytes <= few.host.peak_bytes + 9
    if plan.zero_stage:
        assert many.device.peak_bytes < few.device.peak_bytes
