"""The copy that a thread writes is the file's bytes, and takes no core from those that compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint.manifest import BLOCK
from launch.checkpoint.snapshot import HostBuffer, Layout, streamed_blocks
from launch.checkpoint.state import Part

IN_A_THREAD = """
import os, threading
import torch
from launch.checkpoint.snapshot import HostBuffer, Layout, streamed_blocks
from tests.unit.launch.checkpoint.test_snapshot import some_parts

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.zeros(1 << 20).add_(1.0)  # the main thread's team
parts = some_parts()
layout = Layout(parts)
before, within = tasks(), []

def work():
    within.append(tasks())
    buffer = HostBuffer(layout, pinned=False)
    buffer.copy(parts)
    assert sum(len(block) for block in buffer.blocks()) == layout.size
    assert sum(len(block) for block in streamed_blocks(layout, parts)) == layout.size
    within.append(tasks())
    torch.zeros(1 << 20).add_(1.0)  # what is looked for, if it were done
    within.append(tasks())

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(before, *within)
"""


def some_parts() -> list[Part]:
    """More elements than a block has, of all sizes; a header longer than a block."""
    draw = np.random.default_rng(0)
    return [
        Part("weight/large", 5, torch.from_numpy(draw.standard_normal(BLOCK // 2).astype(np.float32))),
        Part("weight/half", 0, torch.ones(1001, dtype=torch.bfloat16)),
        Part("rng-0/torch", 0, torch.arange(255, dtype=torch.uint8)),
        Part("buffer/count", 0, torch.tensor([7], dtype=torch.int64)),
        *(Part(f"weight/{'n' * 200}-{number}", 0, torch.full((1,), float(number))) for number in range(16_000)),
    ]


def test_a_shard_is_safetensors_and_the_same_without_a_copy(tmp_path: Path) -> None:
    parts = some_parts()
    layout = Layout(parts)
    assert len(layout.header) > BLOCK
    buffer = HostBuffer(layout, pinned=False)
    buffer.copy(parts)
    copied = b"".join(buffer.blocks())
    streamed = b"".join(bytes(block) for block in streamed_blocks(layout, parts))
    assert len(copied) == layout.size
    assert copied == streamed
    (tmp_path / "shard.safetensors").write_bytes(copied)
    found = load_file(tmp_path / "shard.safetensors")
    assert all(torch.equal(found[f"{part.name}[{part.start}]"], part.tensor) for part in parts[:5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU go through pinned memory")
def test_a_gpu_is_copied_from_beside_its_work(tmp_path: Path) -> None:
    layout_of = [Part("weight/w", 0, torch.randn(1 << 20, device="cuda"))]
    buffer = HostBuffer(Layout(layout_of), pinned=True)
    expected = layout_of[0].tensor.cpu()
    after = torch.cuda.current_stream().record_event()
    buffer.copy(layout_of, after)
    layout_of[0].tensor.zero_()
    (tmp_path / "shard.safetensors").write_bytes(b"".join(buffer.blocks()))
    assert torch.equal(load_file(tmp_path / "shard.safetensors")["weight/w[0]"], expected)


def test_a_thread_that_copies_has_no_threads_of_openmps_own() -> None:
    """Once one does, there are more of them than cores, and all sleep between operations instead of spinning."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, started, copied, computed = map(int, done.stdout.split())
    assert started == copied == before + 1
    assert computed == copied + 1, "a parallel operation does show"
