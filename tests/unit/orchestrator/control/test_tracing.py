"""A controller that has jobs traced which need most of their place; the test plays executor and tracer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.config import TrainSpec
from launch.contract import Device, RunContract
from launch.footprint_record import Footprint
from launch.shape import ModelShape, shape_of_config
from orchestrator.cluster.model import Node
from orchestrator.control.loop import Controller
from orchestrator.errors import ExecutorError
from orchestrator.job.lifecycle import JobState, ReasonCode
from orchestrator.job.spec import TrainingJob
from orchestrator.memory.options import Forecast
from orchestrator.memory.sizing import Sizing, sizing_of
from orchestrator.settings import Settings
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store
from tests.builders import a_node, a_training_job


class Scene:
    """As much of an executor as a tick asks for: attempts start and are never heard of again."""

    def __init__(self, *nodes: Node) -> None:
        self.here = list(nodes)
        self.started: list[RunContract] = []

    def nodes(self) -> list[Node]:
        return self.here

    def poll(self, *_: Any) -> dict[str, Any]:
        return {}

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        return {node: list(range(count)) for node, count in wanted.items()}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        self.started += contracts
        return {}


class Told:
    """A tracer that answers when the test lets it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Device]] = []
        self.answer: Footprint | str | None = None

    def ask(self, job_id: str, spec: TrainSpec, device: Device) -> Footprint | str | None:
        self.asked.append((job_id, spec.name, device))
        return self.answer

    def forget(self, _job_id: str) -> None:
        self.answer = None

    def close(self) -> None:
        """Nothing runs."""


def a_shape() -> ModelShape:
    shape = shape_of_config({"model_type": "bert"}, "sequence-classification")
    assert shape is not None
    return shape


def a_job(**keys: Any) -> TrainingJob:
    train = {"max_steps": 1, "global_batch_size": 32, "activation_checkpointing": False}
    job = a_training_job(1, strategy="single", train=train, data={"train": "d", "max_length": 256}, **keys)
    assert isinstance(job, TrainingJob)
    return job


SIZING = sizing_of(a_job(), a_shape())
TIGHT, AMPLE = a_node(memory_gib=6), a_node(memory_gib=100)


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Controller]:
    store = Store(f"sqlite:///{tmp_path / 'yard.db'}")
    store.prepare()
    controller = Controller(store, Scene(TIGHT), Settings(home=tmp_path), clock=lambda: 1000.0)  # type: ignore[arg-type]
    controller.tracer = Told()  # type: ignore[assignment]
    yield controller
    store.close()


def scene(yard: Controller) -> Scene:
    assert isinstance(yard.executor, Scene)
    return yard.executor


def tracer(yard: Controller) -> Told:
    assert isinstance(yard.tracer, Told)
    return yard.tracer


def submit(yard: Controller, name: str = "job-1", **keys: Any) -> None:
    yard.store.add_job(name, a_job(**keys), 1.0, sizing=SIZING.model_dump_json())


def looked_at(yard: Controller, name: str = "job-1") -> JobRow:
    yard.tick()
    return yard.store.job(name)


def stored(row: JobRow) -> Sizing:
    assert row.sizing is not None
    return Sizing.model_validate_json(row.sizing)


def a_trace(share: float = 1.0) -> Footprint:
    """What formulas found, or a share of it."""
    passes = []
    for one in SIZING.cpu.passes:
        curves = {name: getattr(one, name) for name in ("beside_gradients", "with_gradients", "at_loss")}
        less = {
            name: curve.model_copy(update={"bytes": tuple(share * height for height in curve.bytes)})
            for name, curve in curves.items()
        }
        passes.append(one.model_copy(update=less))
    return SIZING.cpu.model_copy(update={"source": "traced", "passes": tuple(passes)})


def test_a_tight_job_waits_for_its_trace_and_starts_with_it(yard: Controller) -> None:
    submit(yard)
    for _ in range(2):
        row = looked_at(yard)
        assert (row.state, row.reason.code) == (JobState.QUEUED, ReasonCode.TRACING)
        assert row.reason.remedy
    assert scene(yard).started == []
    assert tracer(yard).asked == [("job-1", "job", "cpu")] * 2

    tracer(yard).answer = a_trace(share=0.25)
    row = looked_at(yard)
    assert (stored(row).cpu.source, stored(row).cuda) == ("traced", SIZING.cuda)
    row = looked_at(yard)
    assert row.state == JobState.STARTING
    (attempt,) = yard.store.attempts("job-1")
    assert attempt.predicted is not None
    forecast = Forecast.model_validate(attempt.predicted)
    # With the margin, and without the pages of code, which processes share.
    assert forecast.peak_bytes == pytest.approx(attempt.held.host_bytes, rel=0.05)
    assert 0 < attempt.held.host_bytes <= (TIGHT.memory_bytes or 0)
    assert attempt.plan.micro_batch_size == 32, "by formulas it had been fewer"
    assert len(tracer(yard).asked) == 3


def test_where_there_is_no_trace_it_starts_by_formulas(yard: Controller) -> None:
    submit(yard)
    tracer(yard).answer = "not traced: no such thing"
    looked_at(yard)
    row = looked_at(yard)
    assert (stored(row).cpu.source, stored(row).cpu.reason) == ("analytic", "not traced: no such thing")
    assert row.state == JobState.STARTING
    assert yard.store.attempts("job-1")[0].plan.micro_batch_size < 32
    assert len(tracer(yard).asked) == 1


def test_a_trace_may_show_that_it_does_not_fit(yard: Controller) -> None:
    submit(yard)
    tracer(yard).answer = a_trace(share=1000.0)
    looked_at(yard)
    row = looked_at(yard)
    assert (row.state, row.reason.code) == (JobState.QUEUED, ReasonCode.DOES_NOT_FIT)
    scene(yard).here = [a_node("n1", memory_gib=4000)]
    assert looked_at(yard).state == JobState.STARTING, "a node came that holds it"
    assert len(tracer(yard).asked) == 1


def test_what_fits_easily_is_not_traced(yard: Controller) -> None:
    scene(yard).here = [AMPLE]
    submit(yard)
    assert looked_at(yard).state == JobState.STARTING
    assert tracer(yard).asked == []
    assert yard.store.attempts("job-1")[0].predicted is not None


def test_where_memory_is_unknown_it_starts_as_before(yard: Controller) -> None:
    scene(yard).here = [a_node()]
    submit(yard)
    assert looked_at(yard).state == JobState.STARTING
    (attempt,) = yard.store.attempts("job-1")
    assert (attempt.predicted, attempt.held.host_bytes, tracer(yard).asked) == (None, 0, [])


@pytest.mark.parametrize("ask", ["request_cancel", "request_pause"])
def test_who_does_not_want_to_start_does_not_wait_for_a_trace(yard: Controller, ask: str) -> None:
    submit(yard)
    getattr(yard.store, ask)("job-1", 2.0)
    assert looked_at(yard).state in (JobState.CANCELLED, JobState.PAUSED)
    looked_at(yard)
    assert tracer(yard).asked == []


def test_others_do_not_wait_for_it(yard: Controller) -> None:
    submit(yard)
    yard.store.add_job("job-2", a_job(), 2.0)  # of which nothing is known
    assert looked_at(yard, "job-2").state == JobState.STARTING
    assert yard.store.job("job-1").reason.code == ReasonCode.TRACING


def test_what_does_not_fit_on_gpus_is_traced_for_gpus(yard: Controller) -> None:
    scene(yard).here = [a_node(gpus=1, memory_gib=100, gpu_memory_gib=1)]
    submit(yard)
    assert looked_at(yard).reason.code == ReasonCode.TRACING
    assert tracer(yard).asked == [("job-1", "job", "cuda")]
