"""A step's result is heard at once, or one step later, and never lost."""

from __future__ import annotations

import math

import torch

from launch.tally import Heard, Step, Tally, Wishes, either

CPU = torch.device("cpu")


def told(number: int) -> tuple[Step, torch.Tensor]:
    return Step(number, 8 * number, 0.1, 4.0), torch.tensor(2.0 * number, dtype=torch.float64)


def test_at_once() -> None:
    tally = Tally(CPU, late=False)
    for number in (1, 2):
        step, loss_sum = told(number)
        assert tally.tell(step, loss_sum, Wishes(number == 2)) == Heard(step, number / 2, Wishes(number == 2))
    assert tally.rest() is None


def test_a_step_later() -> None:
    tally = Tally(CPU, late=True)
    first, second = told(1), told(2)
    assert tally.tell(*first, Wishes(stop=True, save=True)) is None
    assert tally.tell(*second, Wishes()) == Heard(first[0], 0.5, Wishes(stop=True, save=True))
    assert tally.rest() == Heard(second[0], 1.0, Wishes())
    assert tally.rest() is None


def test_a_loss_that_is_no_number_stays_one() -> None:
    heard = Tally(CPU, late=False).tell(told(1)[0], torch.tensor(math.nan, dtype=torch.float64), Wishes())
    assert heard is not None
    assert math.isnan(heard.loss)


def test_what_either_wishes() -> None:
    assert either(Wishes(stop=True), Wishes(give_up=True)) == Wishes(stop=True, give_up=True)
    assert not any(either(Wishes(), Wishes()))
