"""Which system an id names, what is told to a system alone, and which verbs are a yard's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launch.config import Section
from orchestrator.errors import NotFoundError, SettingsError, SpecError
from orchestrator.outside.options import read_options
from orchestrator.outside.protocol import System, system_of
from orchestrator.settings import Settings


class Options(Section):
    partition: str | None = None
    nodes: int | None = None


def options(given: tuple[str, ...] = (), queue: str = "default", **queues: dict[str, Any]) -> Options:
    told = {name.replace("every", "*"): said for name, said in queues.items()}
    return read_options(Options, Settings(outside={"slurm": told}), System.SLURM, queue, given)


def test_an_id_names_its_system() -> None:
    assert system_of("slurm:12") == System.SLURM
    assert system_of("sms-spam-x1y2z") is None
    with pytest.raises(NotFoundError) as caught:
        system_of("pbs:12")
    assert "slurm:ID" in (caught.value.hint or "")


def test_what_is_given_wins_over_the_queue_and_that_over_all() -> None:
    every, lab = {"partition": "all", "nodes": 1}, {"partition": "lab"}
    assert options(every=every, lab=lab) == Options(partition="all", nodes=1)
    assert options(queue="lab", every=every, lab=lab) == Options(partition="lab", nodes=1)
    assert options(("nodes=2",), "lab", every=every, lab=lab) == Options(partition="lab", nodes=2)
    assert options(("nodes=null",), every=every).nodes is None


def test_a_slip_is_told_where_it_was_made() -> None:
    with pytest.raises(SpecError) as caught:
        options(("partitoin=gpu",))
    assert caught.value.file == "--with partitoin=gpu"
    assert "partition" in (caught.value.hint or "")
    with pytest.raises(SpecError, match="--with nodes is not of the form"):
        options(("nodes",))
    with pytest.raises(SettingsError) as of_settings:
        options(every={"nodes": "two"})
    assert of_settings.value.field == "TUNEYARD_OUTSIDE"


@pytest.mark.parametrize(
    "verb", [["pause", "ID"], ["resume", "ID"], ["priority", "ID", "low"], ["why", "ID"], ["goodput", "ID"]]
)
def test_what_only_a_yard_can_do_is_refused(verb: list[str], tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = tuneyard(*(word.replace("ID", "slurm:1") for word in verb))
    assert status == 4
    assert "error[not-in-a-yard]" in err
    assert "cancel" in err


def test_with_is_for_systems_outside(tmp_path: Any, tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "job.yaml").write_text("name: x\nrun: ['true']\n")
    status, _, err = tuneyard("submit", str(tmp_path / "job.yaml"), "--with", "partition=gpu")
    assert (status, "--to slurm" in err) == (2, True)
