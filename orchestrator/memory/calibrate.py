"""What measured peaks teach about predictions: how much room to leave. Pure.

Split conformal prediction with a scaled score (Vovk et al. 2005; Lei et al. 2018, section 5.2): the score of an attempt
is by how many cold-start margins it missed its prediction,

    s = (measured - predicted) / margin

and of n scores the ceil((n + 1)(1 - miss))-th smallest is exceeded by the next one with a probability of at most
`miss`, whatever their distribution, as long as it is the same. While n is too small for that, the margin stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

MISS = 0.1
NOTHING_LEARNED = 1.0
"""The factor while attempts are too few."""
LEAST = -1.0
"""A score below counts as this: rows were shorter than they may be, which the next job's need not be."""


class Score(BaseModel):
    """One attempt's peak, beside what was predicted of it."""

    model_config = ConfigDict(frozen=True)

    predicted_bytes: int
    margin_bytes: int
    """The cold-start margin of that prediction."""
    measured_bytes: int
    """Of an attempt that ran out, at least the limit."""

    @property
    def value(self) -> float:
        return (self.measured_bytes - self.predicted_bytes) / max(self.margin_bytes, 1)


def margin_factor(scores: Iterable[Score], miss: float = MISS) -> float:
    """By what to multiply the cold-start margin; below zero where less was needed than predicted."""
    values = sorted(max(LEAST, score.value) for score in scores)
    place = math.ceil((len(values) + 1) * (1 - miss))
    return values[place - 1] if place <= len(values) else NOTHING_LEARNED
