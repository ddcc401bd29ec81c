"""`tuneyard goodput` against a yard in this process."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cli.goodput import money
from orchestrator.cluster.status import Slots, Spent
from orchestrator.control.loop import Controller
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.settings import Settings
from orchestrator.store.transaction import NewAttempt
from tests.builders import a_training_job
from tests.served import TOKEN, a_controller, listening
from tests.unit.orchestrator.store.test_store import a_start

Tuneyard = Callable[..., tuple[int, str, str]]
WHY = Reason(code=ReasonCode.RUNNING, sentence="because")


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with a_controller(tmp_path / "yard") as controller, listening(controller) as url:
        monkeypatch.setenv("TUNEYARD_URL", url)
        monkeypatch.setenv("TUNEYARD_TOKEN", TOKEN)
        yield controller


@pytest.fixture
def crashed(controller: Controller) -> str:
    """A job that crashed for good two minutes ago."""
    store, at = controller.store, time.time() - 220
    store.add_job("a-1", a_training_job(2), at)
    controller.lease = store.acquire_lease("me", at, 1e12)
    assert controller.lease is not None
    contract, placement = a_start("a-1")
    contract = contract.model_copy(update={"spec": a_training_job(2).train_spec()})
    spent = Spent(began_at=at + 10, seconds={"load": 10, "step": 60}, phase="step", step=9, from_step=0)
    with store.acting(controller.lease) as write:
        write.add_inventory({"n0": Slots(name="n0", kind="cpu", slots=4)}, at)
        write.add_attempts([NewAttempt(contract, placement)], at + 10)
        write.set_job("a-1", JobState.STARTING, WHY, at + 10)
        write.event("a-1", 1, at + 100, "attempt-error", {"message": "oh [red]no\nand more"})
        write.end_attempt("a-1", 1, at + 100, "crashed", spent)
        write.set_job("a-1", JobState.FAILED, WHY, at + 100)
    return "a-1"


def test_a_job_as_a_table(crashed: str, tuneyard: Tuneyard) -> None:
    status, out, _ = tuneyard("goodput", crashed)
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["lost"] == ["60.0", "60.0", "%", "120.0", "66.7", "%"]
    assert rows["queued"] == ["10.0", "10.0", "%", "-", "-"]
    assert rows["total"][0] == "100.0"
    assert rows["goodput"][0] == "0.0"
    assert "energy: no reading" in out
    assert "cost -" in out
    assert "0..9, kept 0  crashed: oh [red]no" in out
    assert "and more" not in out


def test_the_cluster_as_a_table(controller: Controller, crashed: str, tuneyard: Tuneyard) -> None:
    controller.settings = Settings(home=controller.settings.home, prices={"cpu": 36.0}, currency="EUR")
    status, out, _ = tuneyard("goodput", "--since", "1h")
    assert (status, crashed) == (0, "a-1")
    (row,) = [line.split() for line in out.splitlines() if line.startswith("default")]
    assert row == ["default", "1", "0.05", "0.00", "0.0", "%", "0.0", "%", "66.7", "%", "11.1", "%", "1.80", "EUR", "-"]
    assert "idle: unknown before" in out
    assert re.search(r"^idle cpu: 0\.\d\d of 0\.\d\d slot-hours, [78]\d\.\d %$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


def test_a_cluster_of_which_nothing_is_known(controller: Controller, tuneyard: Tuneyard) -> None:
    assert controller.lease is None
    status, out, _ = tuneyard("goodput")
    assert status == 0
    assert "idle: unknown" in out


def test_both_as_json_and_as_pictures(crashed: str, tuneyard: Tuneyard, tmp_path: Path) -> None:
    one, all_of_it = tmp_path / "job.png", tmp_path / "all.svg"
    job = json.loads(tuneyard("goodput", crashed, "-o", "json", "--plot", str(one))[1])
    assert (job["job"], job["seconds"]["lost"]) == (crashed, pytest.approx(60))
    cluster = json.loads(tuneyard("goodput", "-o", "json", "--since", "5m", "--plot", str(all_of_it))[1])
    assert cluster["until"] - cluster["since"] == pytest.approx(300)
    assert one.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in all_of_it.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        (("--since", "yesterday"), "bad-duration", "since"),
        (("--since", "0h"), "bad-duration", "since"),
        (("--plot", "timeline.doc"), "bad-plot", "plot"),
        (("--plot", "/nowhere/timeline.png"), "bad-plot", "plot"),
    ],
)
def test_what_cannot_be_asked(
    controller: Controller, tuneyard: Tuneyard, arguments: tuple[str, ...], code: str, field: str
) -> None:
    assert controller.lease is None
    status, out, _ = tuneyard("goodput", *arguments, "-o", "json")
    (error,) = json.loads(out)["errors"]
    assert (status, error["code"], error["field"], bool(error["hint"])) == (2, code, field, True)


def test_of_no_job_there_is_nothing_to_tell(controller: Controller, tuneyard: Tuneyard) -> None:
    assert controller.lease is None
    status, _, err = tuneyard("goodput", "nobody-1")
    assert status == 4
    assert "nobody-1" in err


def test_money_has_the_name_that_it_was_given() -> None:
    told = [money(None, "EUR"), money(1.5, None), money(0.0, "EUR"), money(0.00213, "EUR")]
    assert told == ["-", "1.50", "0.00 EUR", "0.0021 EUR"]
