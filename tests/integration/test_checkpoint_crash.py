"""No kill tears a checkpoint that counts, and no damaged byte is loaded: the harness of benchmarks.checkpoint_crash,
shortly. Deliberate mistakes show that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoint_flips import KINDS, flip
from benchmarks.checkpoint_formats import damage_formats
from benchmarks.checkpoint_kills import Crashes
from benchmarks.checkpoint_stock import kill_stock

ENDS_WITHIN_S = 15
"""Of the ranks that are left, less than they would wait for each other."""


def test_after_a_kill_the_newest_whole_checkpoint_is_resumed(tmp_path: Path) -> None:
    figures = Crashes(tmp_path, seed=7, say=print).kill(6)
    assert figures.wrong == []
    assert figures.kills == 6
    assert figures.resumes > 0
    assert figures.steps_compared > 10


@pytest.mark.parametrize(
    ("mistake", "boundary", "counted"),
    [
        ("marker-first", "committed", "torn_commits"),
        ("without-marker", "manifest-written", "resumed_from_incomplete"),
        ("unawaited-copy", "tidied", "wrong_after_resume"),
    ],
)
def test_a_mistake_is_told_apart(tmp_path: Path, mistake: str, boundary: str, counted: str) -> None:
    figures = Crashes(tmp_path, seed=7, mistake=mistake, boundaries=(boundary,)).kill(2)
    assert getattr(figures, counted) > 0
    assert figures.wrong


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(tmp_path: Path) -> None:
    figures = flip(tmp_path, 60, seed=7)
    assert figures.wrong == []
    assert figures.flips == figures.detected == 60


def test_loading_without_hashes_is_told_apart(tmp_path: Path) -> None:
    figures = flip(tmp_path, 10, seed=7, mistake="without-hashes", kinds=("flip-tensor",))
    assert figures.undetected == 10


def test_other_formats_load_damaged_data_silently(tmp_path: Path) -> None:
    """Otherwise the comparison would say nothing."""
    for figures in damage_formats(tmp_path, 40, 7, print).values():
        assert figures.silent_wrong > 0
        assert figures.silent < figures.faults


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_kills_and_faults(tmp_path: Path) -> None:
    kills = Crashes(tmp_path / "kills", seed=11, say=print).kill(60)
    assert kills.wrong == []
    assert kills.ended_after_s < ENDS_WITHIN_S
    faults = flip(tmp_path / "flips", 500, seed=11)
    assert faults.wrong == []
    assert faults.by_kind.keys() == KINDS.keys()
    assert kill_stock(tmp_path / "stock", 10, 11, print).stock_torn > 0
