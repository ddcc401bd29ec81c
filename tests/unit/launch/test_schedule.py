"""The learning rate of every step, against transformers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from launch.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_it_is_what_transformers_would_set(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        ours = learning_rate(schedule, 0.5, warmup, step, 10)  # type: ignore[arg-type]
        assert ours == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_a_warm_up_longer_than_the_training_never_divides_by_zero() -> None:
    assert learning_rate("linear", 1.0, 10, 9, 10) == pytest.approx(0.9)
    assert learning_rate("cosine", 1.0, 10, 10, 10) == pytest.approx(1.0)
