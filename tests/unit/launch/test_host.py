from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch.host import cores_of_rank, resident_bytes


def test_ranks_that_fill_a_node_divide_its_cores() -> None:
    cores = [0, 1, 2, 3, 6, 7, 8, 9]
    mine = [cores_of_rank(cores, 2, rank, 4) for rank in range(4)]
    assert mine == [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert cores_of_rank(cores, 8, 0, 1) == cores


def test_others_are_left_to_the_kernel() -> None:
    """A gang smaller than the node, or one with more threads than there are cores."""
    assert cores_of_rank([0, 1, 2, 3], 1, 0, 2) == []
    assert cores_of_rank([0, 1], 1, 3, 4) == []


PROBE = """
import os, sys, torch
from pathlib import Path
from launch.host import Share, take_share
share = take_share("cpu")
of = lambda thread: sorted(os.sched_getaffinity(thread))
cores = sorted(os.sched_getaffinity(0))
assert len(share.threads) == torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]), share
assert all(of(thread) == cores for thread in share.threads)
share.pin()
if len(share.cores) == len(share.threads):
    assert [of(thread) for thread in share.threads] == [[core] for core in share.cores]
a = torch.randn(300, 300)
assert torch.isfinite(a @ a).all()
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_takes_its_share(threads: int) -> None:
    """In a process of its own: allocator and cores are the process's for good."""
    if threads > (os.cpu_count() or 1):
        pytest.skip("fewer cores than threads")
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


HELD = """
import sys, torch
from launch.host import resident_bytes, take_share
assert take_share("cpu", sys.argv[1]).allocator == sys.argv[1]
torch.zeros(1 << 20)
before = resident_bytes()
blocks = [torch.ones(1 << 18) for _ in range(64)]  # of a MiB each
most = resident_bytes()
del blocks
print(most - before, resident_bytes() - before)
"""


@pytest.mark.parametrize("allocator", ["fast", "tight"])
def test_an_allocator_keeps_what_is_freed_or_gives_it_back(allocator: str) -> None:
    done = subprocess.run([sys.executable, "-c", HELD, allocator], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used, left = (int(number) >> 20 for number in done.stdout.split()[-2:])
    assert 48 <= used <= 80  # a heap may have had some of it
    assert left >= 48 if allocator == "fast" else left <= 8


def test_resident_bytes_are_bytes() -> None:
    before = resident_bytes()
    block = bytearray(b"x") * (64 << 20)
    grown = resident_bytes() - before
    assert 60 << 20 <= grown <= 80 << 20
    assert resident_bytes("VmHWM") >= before + len(block) // 2
    assert 0 < resident_bytes("RssFile") < resident_bytes()
    with pytest.raises(AssertionError):
        resident_bytes("VmNone")
