"""Deleting what the retention leaves over, after a commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.manifest import CheckpointId
from launch.checkpoint.retention import Retention, superfluous


class Tidier:
    """Knows the metrics of checkpoints, so that a manifest is read once."""

    def __init__(self, catalogue: Catalogue, retention: Retention, metric: str | None) -> None:
        """`metric` is what retention.keep_best looks at."""
        self._catalogue, self._retention, self._metric = catalogue, retention, metric
        self._values: dict[CheckpointId, float | None] = {}

    def after(self, newest: CheckpointId, metrics: Mapping[str, float] | None) -> None:
        """Delete what may go now that `newest` is committed, unless a higher attempt has begun: it may have chosen any
        of them.

        Raises:
            CheckpointError: the store fails; what was to go is looked at again next time.
        """
        self._values[newest] = self._value(metrics)
        listing = self._catalogue.listing()
        lineage = [found for found in listing.lineage() if found <= newest]
        if self._retention.keep_best:
            self._learn(lineage)
        if listing.begun > newest.attempt:  # looked at after the commit: see catalogue.py
            return
        values = {found: value for found, value in self._values.items() if value is not None}
        for old in superfluous(lineage, self._retention, listing.pinned, values):
            self._catalogue.delete(old)
            self._values.pop(old, None)

    def _learn(self, lineage: Sequence[CheckpointId]) -> None:
        for found in lineage:
            if found not in self._values:
                self._values[found] = self._value(self._catalogue.manifest(found).metrics)

    def _value(self, metrics: Mapping[str, float] | None) -> float | None:
        """None where there is none, or no number: that is nobody's best."""
        value = (metrics or {}).get(self._metric) if self._metric else None
        return None if value is None or value != value else value
