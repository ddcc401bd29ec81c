"""The formulas beside published peaks."""

from __future__ import annotations

import csv

from benchmarks.memory_published import DATA, GOAL, compare, read


def test_formulas_are_near_published_peaks() -> None:
    told = compare(read(DATA))
    assert told["groups"]["max_allocated/high"]["rows"] == 37
    assert told["median_absolute_error"] <= GOAL
    assert abs(told["groups"]["max_allocated/high"]["worst"]) < 0.25


def test_every_row_names_its_source() -> None:
    with DATA.open(newline="") as stream:
        assert all(row["source"] and row["source_commit"] and row["published_unit"] for row in csv.DictReader(stream))
