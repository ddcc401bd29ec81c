"""The pointer to a job's newest checkpoint."""

from __future__ import annotations

from launch.contract import CheckpointNote, ProgressLine
from orchestrator.job.checkpoint import LastCheckpoint, newest


def told(*lines: tuple[int, str]) -> LastCheckpoint | None:
    """The pointer after notes of (step, outcome), a second apart."""
    last = None
    for second, (step, outcome) in enumerate(lines):
        note = CheckpointNote.model_validate({"id": f"step-{step}.attempt-1", "step": step, "outcome": outcome})
        last = newest(last, ProgressLine(time=float(second), phase="save", checkpoint=note), "/store")
    return last


def test_the_newest_commit_counts() -> None:
    assert told() is None
    assert told((1, "failed")) is None
    expected = LastCheckpoint(id="step-2.attempt-1", step=2, time=1.0, url="/store/step-2.attempt-1")
    assert told((1, "committed"), (2, "committed"), (3, "failed"), (2, "not-tidied")) == expected


def test_what_is_found_damaged_is_no_checkpoint_and_what_is_gone_on_from_is() -> None:
    assert told((1, "committed"), (2, "committed"), (2, "quarantined")) is None
    resumed = told((1, "committed"), (2, "committed"), (2, "quarantined"), (1, "resumed"))
    assert resumed is not None
    assert (resumed.step, resumed.time) == (1, 3.0)


def test_resuming_does_not_make_a_checkpoint_younger() -> None:
    resumed = told((5, "committed"), (5, "resumed"))
    assert resumed is not None
    assert resumed.time == 0.0
    older = told((5, "committed"), (5, "committed"), (4, "quarantined"))
    assert older is not None
    assert older.step == 5


def test_a_line_without_a_note_changes_nothing() -> None:
    last = told((1, "committed"))
    assert newest(last, ProgressLine(time=9.0, phase="train"), "/store") == last


def test_what_it_went_back_to_is_the_newest() -> None:
    last = told((2, "committed"), (4, "committed"), (2, "rolled-back"))
    assert last is not None
    assert last.step == 2
