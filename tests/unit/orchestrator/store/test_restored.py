"""After an older copy of the database was put back: numbers of attempts are used once."""

from __future__ import annotations

import pytest

from orchestrator.errors import ConflictError
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.store.restored import GAP, main
from orchestrator.store.store import Store
from tests.builders import a_command_job

WHY = Reason(code=ReasonCode.CANCELLED, sentence="because")


def test_live_jobs_skip_numbers_and_ended_ones_stay(store: Store) -> None:
    for name in ("a-1", "b-1"):
        store.add_job(name, a_command_job(), 1.0)
    lease = store.acquire_lease("me", 1.0, ttl=10)
    assert lease is not None
    with store.acting(lease) as write:
        write.set_job("b-1", JobState.CANCELLED, WHY, 2.0)
    before = store.live_jobs()
    with pytest.raises(ConflictError, match="me"):
        store.skip_numbers(GAP, 5.0)
    assert store.job("a-1").attempts == 0
    assert store.skip_numbers(GAP, 12.0) == 1
    assert [store.job(name).attempts for name in ("a-1", "b-1")] == [GAP, 0]
    assert [event.kind for event in store.events("a-1")] == ["submitted", "restored"]
    assert store.live_jobs(before)["a-1"].attempts == GAP  # whoever has read the row before reads it again


def test_the_command_says_how_many(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", url)
    store.add_job("a-1", a_command_job(), 1.0)
    assert main() == 0
    assert capsys.readouterr().out.startswith("1 jobs have not ended")
    assert store.acquire_lease("you", 1e12, ttl=10) is not None
    assert main() == 2
    assert "you" in capsys.readouterr().err
