"""What a loop does about a loss that has exploded. All ranks see the same losses, so they do it at the same step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.guard import Explosion
from launch.losses import exploded
from launch.tally import Wishes

if TYPE_CHECKING:
    from launch.train import Loop


def go_back(loop: Loop, why: Explosion) -> None:
    """Go on from the last checkpoint before the explosion; the batches that did it are left out from now on.

    Raises:
        SpecError: the job does not say so, or it has been enough, or there is no such checkpoint.
        CheckpointError: the store fails.
    """
    loop.settle()  # a step later, on a GPU: it was trained in vain
    guard, feed = loop.guard, loop.feed
    if not guard.may_go_back:
        raise exploded(why, guard.rollbacks)
    samples = feed.consumed_after(why.first - 1), feed.consumed_after(why.last)
    found = loop.saving.roll_back(why, samples, loop.fingerprint, loop.best)
    if found is None:
        raise exploded(why, guard.rollbacks, "there is no checkpoint from before it: save more often")
    left_out, rollbacks = [*guard.left_out, (why.first, why.last)], guard.rollbacks + 1
    loop.goes_on_from(*found)
    guard.left_out, guard.rollbacks = left_out, rollbacks


def leave_out(loop: Loop) -> Wishes:
    """Let the next step's batch pass untrained, and its learning rate with it."""
    wishes, rows = loop.settle(), loop.feed.chosen(loop.consumed)
    loop.step, loop.consumed, loop.skipped = loop.step + 1, loop.consumed + len(rows), loop.skipped + 1
    loop.progress.skipped(loop.step, loop.steps, loop.consumed, loop.skipped)
    if loop.seen is not None and loop.rank == 0:
        loop.seen.write(loop.step, rows.tolist(), left_out=True)
    return wishes
