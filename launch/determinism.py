"""What makes a rank's numbers depend on nothing but the job, the data, the plan and the machine."""

from __future__ import annotations

import os

import torch
from accelerate.utils import set_seed

from launch.config import OptimSpec
from launch.contract import Pinned

SEEDS = 2**32  # numpy takes none above


def fix_numerics(optim: OptimSpec, pinned: Pinned | None, rank: int) -> None:
    """Fix threads and kernels; before CUDA starts, which reads its part of this once."""
    if pinned is not None:  # of OMP_NUM_THREADS, torch takes no more than this machine has cores
        torch.set_num_threads(pinned.threads[rank])
    if optim.deterministic:
        # cuBLAS and flash attention are told by the environment alone; what somebody set there already is theirs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
        torch.use_deterministic_algorithms(True, warn_only=False)


def seed_all(seed: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's random numbers, with another seed on each rank: for dropout's masks."""
    set_seed((seed + rank) % SEEDS)
