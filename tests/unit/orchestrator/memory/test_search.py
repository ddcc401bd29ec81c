"""The search for a plan: what fits, what is fastest, and what would have to change."""

from __future__ import annotations

from typing import Any

import pytest

from launch.contract import ExecutionPlan
from launch.footprint_record import Footprint, Line, Passes
from launch.shape import ModelShape, shape_of_config
from orchestrator.cluster.gpus import GIB, gpu_type
from orchestrator.cluster.spec import NodeKind, with_gpus
from orchestrator.job.spec import TrainingJob
from orchestrator.memory.estimate import Predicted, Side
from orchestrator.memory.margin import Margin
from orchestrator.memory.nearest import nearest
from orchestrator.memory.plan import plan as first_plan
from orchestrator.memory.search import CPU_FAST, Choice, needed, placements, search, why_not
from orchestrator.memory.speed import step_time, traffic, work_of
from tests.builders import a_training_job

NO_MARGIN = Margin(0.0, 0.0)


def a_shape() -> ModelShape:
    shape = shape_of_config({"model_type": "llama"}, "causal-lm")
    assert shape is not None
    return shape


def a_job(**keys: Any) -> TrainingJob:
    model = {"name_or_path": "org/model", "task": "causal-lm"}
    train = {"max_steps": 1, "precision": "bf16", **keys.pop("train", {})}
    job = a_training_job(**({"model": model, "train": train} | keys))
    assert isinstance(job, TrainingJob)
    return job


def a_footprint(job: TrainingJob | None = None, state: float = 10 * GIB, row: float = GIB) -> Footprint:
    """Rows cost the same in every mode but with checkpointing, where they cost a quarter."""
    share = (job.data.max_length / 512) if job is not None else 1.0
    elements = int(state / 16) if job is None or job.adapter is None else int(state / 160)

    def line(checkpointing: bool) -> Line:
        return Line(base=0, per_row=row * share * (0.25 if checkpointing else 1.0))

    passes = [
        Passes(
            precision="bf16", native=native, activation_checkpointing=checkpointing, loss="chunked",
            beside_gradients=line(checkpointing), with_gradients=line(checkpointing), at_loss=line(checkpointing),
        )
        for native in (False, True) for checkpointing in (False, True)
    ]  # fmt: skip
    return Footprint(
        source="analytic", length=512, parameters=elements, trainable=elements, moments_bytes=8 * elements,
        passes=tuple(passes),
    )  # fmt: skip


def a_predict(footprint: Footprint, plan: ExecutionPlan, buffer: bool, _local: int = 1) -> Predicted:
    """16 bytes an element, divided from stage 1 on; three quarters of it on the host where it is offloaded."""
    whole = 16 * footprint.parameters / (plan.world_size if plan.zero_stage == 3 else 1)
    if plan.zero_stage in (1, 2):
        whole *= 0.5
    away = 0.75 * whole if plan.offload != "none" else 0.0
    passes = footprint.of(plan)
    assert passes is not None
    rows = passes.beside_gradients.at(plan.micro_batch_size)
    device = {"weights": int(whole - away), "activations": int(rows)}
    host = {"optimizer": int(away), "checkpoint_buffer": int(whole * buffer)}
    return Predicted(
        device=Side(peak_bytes=sum(device.values()), moment="passes", breakdown=device),
        host=Side(peak_bytes=sum(host.values()), moment="steady", breakdown=host),
    )


def a_gpu_kind(gpus: int = 8, memory_gib: float = 80, host_gib: float = 1000, count: int = 1) -> NodeKind:
    plain = NodeKind("node", count, 64, gpus, int(host_gib * GIB))
    return with_gpus(plain, "H100", gpu_type("H100"), gpus, int(memory_gib * GIB))


def a_cpu_kind(memory_gib: float = 16, slots: int = 2) -> NodeKind:
    return NodeKind("laptop", 1, 8, slots, int(memory_gib * GIB))


def chosen(job: TrainingJob, kind: NodeKind, **footprint: float) -> Choice:
    choice = search(job, a_shape(), a_footprint(None, **footprint), [kind], NO_MARGIN, a_predict)
    assert choice is not None
    return choice


@pytest.mark.parametrize(("processes", "engine"), [(1, "single"), (2, "ddp")])
@pytest.mark.parametrize("kind", [a_gpu_kind(), a_cpu_kind(200)], ids=["gpu", "cpu"])
def test_what_fits_easily_stays_as_it_was(processes: int, engine: str, kind: NodeKind) -> None:
    job = a_job(resources={"num_processes": processes}, train={"global_batch_size": 64})
    best = chosen(job, kind).best
    assert best.plan == first_plan(job, processes, kind.device)
    assert (best.plan.engine, best.plan.allocator, best.plan.micro_batch_size) == (engine, "fast", 32)


def test_micro_batch_is_the_largest_that_fits() -> None:
    job = a_job(train={"global_batch_size": 64, "activation_checkpointing": False})
    choice = chosen(job, a_gpu_kind(memory_gib=23.5))
    assert choice.best.plan.micro_batch_size == 13
    assert choice.best.plan.gradient_accumulation_steps == 5  # four of 13 rows and one of 12


def test_memory_that_is_short_is_saved_the_cheapest_way() -> None:
    job = a_job(strategy="single", train={"global_batch_size": 64})
    assert not chosen(job, a_gpu_kind(memory_gib=40)).best.plan.activation_checkpointing
    assert chosen(job, a_gpu_kind(memory_gib=10.5)).best.plan.activation_checkpointing


def test_sharding_where_a_state_is_too_large() -> None:
    job = a_job(resources={"num_processes": 8}, train={"global_batch_size": 64})
    choice = chosen(job, a_gpu_kind(), state=200 * GIB)
    assert choice.best.plan.engine == "zero3"
    assert "without sharding it needs" in choice.reason
    offloaded = chosen(a_job(strategy="zero3", train={"global_batch_size": 64}), a_gpu_kind(1), state=200 * GIB)
    assert offloaded.best.plan.offload != "none"
    assert chosen(job, a_gpu_kind(), state=100 * GIB).best.plan.zero_stage in (1, 2)


def test_what_the_job_file_says_is_kept() -> None:
    train = {"global_batch_size": 64, "micro_batch_size": 5, "activation_checkpointing": True, "loss_mode": "chunked"}
    job = a_job(strategy="zero1", offload="optimizer", resources={"num_processes": 2}, train=train)
    plan = chosen(job, a_gpu_kind()).best.plan
    assert (plan.engine, plan.offload, plan.micro_batch_size) == ("zero1", "optimizer", 5)
    assert plan.activation_checkpointing
    assert plan.gradient_accumulation_steps == 7


def test_margin_is_kept_free() -> None:
    job = a_job(train={"global_batch_size": 64, "activation_checkpointing": False})
    footprint, kind = a_footprint(), a_gpu_kind(memory_gib=26)
    choice = search(job, a_shape(), footprint, [kind], Margin(0.0, 0.6), a_predict)
    assert choice is not None
    assert choice.best.plan.micro_batch_size == 10
    assert choice.best.margin_bytes == pytest.approx(6 * GIB, rel=0.01)
    assert Margin(0.02, 0.1).scaled(0.5) == Margin(0.01, 0.05)


def test_fast_allocator_of_a_cpu_holds_more() -> None:
    plan = ExecutionPlan(
        engine="single", world_size=1, device="cpu", micro_batch_size=4, gradient_accumulation_steps=1, precision="bf16"
    )
    told = a_predict(a_footprint(), plan, False)
    fast = needed(told, plan, NO_MARGIN).host
    tight = needed(told, plan.model_copy(update={"allocator": "tight"}), NO_MARGIN).host
    assert fast - tight == pytest.approx((CPU_FAST - 1) * 4 * GIB, rel=0.01)
    job = a_job(train={"global_batch_size": 4, "micro_batch_size": 4, "activation_checkpointing": False})
    short = a_cpu_kind(memory_gib=(10 + 4.2) + 11.5 * 0.9, slots=1)
    assert chosen(job, short).best.plan.allocator == "tight"


def test_checkpoint_copy_is_left_out_where_a_host_is_short() -> None:
    job = a_job(resources={"num_processes": 8}, train={"global_batch_size": 64})
    choice = chosen(job, a_gpu_kind(host_gib=40), state=40 * GIB)
    assert choice.fits
    assert choice.best.predicted.host.breakdown["checkpoint_buffer"] == 0


def test_bounds_are_tried_and_the_fastest_taken() -> None:
    job = a_job(resources={"num_processes": "2..8"}, train={"global_batch_size": 64})
    kinds = [a_gpu_kind()]
    assert [world for _, world in placements(job, kinds)] == [2, 3, 4, 5, 6, 7, 8]
    assert chosen(job, kinds[0]).best.plan.world_size == 8


def test_others_are_told_with_the_reason() -> None:
    choice = chosen(a_job(resources={"num_processes": 8}, train={"global_batch_size": 64}), a_gpu_kind())
    assert choice.others
    ways = [(one.plan.engine, one.plan.offload, one.plan.activation_checkpointing) for one in choice.others]
    assert len(set(ways)) == len(ways)
    assert all(why_not(one, choice.best) for one in choice.others)


def test_no_node_takes_it() -> None:
    job = a_job(resources={"num_processes": 16}, train={"global_batch_size": 64})
    assert search(job, a_shape(), a_footprint(), [a_gpu_kind()], NO_MARGIN, a_predict) is None


def test_adafactor_is_not_sharded() -> None:
    job = a_job(resources={"num_processes": 8}, train={"global_batch_size": 64, "optimizer": "adafactor"})
    choice = chosen(job, a_gpu_kind(), state=200 * GIB)
    assert not choice.fits
    assert choice.best.plan.engine == "ddp"


@pytest.mark.parametrize(
    ("keys", "kind", "state", "change"),
    [
        ({"strategy": "ddp"}, a_gpu_kind(), 200, "with strategy: auto"),
        ({"strategy": "single", "train": {"activation_checkpointing": False}}, a_gpu_kind(1, 10.6), 10,
         "with train.activation_checkpointing: true"),
        ({}, a_gpu_kind(8, 80, 100), 400, "on 8 processes"),
        ({"data": {"train": "d", "max_length": 4096}}, a_gpu_kind(1, 11.5, 1), 10, "with data.max_length: 2048"),
        ({}, a_gpu_kind(1, 40, 20), 400, "with an adapter (adapter: {type: lora})"),
    ],
)  # fmt: skip
def test_nearest_change(keys: dict[str, Any], kind: NodeKind, state: float, change: str) -> None:
    train = {"global_batch_size": 64, **keys.pop("train", {})}
    job = a_job(train=train, resources={"num_processes": 2 if keys.get("strategy") == "ddp" else 1}, **keys)

    def needs(changed: TrainingJob) -> Footprint:
        return a_footprint(changed, state=state * GIB)

    choice = search(job, a_shape(), needs(job), [kind], NO_MARGIN, a_predict)
    assert choice is not None
    assert not choice.fits
    assert "nothing fits" in choice.reason
    found = nearest(job, a_shape(), [kind], needs, NO_MARGIN, a_predict)
    assert found is not None
    assert found.change == change
    assert found.choice.fits


def test_nothing_helps() -> None:
    job = a_job(adapter={"r": 8}, train={"global_batch_size": 1})
    kind = a_gpu_kind(1, 1, 1)
    assert (
        nearest(job, a_shape(), [kind], lambda changed: a_footprint(changed, state=400 * GIB), NO_MARGIN, a_predict)
        is None
    )


def a_plan(**changes: Any) -> ExecutionPlan:
    values = {"engine": "ddp", "world_size": 8, "device": "cuda", "micro_batch_size": 8}
    values |= {"gradient_accumulation_steps": 2, "precision": "bf16"}
    return ExecutionPlan(**(values | changes))


def test_traffic_of_the_stages() -> None:
    """Rajbhandari et al. 2020, section 7: 2, 2 and 3 times the size of the model, here in bf16 and with two passes."""
    job = a_job(train={"global_batch_size": 128})
    work = work_of(a_shape(), job, a_footprint())
    share = 7 / 8 * work.parameters
    sent = {name: traffic(work, a_plan(engine=name)) / share for name in ("ddp", "zero1", "zero2", "zero3")}
    assert sent == pytest.approx({"ddp": 8, "zero1": 4, "zero2": 6, "zero3": 12})
    assert traffic(work, a_plan(engine="single", world_size=1)) == 0


def test_what_makes_a_step_longer() -> None:
    job = a_job(train={"global_batch_size": 128})
    footprint, kind = a_footprint(), a_gpu_kind()
    work = work_of(a_shape(), job, footprint)

    def seconds(**changes: Any) -> float:
        return step_time(work, job, footprint, a_plan(**changes), kind).total

    assert seconds(activation_checkpointing=True) / seconds() == pytest.approx(4 / 3, rel=0.1)
    assert seconds(engine="zero3") > seconds(engine="zero1")
    assert seconds(engine="zero2", offload="optimizer") > seconds(engine="zero2")
    assert seconds(world_size=4, gradient_accumulation_steps=4) > 1.8 * seconds()
    adapter = a_footprint().model_copy(update={"trainable": 1000})
    assert work_of(a_shape(), job, adapter).backward < 0.6 * work.backward
    assert work_of(None, job, footprint).forward == 2 * footprint.parameters


def test_a_disk_is_for_zero3_alone() -> None:
    job = a_job(
        offload="optimizer", offload_path="/disk", resources={"num_processes": 8}, train={"global_batch_size": 64}
    )
    choice = chosen(job, a_gpu_kind(), state=200 * GIB)
    plans = [choice.best.plan, *(one.plan for one in choice.others)]
    assert {(plan.engine, plan.offload, plan.offload_path) for plan in plans if plan.zero_stage} == {
        ("zero3", "optimizer", "/disk")
    }
