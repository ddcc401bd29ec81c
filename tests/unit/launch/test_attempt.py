"""What torch's allocator on a GPU is told, whoever else tells it something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch.attempt import ENV_ALLOCATOR, expands_segments, told_to_torch

NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
WISH = {ENV_ALLOCATOR: "tight"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, {}),
        ({NEW: "max_split_size_mb:64"}, {NEW: "max_split_size_mb:64"}),
        (WISH, {NEW: "expandable_segments:True"}),
        ({**WISH, NEW: ""}, {NEW: "expandable_segments:True"}),
        ({**WISH, NEW: "max_split_size_mb:64"}, {NEW: "max_split_size_mb:64,expandable_segments:True"}),
        # Torch looks at the older name first, and then at no other.
        ({**WISH, OLD: "backend:native"}, {OLD: "backend:native,expandable_segments:True"}),
        ({**WISH, OLD: "a:1", NEW: "b:2"}, {OLD: "a:1,expandable_segments:True", NEW: "b:2"}),
        ({**WISH, NEW: "expandable_segments:False"}, {NEW: "expandable_segments:False"}),
        ({**WISH, NEW: "a:1, expandable_segments:True"}, {NEW: "a:1, expandable_segments:True"}),
    ],
)
def test_what_the_user_says_stands(environment: dict[str, str], told: dict[str, str]) -> None:
    assert told_to_torch({"PATH": "/bin", **environment}) == {"PATH": "/bin", **told}


def test_settings_are_read_as_torch_reads_them() -> None:
    assert expands_segments("max_split_size_mb:64") is None
    assert expands_segments(" max_split_size_mb:64 , expandable_segments : True") is True
    assert expands_segments("expandable_segments:False") is False


PROBE = """
from launch.errors import ContractError
from launch.host import take_share
for planned in ("fast", "tight"):
    try:
        print(take_share("cuda", planned).allocator)
    except ContractError as problem:
        print(problem.field)
"""


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, ["fast", "plan.allocator"]),
        (told_to_torch(WISH), ["tight", "tight"]),
        (told_to_torch({**WISH, OLD: "max_split_size_mb:64"}), ["tight", "tight"]),
        (told_to_torch({**WISH, NEW: "expandable_segments:False"}), ["fast", "plan.allocator"]),
        ({OLD: "max_split_size_mb:64", NEW: "expandable_segments:True"}, ["fast", "plan.allocator"]),
    ],
)
def test_a_rank_finds_what_its_torch_has_read(environment: dict[str, str], found: list[str]) -> None:
    """Torch's own answer, which no GPU is needed for."""
    clean = {name: value for name, value in os.environ.items() if name not in (NEW, OLD)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == found
