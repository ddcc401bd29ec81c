"""What real attempts tell of memory, and a job that is traced before it starts because its node is small."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config import TrainSpec
from launch.contract import Allocator, ExitCode, RankResult
from launch.shape import read_shape
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import TrainingJob, dump_job
from orchestrator.memory.options import Forecast, factors_of, kinds_of, ways
from orchestrator.memory.sizing import Sizing, sizing_of
from tests.builders import a_node, a_training_job
from tests.inhouse import carried_out
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_dialogues, write_llama, write_messages

MIB = 1 << 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_llama(world / "llama")
    write_messages(world / "messages.tsv")
    write_dialogues(world / "dialogues.jsonl")
    return world


@pytest.fixture(scope="module")
def results(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Allocator, RankResult]:
    """Of the same training of a language model, by allocator."""
    data = {"prompt_column": "prompt", "response_column": "response", "split": {"test": 0.2}, "max_length": 48}
    spec: TrainSpec = a_spec(
        world / "llama", world / "dialogues.jsonl", model={"task": "causal-lm"}, data=data, train={"max_steps": 3}
    )
    found: dict[Allocator, RankResult] = {}
    allocators: tuple[Allocator, ...] = ("fast", "tight")
    for allocator in allocators:
        folder = tmp_path_factory.mktemp(allocator)
        launched = start(a_contract(folder, a_plan(spec, "single", 1, 16, allocator=allocator), spec))
        ended = launched.wait()
        assert ended[0].code == ExitCode.DONE, launched.logs()
        assert ended[0].result is not None
        found[allocator] = ended[0].result
    return found


def test_a_rank_tells_what_it_found_of_itself(results: dict[Allocator, RankResult]) -> None:
    for allocator, result in results.items():
        assert (result.allocator, result.loss) == (allocator, "chunked")
        assert 100 * MIB < result.baseline_bytes < result.peak_bytes < 4096 * MIB


def test_an_allocator_changes_nothing_of_the_training(results: dict[Allocator, RankResult]) -> None:
    losses = [result.train.losses for result in results.values() if result.train is not None]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def a_job(world: Path) -> TrainingJob:
    job = a_training_job(
        1,
        model={"name_or_path": str(world / "bert"), "task": "sequence-classification"},
        data={"train": str(world / "messages.tsv"), "max_length": 32},
        train={"max_steps": 2, "global_batch_size": 16, "activation_checkpointing": False},
    )
    assert isinstance(job, TrainingJob)
    return job


def test_a_job_on_a_small_node_is_traced_before_it_starts_and_measured_when_it_has_ended(
    world: Path, tmp_path: Path
) -> None:
    job = a_job(world)
    sizing = sizing_of(job, read_shape(job.model))
    found = ways(dump_job(job), sizing.model_dump_json(), kinds_of([a_node(memory_gib=100)]) or ())
    assert found is not None
    memory = int(found.options[0].need.host_bytes / 0.8)

    ended = carried_out(tmp_path, job, memory_bytes=memory, sizing=sizing.model_dump_json())
    assert ended.job.state == JobState.SUCCEEDED, ended.story()
    assert ended.job.sizing is not None
    traced = Sizing.model_validate_json(ended.job.sizing)
    assert (traced.cpu.source, traced.cpu.reason, traced.cuda) == ("traced", None, sizing.cuda)
    assert traced.cpu.parameters == sizing.cpu.parameters
    assert traced.cpu.runtime_bytes is not None
    assert 100 * MIB < traced.cpu.runtime_bytes < memory

    (attempt,) = ended.attempts
    assert attempt.predicted is not None
    assert 0 < attempt.held.host_bytes <= memory
    (peak,) = ended.peaks
    assert peak.predicted == attempt.predicted
    assert (peak.job_id, peak.attempt, peak.ran_out, peak.plan) == ("job-1", 1, False, attempt.plan)
    told = Forecast.model_validate(peak.predicted)
    assert peak.measured_bytes is not None
    # Nearly all of it is the process, of which the libraries' part changes with what else runs here.
    assert 0.6 * told.peak_bytes < peak.measured_bytes < told.peak_bytes + 100 * MIB
    assert dict(factors_of([peak] * 9)).keys() == {("bert", "single", attempt.plan.allocator)}
