"""Curves over the rows of a micro-batch, and which passes a plan runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.contract import ExecutionPlan
from launch.footprint_record import Curve, Footprint, Line, Passes

NONE = Line(base=0, per_row=0)


def test_a_curve_is_linear_between_its_points_and_goes_on_as_at_its_ends() -> None:
    curve = Curve(rows=(2, 4, 10), bytes=(100.0, 300.0, 360.0))
    assert [curve.at(rows) for rows in (2, 3, 4, 7, 10, 12)] == [100, 200, 300, 330, 360, 380]
    assert curve.at(1) == 0


@given(st.lists(st.integers(1, 500), min_size=2, max_size=6, unique=True).map(sorted), st.floats(0, 1e6), st.data())
def test_a_curve_on_a_line_is_the_line(rows: list[int], base: float, data: st.DataObject) -> None:
    line = Line(base=base, per_row=data.draw(st.floats(0, 1e6)))
    curve = Curve(rows=tuple(rows), bytes=tuple(line.at(count) for count in rows))
    at = data.draw(st.integers(1, 600))
    assert curve.at(at) == pytest.approx(line.at(at), rel=1e-6, abs=1e-3)


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=6).map(sorted))
def test_a_curve_of_points_that_rise_rises(heights: list[float]) -> None:
    curve = Curve(rows=tuple(range(1, 3 * len(heights), 3)), bytes=tuple(heights))
    found = [curve.at(rows) for rows in range(1, 30)]
    assert found == pytest.approx(sorted(found))


def passes(base: float, **changes: Any) -> Passes:
    values = {"precision": "bf16", "native": False, "activation_checkpointing": False, "loss": "whole"}
    curve = Line(base=base, per_row=0)
    return Passes(**(values | changes), beside_gradients=curve, with_gradients=NONE, at_loss=NONE)


def a_footprint(*ways: Passes) -> Footprint:
    return Footprint(source="traced", length=8, parameters=1, trainable=1, moments_bytes=8, passes=ways)


def a_plan(**changes: Any) -> ExecutionPlan:
    values = {"engine": "single", "world_size": 1, "device": "cpu", "micro_batch_size": 1}
    return ExecutionPlan(**(values | {"gradient_accumulation_steps": 1, "precision": "bf16"} | changes))


def test_a_plan_runs_the_passes_of_its_precision_checkpointing_and_loss() -> None:
    ways = [
        {"native": native, "activation_checkpointing": checkpointing, "loss": loss}
        for native in (False, True)
        for checkpointing in (False, True)
        for loss in ("whole", "chunked")
    ]
    footprint = a_footprint(*(passes(number, **way) for number, way in enumerate(ways)))
    for number, way in enumerate(ways):
        engine = "zero1" if way["native"] else "ddp"
        plan = a_plan(engine=engine, activation_checkpointing=way["activation_checkpointing"], loss=way["loss"])
        found = footprint.of(plan)
        assert found is not None
        assert found.beside_gradients.at(1) == number
    assert footprint.of(a_plan(precision="fp16")) is None


def test_in_fp32_zero_casts_nothing_either() -> None:
    assert a_footprint(passes(7, precision="fp32")).of(a_plan(engine="zero3", precision="fp32")) is not None


def test_whole_stands_in_for_chunks_and_not_the_other_way_round() -> None:
    assert a_footprint(passes(1)).of(a_plan(loss="chunked")) is not None
    assert a_footprint(passes(1, loss="chunked")).of(a_plan(loss="whole")) is None


@pytest.mark.parametrize(
    ("rows", "heights"),
    [((1, 1), (1, 2)), ((2, 1), (1, 2)), ((1, 2, 3), (1, 2)), ((1, 2), ("NaN", 1)), ((1, 2), ("Infinity", 1)),
     ((1, 2), (10**400, 1)), ((1,), (1,))],
)  # fmt: skip
def test_what_is_no_curve_is_refused(rows: tuple[int, ...], heights: tuple[Any, ...]) -> None:
    """It may come from a peer, and a division by zero in the controller would end it."""
    with pytest.raises(ValidationError):
        Curve.model_validate_json(json.dumps({"rows": rows, "bytes": heights}))
