"""docs/operations: a page for each way in which an attempt ends badly, and no link to nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.recover.classify import Outcome

PAGES = sorted((Path(__file__).parents[2] / "docs" / "operations").glob("*.md"))
INDEX = next(page for page in PAGES if page.name == "README.md")


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome != Outcome.SUCCEEDED])
def test_each_outcome_has_a_page(outcome: Outcome) -> None:
    assert f"`{outcome.value}`" in INDEX.read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page != INDEX], ids=lambda page: page.stem)
def test_a_page_says_what_is_seen_what_was_done_and_what_to_do(page: Path) -> None:
    text = page.read_text()
    for part in ("**What you see.**", "**What the system did.**", "**What to do.**"):
        assert part in text
    assert f"({page.name})" in INDEX.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
