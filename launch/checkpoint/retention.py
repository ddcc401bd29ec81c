"""Which checkpoints are kept: pure. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from launch.checkpoint.manifest import CheckpointId


@dataclass(frozen=True)
class Retention:
    """The newest so many; beside them every so many steps, and the best by a metric."""

    keep_last: int = 3
    keep_every: int | None = None
    """Also those whose step is a multiple of this."""
    keep_best: int = 0
    """Also so many with the best values of the metric, of those that were evaluated at their step."""
    higher_is_better: bool = False


def superfluous(
    lineage: Sequence[CheckpointId],
    retention: Retention,
    pinned: Collection[CheckpointId] = (),
    values: Mapping[CheckpointId, float] | None = None,
) -> list[CheckpointId]:
    """Those of `lineage` (the newest first, all good) that may go; never the newest, whatever `retention` says."""
    kept = set(lineage[: max(1, retention.keep_last)]) | set(pinned)
    if retention.keep_every:
        kept |= {found for found in lineage if found.step % retention.keep_every == 0}
    if retention.keep_best:
        sign = -1.0 if retention.higher_is_better else 1.0
        measured = {found: sign * value for found, value in (values or {}).items() if found in set(lineage)}
        # Of equals the earlier: it has the value with less training.
        kept |= set(sorted(measured, key=lambda found: (measured[found], found))[: retention.keep_best])
    return [found for found in lineage if found not in kept]
