"""Workloads drawn at random."""

from __future__ import annotations

import pytest

from orchestrator.errors import SpecError
from orchestrator.schedule.gang import DAY_S
from orchestrator.simulate.generate import Generation, generate, parse_generation


def test_the_seed_decides() -> None:
    what = Generation(jobs=50, elastic=0.5)
    assert generate(what, 64, 1) == generate(what, 64, 1)
    assert generate(what, 64, 1).jobs != generate(what, 64, 2).jobs


def test_it_asks_for_as_much_as_it_is_told() -> None:
    jobs = generate(Generation(jobs=4_000, load=0.7), 128, 0).jobs
    assert len(jobs) == 4_000
    assert [job.submit_s for job in jobs] == sorted(job.submit_s for job in jobs)
    asked = sum(job.duration_s * job.num_gpus for job in jobs) / (jobs[-1].submit_s * 128)
    assert asked == pytest.approx(0.7, rel=0.15)
    assert {job.num_gpus for job in jobs} == {1, 2, 4, 8, 16, 32}
    assert len({job.tenant for job in jobs}) == 8
    assert all(1 <= job.duration_s <= 3 * DAY_S for job in jobs)


def test_more_is_submitted_by_day_than_by_night() -> None:
    jobs = generate(Generation(jobs=4_000, diurnal=0.9, load=0.3), 64, 0).jobs
    by_day = sum(DAY_S / 4 <= job.submit_s % DAY_S < 3 * DAY_S / 4 for job in jobs)
    assert by_day > 0.65 * len(jobs)


def test_elastic_jobs_have_bounds_and_small_clusters_small_jobs() -> None:
    jobs = generate(Generation(jobs=300, elastic=1.0), 8, 0).jobs
    assert max(job.num_gpus for job in jobs) == 8
    assert all(job.least <= job.num_gpus <= job.most <= 8 for job in jobs)
    assert all((job.least < job.most) == (job.num_gpus > 1) for job in jobs)


def test_what_is_written_is_read() -> None:
    assert parse_generation("jobs=10, load=1.5,diurnal=0") == Generation(jobs=10, load=1.5, diurnal=0)
    assert parse_generation("") == Generation()


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("job=10", "job", "did you mean jobs?"),
        ("jobs=ten", "jobs", "for example jobs=1000"),
        ("jobs=1.5", "jobs", "for example jobs=1000"),
        ("jobs=0", "jobs", "at least 1"),
        ("load=0", "load", "above 0"),
        ("load=nan", "load", "above 0"),
        ("elastic=2", "elastic", "at most 1"),
        ("load", "load", "for example load=0.9"),
    ],
)
def test_what_is_wrong_is_told(text: str, field: str, hint: str) -> None:
    with pytest.raises(SpecError) as refusal:
        parse_generation(text)
    assert refusal.value.field == field
    assert hint in (refusal.value.hint or "")
