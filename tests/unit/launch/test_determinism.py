"""Seeds and threads of a rank."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from launch.config import OptimSpec
from launch.contract import ExecutionPlan, Pinned
from launch.determinism import fix_numerics, seed_all

PLAN = ExecutionPlan(engine="ddp", world_size=2, device="cpu", micro_batch_size=1, gradient_accumulation_steps=1)


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_source_is_seeded_and_ranks_draw_differently(seed: int) -> None:
    told = []
    for rank in (0, 1, 0):
        seed_all(seed, rank)
        told.append(drawn())
    assert told[0] == told[2]
    assert all(one != two for one, two in zip(told[0], told[1], strict=True))


def test_a_pinned_rank_computes_with_its_recorded_threads() -> None:
    pinned = Pinned(plan=PLAN, threads=(1, 3), data={})
    for rank, threads in enumerate(pinned.threads):
        fix_numerics(OptimSpec(max_steps=1), pinned, rank)
        assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_kernels_are_asked_for_and_not_just_wished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # as good, and somebody's choice
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    fix_numerics(OptimSpec(max_steps=1, deterministic=True), None, 0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
