"""State that ZeRO-3 keeps in files between steps (ZeRO-Infinity): the files as tensors, and a part of it in memory.

DeepSpeed reads and writes the files past the kernel's cache, and maps of them are in it: what was written to a map is
synced before DeepSpeed reads, and after it has written the kernel forgets what it had cached.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def views(zero: Any) -> dict[int, torch.Tensor]:
    """By the id of each tensor that is in a file and not in memory: its file, mapped to be read and written."""
    return {
        id(one.compute_tensor): torch.from_file(
            one.swap_path, shared=True, size=info.numel(), dtype=one.compute_tensor.dtype
        )
        for info in _swapped(zero).values()
        for one in info.tensors
        if one.compute_tensor.numel() == 0
    }


@contextlib.contextmanager
def in_memory(zero: Any, index: int, *, write: bool = False) -> Iterator[None]:
    """With the optimizer's sub-group `index` read from its files, if it has some; `write` puts it back into them."""
    if not zero._swappable_optimizer_subgroup(index):
        yield
        return
    for one in _swapped(zero)[zero.fp32_partitioned_groups_flat[index].ds_id].tensors:
        with Path(one.swap_path).open("rb") as file:
            os.fsync(file.fileno())
    zero._optimizer_states_and_gradient_swap_in(index)
    yield
    if write:
        zero._optimizer_states_and_gradient_swap_out(index)
    else:
        zero._release_swap_buffers(index)


def _swapped(zero: Any) -> dict[Any, Any]:
    swapper = zero.optimizer_swapper
    return {} if swapper is None else dict(swapper.swap_params_info)
