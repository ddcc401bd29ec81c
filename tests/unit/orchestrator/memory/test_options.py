"""In which ways a job may run on the nodes that there are."""

from __future__ import annotations

from typing import Any

import pytest

from launch.contract import ExecutionPlan
from launch.shape import ModelShape, shape_of_config
from orchestrator.cluster.model import Node
from orchestrator.job.spec import TrainingJob, dump_job
from orchestrator.memory.alike import Peak
from orchestrator.memory.estimate import predict
from orchestrator.memory.ladder import Relief
from orchestrator.memory.margin import NONE
from orchestrator.memory.options import Factors, Forecast, Ways, factors_of, kinds_of, ways
from orchestrator.memory.plan import plan as first_plan
from orchestrator.memory.search import needed
from orchestrator.memory.sizing import Sizing, sizing_of
from tests.builders import a_node, a_training_job

GIB = 2**30
PLAIN = {"activation_checkpointing": False, "max_steps": 1, "global_batch_size": 64}
"""Nothing is left to choose but the micro-batch and the allocator."""


def a_shape() -> ModelShape:
    """BERT-base."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    shape = shape_of_config({"model_type": "bert", **sizes, "vocab_size": 30522}, "sequence-classification")
    assert shape is not None
    return shape


def a_job(processes: int | str = 1, **keys: Any) -> TrainingJob:
    train = PLAIN | keys.pop("train", {})
    job = a_training_job(processes, **({"train": train, "data": {"train": "d", "max_length": 256}} | keys))  # type: ignore[arg-type]
    assert isinstance(job, TrainingJob)
    return job


def found(job: TrainingJob, *nodes: Node, factors: Factors = (), relief: Relief | None = None) -> Ways | None:
    kinds = kinds_of(nodes)
    assert kinds
    sizing = sizing_of(job, a_shape()).model_dump_json()
    return ways(dump_job(job), sizing, kinds, factors, relief.model_dump_json() if relief else None)


def best(job: TrainingJob, *nodes: Node, **more: Any) -> ExecutionPlan:
    told = found(job, *nodes, **more)
    assert told is not None
    assert told.options, told.misfit
    return told.options[0].plan


def test_nodes_that_differ_in_little_are_one_kind_with_the_memory_of_the_smallest() -> None:
    nodes = [a_node("a", memory_gib=100), a_node("b", memory_gib=97), a_node("c", memory_gib=50)]
    told = kinds_of(nodes)
    assert told is not None
    assert [(kind.name, kind.count, kind.memory_bytes / GIB) for kind in told] == [("cpu", 1, 50), ("cpu", 2, 97)]
    assert kinds_of(reversed(nodes)) == told
    told = kinds_of([*nodes, a_node("d", memory_gib=97, slots=8), a_node("e", memory_gib=97, cores=2)])
    assert told is not None
    assert sorted(kind.count for kind in told) == [1, 1, 1, 2]


def test_gpus_of_a_type_are_one_kind_with_the_memory_of_the_smallest() -> None:
    def nodes(*memories: float, **keys: Any) -> list[Node]:
        return [
            a_node(f"n{number}", gpus=2, memory_gib=200 + number, gpu_memory_gib=memory, **keys)
            for number, memory in enumerate(memories)
        ]

    told = kinds_of(nodes(79.6, 79.1))
    assert told is not None
    assert [(kind.name, kind.count, kind.slots, kind.gpu_memory_bytes / GIB) for kind in told] == [
        ("H100", 2, 2, pytest.approx(79.1))
    ]
    assert [kind.count for kind in kinds_of(nodes(79.6, 39.0)) or ()] == [1, 1]
    other = kinds_of([*nodes(79.6), *nodes(79.6, gpu_type="A100")])
    assert other is not None
    assert [kind.count for kind in other] == [1, 1]


def test_with_one_memory_unknown_nobody_knows_what_fits() -> None:
    assert kinds_of([a_node("a", memory_gib=10), a_node("b")]) is None
    assert kinds_of([a_node("a", gpus=1, memory_gib=10)]) is None
    assert kinds_of([]) == ()
    assert kinds_of([a_node("head", slots=0)]) == (), "it takes nobody"


def test_what_fits_easily_runs_as_it_would_have() -> None:
    told = found(a_job(2), a_node(memory_gib=200))
    assert told is not None
    assert not told.tight
    (option,) = told.options
    assert option.plan == first_plan(a_job(2), 2, "cpu")
    assert (option.processes, option.device, option.need.device_bytes) == (2, "cpu", 0)
    forecast = Forecast.model_validate(option.predicted)
    assert forecast.family == "bert"
    assert forecast.peak_bytes > GIB
    assert 0 < forecast.margin_bytes < forecast.peak_bytes
    assert option.need.host_bytes <= 100 * GIB


def test_a_job_that_needs_most_of_its_place_is_tight() -> None:
    told = found(a_job(), a_node(memory_gib=200))
    assert told is not None
    needs = told.options[0].need.host_bytes / GIB
    for share, tight in ((0.5, False), (0.7, True)):
        told = found(a_job(train={"micro_batch_size": 32}), a_node(memory_gib=needs / share))
        assert told is not None
        assert told.tight is tight


def test_a_job_too_large_is_told_what_it_misses() -> None:
    told = found(a_job(), a_node(memory_gib=1.5))
    assert told is not None
    assert told.options == ()
    assert told.misfit is not None
    assert told.misfit.startswith("does not fit: the plan that misses by least needs ")
    assert told.misfit.endswith(" GiB, and there are 1.5 GiB of host memory a process")


def test_a_plan_that_the_job_file_fixes_runs_with_nothing_to_spare() -> None:
    job = a_job(strategy="single", train={"micro_batch_size": 8})
    plan = first_plan(job, 1, "cpu").model_copy(update={"allocator": "tight"})
    bare = needed(predict(sizing_of(job, a_shape()).cpu, plan, rows=64), plan, NONE).host / GIB
    told = found(job, a_node(memory_gib=1.01 * bare))
    assert told is not None
    (option,) = told.options
    assert option.plan == plan
    assert told.tight
    assert option.need.host_bytes / GIB == pytest.approx(bare)
    less = found(job, a_node(memory_gib=0.99 * bare))
    assert less is not None
    assert not less.options


def test_half_precision_is_taken_where_all_that_a_job_may_start_on_multiplies_it() -> None:
    def taken(*nodes: Node, **keys: Any) -> str:
        return best(a_job(train={"precision": "auto"}, **keys), *nodes).precision

    new, old = a_node("new", memory_gib=64, bf16=True), a_node("old", memory_gib=64)
    a100 = a_node("a100", gpus=1, gpu_type="A100", memory_gib=64, gpu_memory_gib=40)
    v100 = a_node("v100", gpus=1, gpu_type="V100", memory_gib=64, gpu_memory_gib=32)
    unknown = a_node("unknown", gpus=1, gpu_type="X9", memory_gib=64, gpu_memory_gib=32)
    assert (taken(new), taken(old), taken(new, old)) == ("bf16", "fp32", "fp32")
    assert (taken(a100), taken(v100), taken(a100, v100)) == ("bf16", "fp32", "fp32")
    assert taken(unknown) == "bf16"
    assert taken(old, a100) == "bf16"  # of GPUs and CPUs each for itself, and GPUs come first
    assert taken(a100, v100, resources={"num_processes": 1, "accelerator": "A100"}) == "bf16"
    assert best(a_job(train={"precision": "bf16"}), old).precision == "bf16"


def test_relief_holds_for_every_option() -> None:
    relief = Relief(max_micro_batch=3, allocator="tight", activation_checkpointing=True)
    job = a_job("1..4", train={"activation_checkpointing": None})
    told = found(job, a_node(memory_gib=200), relief=relief)
    assert told is not None
    assert len(told.options) == 4
    for option in told.options:
        assert (option.plan.micro_batch_size, option.plan.allocator) == (3, "tight")
        assert option.plan.activation_checkpointing
        rows = option.plan.gradient_accumulation_steps * 3 * option.plan.world_size
        assert 64 <= rows < 64 + 3 * option.plan.world_size


def test_options_of_an_elastic_gang_are_the_widest_first_and_one_a_width() -> None:
    told = found(
        a_job("1..6"), a_node("a", slots=4, memory_gib=300), a_node("b", gpus=2, memory_gib=300, gpu_memory_gib=80)
    )
    assert told is not None
    assert [(option.processes, option.device) for option in told.options] == [
        (4, "cpu"), (3, "cpu"), (2, "cuda"), (2, "cpu"), (1, "cuda"), (1, "cpu")
    ]  # fmt: skip
    for option in told.options:
        assert (option.need.device_bytes > 0) == (option.device == "cuda")


def test_a_gang_that_no_kind_of_node_holds_alone_is_placed_by_numbers() -> None:
    """Nodes that differ may hold it together, and what it needs there nobody knows; or it runs nowhere."""
    assert found(a_job(6), a_node("a", slots=4, memory_gib=100), a_node("b", slots=2, memory_gib=100)) is None
    fp16 = a_job(train={"precision": "fp16"})
    assert found(fp16, a_node(memory_gib=100)) is None, "that a CPU has no fp16 is not a matter of memory"
    int8 = a_job(train={"precision": "int8"})
    a100 = a_node("a100", gpus=1, gpu_type="A100", memory_gib=64, gpu_memory_gib=40)
    assert found(int8, a100) is None, "nor that int8 is for CPUs"
    assert best(int8, a100, a_node(memory_gib=100)).device == "cpu"
    assert best(int8, a_node(memory_gib=100)).precision == "int8"


LIKE = ("bert", "single", "fast")


def test_what_was_learned_changes_the_micro_batch() -> None:
    job = a_job(strategy="single")
    node = a_node(memory_gib=6)

    def micro(*factors: tuple[Any, float]) -> int:
        return best(job, node, factors=tuple(factors)).micro_batch_size

    cold = micro()
    assert 1 < cold < 32
    both = [(("bert", "single", allocator), 0.0) for allocator in ("fast", "tight")]
    assert micro(*both) > cold
    assert micro(*((like, 4.0) for like, _ in both)) < cold


@pytest.mark.parametrize(
    "other",
    [("llama", "single", "tight"), ("bert", "ddp", "tight"), ("bert", "zero1", "tight"), ("gpt2", "ddp", "fast")],
)
def test_what_others_have_taught_says_nothing(other: Any) -> None:
    job, node = a_job(strategy="single"), a_node(memory_gib=6)
    assert found(job, node, factors=((other, 9.0),)) == found(job, node)
    mine = (("bert", "single", "tight"), 9.0), (LIKE, 9.0)
    assert found(job, node, factors=tuple(sorted(mine))) != found(job, node)


def a_peak(ratio: float, family: str = "bert", engine: str = "single", **changes: Any) -> Peak:
    """That of an attempt that missed its prediction by `ratio` margins."""
    plan = first_plan(a_job(), 1, "cpu").model_copy(update={"engine": engine})
    values = {
        "key": "k", "device_kind": "cpu", "world_size": 1, "plan": plan, "ran_out": False, "job_id": "j", "attempt": 1,
        "time": 0.0, "measured_bytes": int(1000 + 100 * ratio),
        "predicted": {"family": family, "peak_bytes": 1000, "margin_bytes": 100},
    }  # fmt: skip
    return Peak.model_validate(values | changes)


def test_a_part_of_a_vocabulary_is_a_family_of_its_own() -> None:
    """It is reckoned with as a whole one, so that it teaches nothing of those."""
    job = a_job(2)
    part = job.model_copy(update={"model": job.model.model_copy(update={"vocabulary": "used"})})
    told = found(part, a_node(memory_gib=200))
    assert told is not None
    assert Forecast.model_validate(told.options[0].predicted).family == "bert, used vocabulary"


def test_factors_are_learned_by_family_engine_and_allocator() -> None:
    peaks = [a_peak(0.1 * number) for number in range(9)]
    peaks += [a_peak(0.5, engine="ddp") for _ in range(9)] + [a_peak(2.0, "llama") for _ in range(9)]
    learned = {("bert", "ddp", "fast"): 0.5, ("bert", "single", "fast"): 0.8, ("llama", "single", "fast"): 2.0}
    assert dict(factors_of(peaks)) == {like: pytest.approx(factor) for like, factor in learned.items()}


def test_few_attempts_and_those_of_which_nothing_was_predicted_teach_nothing() -> None:
    """With few, the margin of a formula would otherwise become that of a trace."""
    assert factors_of([a_peak(0.5)] * 8) == ()
    assert factors_of([a_peak(0.5, predicted=None)] * 20) == ()
    assert factors_of([a_peak(0.0, measured_bytes=None)] * 20) == ()


def test_who_ran_out_needed_at_least_what_there_was() -> None:
    ran_out = {"ran_out": True, "limit_bytes": 1300}
    assert dict(factors_of([a_peak(0.5, measured_bytes=None, **ran_out)] * 9)) == {LIKE: pytest.approx(3.0)}
    assert dict(factors_of([a_peak(0.5, **ran_out)] * 9)) == {LIKE: pytest.approx(3.0)}
    assert dict(factors_of([a_peak(0.5, limit_bytes=1300)] * 9)) == {LIKE: pytest.approx(0.5)}, "it only had more"


def test_a_sizing_is_stored_as_json_and_traced_for_one_device_at_a_time() -> None:
    sizing = sizing_of(a_job(), a_shape())
    assert Sizing.model_validate_json(sizing.model_dump_json()) == sizing
    better = sizing.cpu.model_copy(update={"source": "traced"})
    traced = sizing.traced(better, "cpu")
    assert (traced.on("cpu").source, traced.on("cuda").source) == ("traced", "analytic")
    assert traced.on("cuda") == sizing.cuda
    assert sizing.traced(better, "cuda").on("cpu") == sizing.cpu


def test_a_trace_needs_less_margin_than_a_formula() -> None:
    """Until enough was learned of the one or the other."""
    job = a_job(strategy="single")
    sizing, kinds = sizing_of(job, a_shape()), kinds_of([a_node(memory_gib=6)])
    traced = sizing.traced(sizing.cpu.model_copy(update={"source": "traced"}), "cpu")
    assert kinds is not None
    micros = []
    for known in (sizing, traced):
        told = ways(dump_job(job), known.model_dump_json(), kinds)
        assert told is not None
        micros.append(told.options[0].plan.micro_batch_size)
    assert micros[0] < micros[1]
