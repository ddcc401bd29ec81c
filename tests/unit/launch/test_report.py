"""A report by class against scikit-learn's numbers, and as tables."""

from __future__ import annotations

import numpy as np
import pytest

from launch.report import class_report


def test_every_class_has_its_numbers() -> None:
    actual, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 1])
    report = class_report(actual, predicted, ("ham", "spam", "unseen", "a|b"))
    told = report.as_dict()
    assert told["confusion_matrix"]["counts"] == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert told["confusion_matrix"]["labels"] == ["ham", "spam", "unseen", "a|b"]
    ham, spam, unseen = (told["per_class"][label] for label in ("ham", "spam", "unseen"))
    assert ham == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert spam == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 0.4, "support": 2})
    assert set(unseen.values()) == {0}
    tables = report.as_markdown()
    assert "| ham | 0.6667 | 0.6667 | 0.6667 | 3 |" in tables
    assert "| ham | 2 | 1 | 0 | 0 |" in tables
    assert "| a\\|b | 0 | 1 | 0 | 0 |" in tables
