"""Gradients that ranks on one host average in shared memory: the mean, the same on all, and a lost rank is noticed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

import launch.nearby
from launch.engine_config import NEARBY_BYTES
from launch.nearby import Nearby

RANKS = 3
SIZES = (0, 1, 2, 7, 1000, NEARBY_BYTES // 4, NEARBY_BYTES // 4 + 5, 3 * (NEARBY_BYTES // 4) + 1)


def a_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def together(work: Any, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in RANKS processes, which are a process group."""
    multiprocessing.spawn(begin, (work, a_port(), *arguments), nprocs=RANKS)


def begin(rank: int, work: Any, port: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    work(rank, *arguments)
    distributed.destroy_process_group()


def gradients_of(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(31 * rank + size)).to(dtype)


def averages(rank: int) -> None:
    nearby = Nearby.open()
    assert nearby is not None
    for turn in range(2):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for size in SIZES:
                mine = gradients_of(rank + turn, size, dtype)
                nearby.average(mine)
                exact = sum(gradients_of(other + turn, size, dtype).double() for other in range(RANKS)) / RANKS
                tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
                torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance)
                everyones = [torch.empty_like(mine) for _ in range(RANKS)]
                distributed.all_gather(everyones, mine)
                assert all(torch.equal(one, mine) for one in everyones)


def one_cannot(rank: int) -> None:
    def nothing(*_: Any) -> None: ...

    for step in ("_made", "_mapped"):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(launch.nearby, step, nothing)
            assert Nearby.open() is None
    assert Nearby.open() is not None


def both(rank: int) -> None:
    averages(rank)
    one_cannot(rank)


def test_the_mean_on_all_ranks_and_no_such_memory_on_any() -> None:
    together(both)


def loses_one(rank: int, folder: str) -> None:
    nearby = Nearby.open()
    assert nearby is not None
    values = torch.ones(1000)
    nearby.average(values)
    if rank == 2:
        os._exit(0)
    with pytest.raises(RuntimeError):
        nearby.average(values)
    (Path(folder) / str(rank)).touch()


def test_a_lost_rank_is_an_error_of_the_others(tmp_path: Path) -> None:
    together(loses_one, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
