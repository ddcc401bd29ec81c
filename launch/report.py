"""A classifier's mistakes, class by class: for metrics.json and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from the others; 0 where there is nothing to divide by."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """Rows that are of this class."""


@dataclass(frozen=True)
class ClassReport:
    """Scores by class, and who was taken for whom."""

    scores: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Rows of class i (row) that were taken for class j (column)."""

    def as_dict(self) -> dict[str, Any]:
        """JSON types: `per_class` by label, and `confusion_matrix` in the order of `labels`."""
        return {
            "per_class": {
                score.label: {
                    "precision": score.precision,
                    "recall": score.recall,
                    "f1": score.f1,
                    "support": score.support,
                }
                for score in self.scores
            },
            "confusion_matrix": {
                "labels": [score.label for score in self.scores],
                "rows_are": "actual",
                "counts": [list(row) for row in self.confusion],
            },
        }

    def as_markdown(self) -> list[str]:
        """Two tables."""
        names = [_cell(score.label) for score in self.scores]
        return [
            "| class | precision | recall | F1 | rows |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {name} | {score.precision:.4f} | {score.recall:.4f} | {score.f1:.4f} | {score.support} |"
                for name, score in zip(names, self.scores, strict=True)
            ),
            "",
            "| actual \\ predicted | " + " | ".join(names) + " |",
            "| --- |" + " --- |" * len(names),
            *(
                f"| {name} | " + " | ".join(str(count) for count in row) + " |"
                for name, row in zip(names, self.confusion, strict=True)
            ),
        ]


def _cell(label: str) -> str:
    """A label is the user's text: kept from ending the cell or the line."""
    return " ".join(label.split()).replace("|", "\\|")


def class_report(actual: npt.NDArray[Any], predicted: npt.NDArray[Any], labels: Sequence[str]) -> ClassReport:
    """Of rows with class numbers `actual` that were taken for `predicted`; a class without rows is in it, too."""
    # Late, as in launch.metrics.
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = np.arange(len(labels))
    columns = precision_recall_fscore_support(actual, predicted, labels=numbers, zero_division=0)
    scores = tuple(
        ClassScore(label, float(precision), float(recall), float(f1), int(support))
        for label, precision, recall, f1, support in zip(labels, *columns, strict=True)
    )
    counts = confusion_matrix(actual, predicted, labels=numbers)
    return ClassReport(scores, tuple(tuple(int(count) for count in row) for row in counts))
