"""A job that is stopped, moved to other layouts, frozen, or out of disk goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.checkpoint.manifest import CheckpointId
from launch.config import AdapterSpec, CheckpointSpec, TrainSpec
from launch.contract import ExitCode, ProgressLine
from launch.data import load_corpus, sampler_for
from launch.model import load_tokenizer
from tests.attempts import Job, losses
from tests.s3 import ObjectStore, an_object_store
from tests.worlds import Launched, a_spec, write_bert, write_messages

ROWS = 147  # steps of 16: nine, and one of three


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_messages(world / "messages.tsv", rows=ROWS)
    return world


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    with an_object_store() as store:
        yield store


def job(world: Path, *, every: int | None = None, dropout: float = 0.0, **changes: Any) -> TrainSpec:
    checkpoint = CheckpointSpec(every_steps=every, **changes.pop("checkpoint", {}))
    spec = a_spec(
        world / "bert", world / "messages.tsv", data={"split": None}, model={"dropout": dropout},
        train={"max_steps": 14, "log_samples": True, **changes.pop("train", {})}, **changes,
    )  # fmt: skip
    return spec.model_copy(update={"checkpoint": checkpoint})


@pytest.mark.parametrize(
    ("engine", "size", "cold"),
    [
        ("single", 1, True),
        ("ddp", 2, False),
        pytest.param("zero2", 2, True, marks=pytest.mark.slow),
        ("zero3", 2, False),
    ],
)
def test_stops_leave_no_trace(world: Path, tmp_path: Path, engine: str, size: int, cold: bool) -> None:
    """In mid-epoch and at an epoch's end, with dropout: losses and weights are bitwise those without the stops."""
    spec = job(world, dropout=0.2)
    whole = Job(spec, tmp_path / "whole")
    expected = losses(whole.run(engine, size))
    stopped = Job(spec, tmp_path / "stopped")
    stopped.run(engine, size, stop_at=4, cold=cold)
    stopped.run(engine, size, stop_at=10, cold=cold)
    ended = stopped.run(engine, size, cold=cold)
    assert [note.step for note in stopped.notes(3) if note.outcome == "resumed"] == [10]
    assert losses(ended) == expected
    assert stopped.model() == whole.model()


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_stop_in_an_evaluation_leaves_no_trace(world: Path, tmp_path: Path, engine: str) -> None:
    """At a step that is to be evaluated, within an evaluation, and within the last one, when the model already has the
    weights of the best: each evaluation is made once, and what they decide is decided as without the stops."""
    changes = {"eval_every": 3, "keep_best": True, "early_stopping": {"metric": "f1_macro", "patience": 2}}
    spec = job(world, dropout=0.2, train={**changes, "learning_rate": 0.02, "max_steps": 20})
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"test": (str(world / "messages.tsv"),)})})
    whole = Job(spec, tmp_path / "whole")
    expected = whole.run(engine, 2)
    stopped = Job(spec, tmp_path / "stopped")
    stopped.run(engine, 2, stop_at=3)
    evaluations = len(measured(whole))
    assert 4 <= evaluations <= 6, "it ends early, by the evaluations"
    for which in (2, evaluations - 1):  # the first of an attempt is the one that is owed
        launched = stopped.begin(engine, 2, "stop-in-evaluation", STOP_IN=str(which))
        assert [end.code for end in launched.wait().values()] == [ExitCode.STOPPED] * 2, launched.logs()
    ended = stopped.run(engine, 2)
    assert measured(stopped) == measured(whole)
    assert losses(ended) == losses(expected)
    assert stopped.model() == whole.model()
    for one, other in zip(ended.values(), expected.values(), strict=True):
        assert one.result is not None
        assert other.result is not None
        assert one.result.metrics == other.result.metrics
        if one.result.train is not None and other.result.train is not None:
            assert one.result.train.stopped_early == other.result.train.stopped_early
            assert one.result.train.best_step == other.result.train.best_step


def measured(job: Job) -> list[tuple[int, dict[str, float]]]:
    """Every evaluation of a job, the last one of the finished model."""
    texts = [launched.files.progress(0).read_text() for launched in job.attempts]
    lines = [ProgressLine.model_validate_json(line) for text in texts for line in text.splitlines()]
    return [(line.step, line.metrics) for line in lines if line.metrics is not None]


def test_every_sample_once(world: Path, tmp_path: Path) -> None:
    """Three stops and two changes of the world size within an epoch: what was trained on is the epoch, in its order."""
    spec = job(world, train={"max_steps": 10})
    resized = Job(spec, tmp_path)
    layouts = [("ddp", 2, 2), ("zero2", 4, 5), ("zero3", 4, 8), ("single", 1, None)]
    for engine, size, stop_at in layouts:
        resized.run(engine, size, stop_at=stop_at)
    steps: dict[int, list[int]] = {}
    for launched, (_, size, _) in zip(resized.attempts, layouts, strict=True):
        for rank in range(size):
            for line in launched.files.samples(rank).read_text().splitlines():
                seen = json.loads(line)
                steps.setdefault(seen["step"], []).extend(seen["rows"])
    corpus = load_corpus(spec, load_tokenizer(spec.model, None))
    sampler = sampler_for(corpus.train, spec.train)
    assert {step: sorted(rows) for step, rows in steps.items()} == {
        step: sorted(sampler.batch(16 * (step - 1)).tolist()) for step in range(1, 11)
    }
    assert sorted(row for rows in steps.values() for row in rows) == list(range(ROWS))


@pytest.mark.parametrize(
    ("layouts", "changes"),
    [
        pytest.param([("zero2", 2), ("ddp", 2), ("zero3", 2)], {"train": {"precision": "bf16"}}, id="bf16"),
        pytest.param(
            [("ddp", 2), ("zero3", 2), ("single", 1)],
            {"adapter": {"type": "lora", "r": 4, "target_modules": "auto"}},
            id="lora",
        ),
        pytest.param([("ddp", 2), ("zero2", 2), ("zero3", 2)], {"train": {"optimizer": "lion"}}, id="lion"),
        pytest.param([("ddp", 2), ("single", 1), ("ddp", 2)], {"train": {"optimizer": "adafactor"}}, id="adafactor"),
        pytest.param(
            [("zero3", 2), ("ddp", 2), ("zero2", 2)], {"train": {"eval_every": 2, "keep_best": True}}, id="best"
        ),
    ],
)
def test_other_precisions_and_parts_move_too(
    world: Path, tmp_path: Path, layouts: list[tuple[str, int]], changes: dict[str, Any]
) -> None:
    spec = job(world, **changes)
    if "eval_every" in changes.get("train", {}):
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"test": (str(world / "messages.tsv"),)})})
    whole = losses(Job(spec, tmp_path / "whole").run(*layouts[0]))
    moved = Job(spec, tmp_path / "moved")
    for (engine, size), stop_at in zip(layouts, (4, 9, None), strict=True):
        ended = moved.run(engine, size, stop_at=stop_at)
    # bf16 engines round where autocast does not, and a gradient's rounding decides Lion's signs.
    loose = spec.train.precision == "bf16" or spec.train.optimizer == "lion"
    assert losses(ended) == pytest.approx(whole, abs=0.05 if loose else 2e-5)
    if isinstance(spec.adapter, AdapterSpec):
        newest = moved.catalogue.manifest(moved.catalogue.listing().committed[0])
        weights = [name for name in newest.tensors if name.startswith("weight/")]
        assert weights, "the adapter and the head"
        assert all("lora" in name or "classifier" in name for name in weights)


def test_by_the_clock_all_ranks_save_at_one_step(world: Path, tmp_path: Path) -> None:
    """Rank 0 has the clock; the others learn of it in time, or they would hang."""
    timed = Job(job(world, checkpoint={"every_minutes": 0.0005, "keep_last": 99}), tmp_path)
    timed.run("ddp", 2)
    saved = [note.step for note in timed.notes(1) if note.outcome == "committed"]
    assert len(saved) >= 3
    assert sorted(set(saved)) == saved
    assert {found.step for found in timed.catalogue.listing().committed} == set(saved)


def frozen_rank(launched: Launched, timeout_s: float = 60) -> psutil.Process:
    """Rank 0, once it has been stopped by a signal."""
    deadline = time.monotonic() + timeout_s
    file = launched.files.process(0)
    while time.monotonic() < deadline:
        if file.exists():
            rank = psutil.Process(json.loads(file.read_text())["pid"])
            if rank.status() == psutil.STATUS_STOPPED:
                return rank
        time.sleep(0.02)
    raise AssertionError(f"it did not freeze\n{launched.logs()}")


@pytest.mark.parametrize(
    ("boundary", "kind"),
    [("voted", "file"), ("manifest-written", "file"), ("manifest-written", "s3"), ("committed", "s3")],
)
def test_a_frozen_attempt_changes_nothing(
    world: Path, tmp_path: Path, object_store: ObjectStore, boundary: str, kind: str
) -> None:
    """Attempt 1 is stopped in its second save, and goes on after attempt 2 has committed: nothing that is ever loaded
    is another. It ends by itself, since attempt 2 has begun."""
    spec = job(world, every=2, checkpoint={"keep_last": 2})
    store = f"{object_store.url}/{tmp_path.name}" if kind == "s3" else None
    frozen = Job(spec, tmp_path, store, **(object_store.environment if kind == "s3" else {}))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        first = frozen.begin("ddp", 2, "freeze-at", FREEZE_AT=boundary)
        rank = frozen_rank(first)
        second = frozen.begin("zero2", 2)
        second.wait_for('"step-8.attempt-2"')
        rank.send_signal(signal.SIGCONT)
        ended = first.wait()
        assert second.wait()[0].code == ExitCode.DONE, second.logs()
        resumed = [note.step for note in frozen.notes(2) if note.outcome == "resumed"]
        assert resumed == [4 if boundary == "committed" else 2]
        if boundary == "voted":  # it learns so before the commit; later it learns at the next save
            assert ended[0].error is not None
            assert ended[0].error.code == "attempt-superseded"
        assert ended[0].code == ExitCode.CRASH
        listing = frozen.catalogue.listing()
        assert listing.lineage()[:2] == (CheckpointId(14, 2), CheckpointId(12, 2))
        assert all(found.attempt == 2 or found.step <= resumed[0] for found in listing.lineage())
        third = frozen.run("single", 1)
        assert third[0].code == ExitCode.DONE
        assert [note.id for note in frozen.notes(3) if note.outcome == "resumed"] == ["step-14.attempt-2"]


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_planned_stop_waits_for_a_slow_store(
    world: Path, tmp_path: Path, object_store: ObjectStore, seconds: float
) -> None:
    spec = job(world)
    stopped = Job(spec, tmp_path, f"{object_store.url}/{tmp_path.name}", **object_store.environment)
    object_store.slow["rank-1.safetensors"] = seconds
    launched = stopped.begin("ddp", 2, "stop-at", STOP_AT="5")
    ended = launched.wait(120 + seconds)
    object_store.slow.clear()
    assert ended[0].code == ExitCode.STOPPED, launched.logs()
    (note,) = stopped.notes(1)
    assert (note.outcome, note.step) == ("committed", 5)
    assert note.save_s is not None
    assert note.save_s >= seconds
    stopped.run("zero3", 2)
    assert [note.step for note in stopped.notes(2) if note.outcome == "resumed"] == [5]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_full_disk_loses_nothing(world: Path, tmp_path: Path, small_disk: Path, on_error: str) -> None:
    spec = job(world, every=4, checkpoint={"keep_last": 9, "on_error": on_error})
    full = Job(spec, tmp_path, str(small_disk / "checkpoints"))
    (small_disk / "ballast").write_bytes(b"x" * 1_500_000)
    launched = full.begin("ddp", 2)
    ended = launched.wait()
    notes = full.notes(1)
    assert [(note.step, note.outcome) for note in notes][:2] == [(4, "committed"), (8, "failed")]
    assert notes[1].code == "storage-full"
    if on_error == "continue":
        assert ended[0].code == ExitCode.DONE, launched.logs()
    else:
        assert ended[0].code == ExitCode.CRASH
        assert ended[0].error is not None
        assert (ended[0].error.code, ended[0].error.field) == ("storage-full", "checkpoint.directory")
    assert full.catalogue.listing().committed == (CheckpointId(4, 1),)
    assert not full.catalogue.listing().unfinished, "what could not be finished takes no room"
    (small_disk / "ballast").unlink()
    full.run("zero2", 2)
    assert [note.step for note in full.notes(2) if note.outcome == "resumed"] == [4]
