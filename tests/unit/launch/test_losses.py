"""Losses against torch's own, over a global batch that is cut into parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from launch.data import Rows
from launch.errors import SpecError
from launch.losses import class_losses, loss_terms, weights_of_classes


def labelled(*labels: int) -> Rows:
    count = len(labels)
    return Rows(np.zeros(count, dtype=np.int32), np.arange(count + 1), np.asarray(labels, dtype=np.int64))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, (0.5, 3.0, 1.0)])
def test_parts_add_up_to_torchs_loss_of_the_whole(smoothing: float, weights: tuple[float, ...] | None) -> None:
    rows = labelled(0, 1, 1, 2, 0, 1, 2)
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor(weights) if weights else None
    targets = torch.from_numpy(rows.classes)
    terms = loss_terms(rows, np.arange(7), "sequence-classification", weight)
    total = 0.0
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        total += float(class_losses(logits[part], targets[part], weight, smoothing).sum()) / terms
    stock = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(logits, targets)
    assert total == pytest.approx(stock.item(), rel=1e-6)


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    rows = labelled(0, 0, 0, 0, 1, 2, 2)
    found = weights_of_classes("balanced", rows, ("a", "b", "c"))
    assert found is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=rows.classes)
    assert found.tolist() == pytest.approx(expected.tolist())


def test_a_mapping_may_leave_labels_out_but_not_invent_them() -> None:
    rows = labelled(0, 1)
    assert weights_of_classes(None, rows, ("ham", "spam")) is None
    given = weights_of_classes({"spam": 4.0}, rows, ("ham", "spam"))
    assert given is not None
    assert given.tolist() == [1.0, 4.0]
    with pytest.raises(SpecError, match="'spma'") as caught:
        weights_of_classes({"spma": 4.0}, rows, ("ham", "spam"))
    assert "did you mean 'spam'?" in (caught.value.hint or "")
    with pytest.raises(SpecError, match="'egg'"):
        weights_of_classes("balanced", rows, ("ham", "spam", "egg"))
