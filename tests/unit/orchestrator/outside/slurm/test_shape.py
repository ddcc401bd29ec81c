"""On how many nodes a job lies, and what it asks them for."""

from __future__ import annotations

from typing import Any

import pytest

from launch.engine_config import NEARBY_BYTES
from launch.shape import shape_of_config
from orchestrator.cluster.model import Node
from orchestrator.errors import DoesNotFitError, ImpossibleGangError
from orchestrator.job.spec import AnyJob, TrainingJob, dump_job
from orchestrator.memory.options import kinds_of, ways
from orchestrator.memory.sizing import sizing_of
from orchestrator.outside.shape import BESIDE, MIB, ROOM, Shape, Words, shape_of
from orchestrator.outside.slurm.commands import gres_of, parse_node
from orchestrator.outside.slurm.options import SlurmOptions
from tests.builders import a_command_job, a_training_job

WORDS = Words("the partition main", none="take another", few="for another")


def gres(shape: Shape) -> str | None:
    return gres_of(shape.like, shape.kind, shape.per_node)


def nodes(count: int = 2, cores: int = 8, told: str = "(null)", memory: int = 64_000) -> list[Node]:
    found = [parse_node(f"n{number}|idle|{cores}|{memory}|{told}") for number in range(count)]
    return [node for node in found if node is not None]


def shaped(job: AnyJob, there: list[Node], sizing: str | None = None, **options: Any) -> Shape:
    return shape_of(job, sizing, there, SlurmOptions(**options), WORDS)


def on(accelerator: str, processes: int) -> AnyJob:
    return a_command_job(**{"resources": {"num_processes": processes, "accelerator": accelerator}})  # type: ignore[arg-type]


def test_as_few_nodes_as_hold_it() -> None:
    one = shaped(a_command_job(4), nodes())
    assert (one.nodes, one.per_node, one.cpus, gres(one)) == (1, 4, 4, None)
    two = shaped(a_command_job(10), nodes())
    assert (two.nodes, two.per_node, two.processes) == (2, 5, 10)


@pytest.mark.parametrize(("told", "taken"), [("(null)", "fp32"), ("gpu:a100:1", "bf16"), ("gpu:v100:1", "fp32")])
def test_half_precision_is_for_what_is_known_to_multiply_it(told: str, taken: str) -> None:
    job = a_training_job(1, train={"max_steps": 1, "precision": "auto"})
    assert shaped(job, nodes(told=told)).plan.precision == taken


def test_as_many_nodes_as_are_wanted() -> None:
    found = shaped(a_command_job(2), nodes(), nodes=2)
    assert (found.nodes, found.per_node) == (2, 1)
    assert (found.node.cpu_slots, found.node.cores) == (1, 1)


def test_cpus_of_a_process() -> None:
    found = shaped(a_command_job(4), nodes(), cpus=4)
    assert (found.nodes, found.per_node, found.cpus) == (2, 2, 8)


def test_gpus_and_their_share_of_the_cpus() -> None:
    found = shaped(on("H100", 4), nodes(2, 64, "gpu:h100:8"))
    assert (found.nodes, gres(found), found.cpus) == (1, "gpu:h100:4", 32)
    assert [(gpu.index, gpu.type) for gpu in found.node.gpus] == [(index, "H100") for index in range(4)]
    assert found.plan.device == "cuda"
    untyped = shaped(a_command_job(16), nodes(2, 64, "gpu:8"))
    assert (untyped.nodes, gres(untyped), untyped.per_node) == (2, "gpu:8", 8)


def test_gpus_are_taken_where_either_would_do() -> None:
    mixed = [*nodes(1, 64, "gpu:a100:2"), *nodes(4)]
    assert shaped(a_command_job(2), mixed).plan.device == "cuda"
    assert shaped(a_command_job(8), mixed).plan.device == "cpu"
    on_cpu = on("cpu", 2)
    assert shaped(on_cpu, mixed).plan.device == "cpu"


def test_an_elastic_job_takes_what_there_is() -> None:
    assert shaped(a_command_job("2..32"), nodes()).processes == 16
    assert shaped(a_command_job("2..6"), nodes()).processes == 6


@pytest.mark.parametrize(
    ("job", "options", "field"),
    [
        (a_command_job(17), {}, "resources.num_processes"),
        (on("gpu", 2), {}, "resources.accelerator"),
        (a_command_job(2), {"nodes": 3}, "nodes"),
        (a_command_job(1), {"nodes": 2}, "nodes"),
        (a_command_job(16), {"nodes": 1}, "resources.num_processes"),
    ],
)
def test_what_cannot_be_is_refused(job: AnyJob, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ImpossibleGangError) as caught:
        shaped(job, nodes(), **options)
    assert caught.value.field == field
    assert caught.value.hint
    assert "the partition main" in caught.value.message or field == "nodes"


def test_a_partition_without_nodes() -> None:
    with pytest.raises(ImpossibleGangError, match="no node that is up"):
        shaped(a_command_job(1), [])


# With what a model needs.


def a_training(processes: int | str = 2, **keys: Any) -> tuple[TrainingJob, str]:
    """A job that trains BERT-base, and its sizing."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    shape = shape_of_config({"model_type": "bert", **sizes, "vocab_size": 30522}, "sequence-classification")
    assert shape is not None
    train = {"max_steps": 1, "global_batch_size": 32, "activation_checkpointing": False}
    job = a_training_job(**{"resources": {"num_processes": processes}, "train": train} | keys)
    assert isinstance(job, TrainingJob)
    return job, sizing_of(job, shape).model_dump_json()


def test_memory_decides_how_many_go_onto_a_node() -> None:
    train = {"max_steps": 1, "global_batch_size": 32, "activation_checkpointing": False, "micro_batch_size": 16}
    job, sizing = a_training(2, strategy="ddp", train=train)
    roomy = shaped(job, nodes(memory=256_000), sizing)
    assert (roomy.nodes, roomy.per_node) == (1, 2)
    assert roomy.memory_mb is not None
    spread = shaped(job, nodes(memory=256_000), sizing, nodes=2)
    assert (spread.nodes, spread.per_node) == (2, 1)
    nearby = ROOM * 2 * 2 * NEARBY_BYTES // MIB  # on one node each of two ranks sees both's slots (launch.nearby)
    assert spread.memory_mb is not None
    assert spread.memory_mb + nearby == pytest.approx((roomy.memory_mb + BESIDE // MIB) / 2, abs=0.05 * nearby)
    tight = shaped(job, nodes(memory=20_000), sizing)
    assert (tight.nodes, tight.per_node) == (2, 1)
    assert tight.memory_mb is not None
    assert tight.memory_mb <= 20_000
    with pytest.raises(DoesNotFitError):
        shaped(job, nodes(memory=400), sizing)


def test_the_memory_that_is_said_is_asked_for() -> None:
    job, sizing = a_training(2)
    found = shaped(job, nodes(), sizing, memory_gb=40)
    assert found.memory_mb == 40 * 10**9 // MIB
    assert found.node.memory_bytes == 40 * 10**9
    assert shaped(a_command_job(2), nodes()).memory_mb is None


def test_a_run_plans_the_same_within_what_it_gets() -> None:
    """What is asked for leaves enough for the plan, and not so little that it would be traced first."""
    job, sizing = a_training("1..4")
    found = shaped(job, nodes(memory=128_000), sizing)
    there = kinds_of([found.node.model_copy(update={"id": f"n{index}"}) for index in range(found.nodes)])
    assert there is not None
    again = ways(dump_job(job), sizing, there)
    assert again is not None
    assert not again.tight
    assert again.options[0].plan == found.plan
