"""Saves and resumes of one process: what a save is of, who waits for whom, and what is never begun from scratch."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.checkpoint.checkpoints import Checkpoints
from launch.checkpoint.draft import Policy
from launch.checkpoint.manifest import CheckpointError, CheckpointId, LogicalTensor, Unusable
from launch.checkpoint.retention import Retention
from launch.checkpoint.snapshot import HostBuffer
from launch.checkpoint.state import PlainState
from launch.checkpoint.storage import LocalStorage
from launch.checkpoint.stored import StoredTensors
from launch.contract import ExecutionPlan

PLAN = ExecutionPlan(
    engine="single", world_size=1, device="cpu", micro_batch_size=1, gradient_accumulation_steps=1
)  # fmt: skip


class Training:
    """A network with a buffer, its optimizer and its checkpoints."""

    def __init__(self, store: Path, width: int = 8, **policy: Any) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.checkpoints = Checkpoints(
            PlainState(self.module, self.optimizer, 0, 1), LocalStorage(store), attempt=None, job="job", plan=PLAN,
            rank=0, policy=Policy(**policy),
        )  # fmt: skip

    def forward(self) -> None:
        self.module(torch.randn(6, 4)).square().sum().backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> dict[str, torch.Tensor]:
        found = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"{key}/{name}"] = value.clone()
        return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("policy", [{}, {"asynchronous": False}, {"host_memory": 100}])
def test_what_is_resumed_is_what_was_saved(tmp_path: Path, policy: dict[str, Any]) -> None:
    """From a copy, without one, and without one since there is no room for it."""
    first = Training(tmp_path, **policy)
    assert first.checkpoints.resume() is None
    first.checkpoints.prepare()
    for step in (1, 2):
        first.forward()
        first.step()
        first.checkpoints.save(step, samples=6 * step, loop={"note": step}, metrics={"loss": float("nan")})
    saved, drawn = first.held(), torch.get_rng_state()
    first.forward()
    first.step()
    first.checkpoints.finish()
    second = Training(tmp_path)
    manifest = second.checkpoints.resume()
    assert manifest is not None
    assert (manifest.step, manifest.samples, manifest.loop) == (2, 12, {"note": 2})
    assert same(second.held(), saved)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not same(first.held(), saved)
    notes = first.checkpoints.news()
    assert [(note.step, note.outcome) for note in notes] == [(1, "committed"), (2, "committed")]
    held_up = [note.blocked_s for note in notes]
    assert all(seconds is not None and seconds > 0 for seconds in held_up)


def test_weights_wait_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass goes on beside the copy, and changes buffers; the optimizer's step does not."""
    training = Training(tmp_path)
    training.checkpoints.resume()
    training.forward()
    training.step()
    go, begun = threading.Event(), threading.Event()
    copy: Callable[..., None] = HostBuffer.copy

    def slow(*arguments: Any) -> None:
        begun.set()
        assert go.wait(30)
        copy(*arguments)

    monkeypatch.setattr(HostBuffer, "copy", slow)
    saved = training.held()
    training.checkpoints.save(1)
    assert begun.wait(30)
    training.forward()
    assert not torch.equal(training.module.state_dict()["1.running_mean"], saved["1.running_mean"])
    stepping = threading.Thread(target=training.step)
    stepping.start()
    stepping.join(0.2)
    assert stepping.is_alive(), "it waits"
    assert torch.equal(training.module.state_dict()["0.weight"], saved["0.weight"])
    go.set()
    stepping.join(30)
    training.checkpoints.finish()
    (note,) = training.checkpoints.news()
    assert note.blocked_s is not None
    assert note.blocked_s >= 0.15, "the wait is counted"
    resumed = Training(tmp_path)
    resumed.checkpoints.resume()
    assert same(resumed.held(), saved)
    assert not same(training.held(), saved)


def test_a_damaged_one_is_set_aside_and_the_one_before_taken(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.checkpoints.resume()
    held = {}
    for step in (1, 2):
        first.forward()
        first.step()
        held[step] = first.held()
        first.checkpoints.save(step, wait=True)
    shard = tmp_path / "step-2.attempt-1" / "rank-0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    second = Training(tmp_path)
    manifest = second.checkpoints.resume()
    assert manifest is not None
    assert manifest.step == 1
    assert same(second.held(), held[1])
    notes = second.checkpoints.news()
    assert [(note.step, note.outcome) for note in notes] == [(2, "quarantined"), (1, "resumed")]
    why = json.loads((tmp_path / "step-2.attempt-1" / "QUARANTINED.json").read_text())["reason"]
    assert "rank-0.safetensors" in why


def test_a_job_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.checkpoints.resume()
    first.forward()
    first.step()
    first.checkpoints.save(1, wait=True)
    (tmp_path / "step-1.attempt-1" / "rank-0.safetensors").unlink()
    for _ in range(2):  # the second time it is in quarantine already
        with pytest.raises(Unusable) as refused:
            Training(tmp_path).checkpoints.resume()
        assert refused.value.code == "no-good-checkpoint"
        assert "prune --quarantined" in (refused.value.hint or "")


def test_another_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.checkpoints.resume()
    first.checkpoints.save(0, wait=True)
    other = Training(tmp_path, width=9)
    before = other.held()
    with pytest.raises(Unusable) as refused:
        other.checkpoints.resume()
    assert refused.value.code == "checkpoint-differs"
    assert "[8, 4]" in refused.value.message
    assert all(torch.equal(other.held()[name], before[name]) for name in before)


def test_what_is_kept(tmp_path: Path) -> None:
    """The last, every third, the best two by the metric, and what is pinned; a metric may be no number."""
    retention = Retention(keep_last=1, keep_every=3, keep_best=2)
    losses = {1: 0.9, 2: 0.1, 4: float("nan"), 5: 0.2, 7: 0.8}
    for steps in (range(1, 6), range(6, 9)):  # the second attempt reads the metrics of the first
        training = Training(tmp_path, retention=retention, metric="loss")
        training.checkpoints.resume()
        for step in steps:
            metrics = {"loss": losses[step]} if step in losses else None
            training.checkpoints.save(step, metrics=metrics, wait=True)
            if step == 4:
                training.checkpoints._catalogue.pin(CheckpointId(4, 1))
    kept = [found.step for found in training.checkpoints._catalogue.listing().committed]
    assert kept == [8, 6, 5, 4, 3, 2]


def test_a_part_that_nobody_has_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, stop_on_error=True)
    training.checkpoints.resume()
    tensors = PlainState.tensors
    more = LogicalTensor(dtype="float32", shape=(3,))
    monkeypatch.setattr(PlainState, "tensors", lambda state: {**tensors(state), "weight/absent": more})
    with pytest.raises(CheckpointError) as refused:
        training.checkpoints.save(1, wait=True)
    assert refused.value.code == "state-incomplete"
    assert not (tmp_path / "step-1.attempt-1").exists()


def test_stored_tensors_are_whole(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.checkpoints.resume()
    training.forward()
    training.step()
    training.checkpoints.save(1, wait=True)
    manifest = training.checkpoints._catalogue.manifest(CheckpointId(1, 1))
    stored = StoredTensors(LocalStorage(tmp_path), manifest)
    assert sorted(stored.names("weight")) == sorted(name for name, _ in training.module.named_parameters())
    assert all(torch.equal(stored.read(f"weight/{n}"), p.detach()) for n, p in training.module.named_parameters())
    assert int(stored.read("buffer/1.num_batches_tracked")) == 1
