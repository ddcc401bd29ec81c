"""The learning rate of every step, against transformers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler, get_wsd_schedule

from launch.config import OptimSpec
from launch.schedule import learning_rate, rate_at, share_of


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


@pytest.mark.parametrize(("warmup", "decay"), [(0, 4), (3, 4), (3, 7)])
def test_warm_up_stable_decay_is_transformers_own(warmup: int, decay: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_wsd_schedule(optimizer, warmup, decay, num_training_steps=10, decay_type="linear")
    for step in range(10):
        assert learning_rate("wsd", 0.5, warmup, step, 10, decay) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_a_decay_longer_than_what_the_warm_up_leaves_starts_after_it() -> None:
    assert [learning_rate("wsd", 1.0, 2, step, 4, 9) for step in range(4)] == [0.0, 0.5, 1.0, 0.5]


def test_shares_are_of_all_steps_and_rounded_up() -> None:
    assert [share_of(0.1, steps) for steps in (1, 10, 11, 30)] == [1, 1, 2, 3]
    assert share_of(0.0, 30) == 0
    optim = OptimSpec(max_steps=30, learning_rate=1.0, schedule="wsd", warmup_ratio=0.1)
    rates = [rate_at(optim, step, 30) for step in range(30)]
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert rates[26:] == pytest.approx([1, 1, 2 / 3, 1 / 3]), "a tenth is the end, where the file says nothing"
    steps = OptimSpec(max_steps=30, learning_rate=1.0, schedule="wsd", warmup_steps=3, decay_ratio=0.1)
    assert [rate_at(steps, step, 30) for step in range(30)] == rates
