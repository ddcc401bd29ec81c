"""Optimizers: Lion's formula, and what each remembers."""

from __future__ import annotations

import pytest
import torch

from launch.config import OptimSpec
from launch.optimizers import Lion, make_optimizer, state_bytes


def test_lion_follows_the_paper() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([{"params": [weight], "weight_decay": 0.1}], lr=0.5, betas=(0.9, 0.99))
    # Each value alone, in plain Python numbers.
    expected, momentum = [1.0, -2.0, 3.0], [0.0, 0.0, 0.0]
    for gradients in ([1.0, -1.0, 0.0], [-0.05, 0.2, 0.0], [-0.3, 0.001, 1.0]):
        weight.grad = torch.tensor(gradients)
        optimizer.step()
        for i, gradient in enumerate(gradients):
            direction = 0.9 * momentum[i] + 0.1 * gradient
            sign = (direction > 0) - (direction < 0)
            expected[i] -= 0.5 * (sign + 0.1 * expected[i])
            momentum[i] = 0.99 * momentum[i] + 0.01 * gradient
        assert weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adamw", 2 * (6 * 4 + 5)),
        ("lion", 6 * 4 + 5),
        ("adafactor", 6 + 4 + 5),  # a row and a column of the matrix; a vector in full
    ],
)
def test_what_it_remembers_is_counted(name: str, numbers: int) -> None:
    matrix, vector, frozen = (torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (5,), (7, 7)))
    optim = OptimSpec.model_validate({"max_steps": 1, "optimizer": name, "learning_rate": 0.1})
    optimizer = make_optimizer([{"params": [matrix, vector, frozen], "weight_decay": 0.0}], optim)
    assert state_bytes(optimizer) == 0
    (matrix.sum() + vector.sum()).backward()
    optimizer.step()
    assert state_bytes(optimizer) == 4 * numbers
    assert float(matrix.detach().max()) < 1
