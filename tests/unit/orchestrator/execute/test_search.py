"""What the end of a log says."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.execute.search import SEARCHED_BYTES, found_in, tail


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("Xid 79", True),
        ("Xid*fallen off the bus", True),
        ("*GPU*bus*", True),
        ("bus*Xid", False),
        ("xid", False),
        ("(.*)", False),
        ("end Xid", False),  # not on one line
    ],
)
def test_a_star_stands_for_anything_within_a_line(pattern: str, found: bool) -> None:
    text = "the end\nXid 79, GPU has fallen off the bus\n"
    assert found_in(text, ["never", pattern]) == ((pattern,) if found else ())


def test_of_a_long_log_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n" + "x" * SEARCHED_BYTES)
    assert tail(log) == "x" * SEARCHED_BYTES
    assert tail(log, 3) == "xxx"
    assert tail(tmp_path / "none") == ""


def test_a_pattern_that_would_make_an_expression_explode_takes_no_time() -> None:
    assert found_in("a" * SEARCHED_BYTES, ["a*" * 90 + "b"]) == ()
