"""The record of a run: what it says, what reading it refuses, and what it finds changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.contract import GitState
from launch.errors import SpecError, SpecErrors
from launch.provenance import (
    FORMAT,
    RECORD,
    Surroundings,
    base_files,
    check_inputs,
    differences,
    read_record,
    surroundings,
)
from tests.builders import a_record


def write(directory: Path, **changes: Any) -> Path:
    """A model directory with a record whose keys are replaced by `changes`."""
    told = a_record().model_dump(mode="json") | changes
    (directory / RECORD).write_text(json.dumps(told))
    return directory


def refusal(directory: Path) -> SpecError:
    with pytest.raises(SpecError) as told:
        read_record(directory)
    assert told.value.hint
    return told.value


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_record(write(tmp_path)) == a_record()


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    assert read_record(write(tmp_path, weather="fine")) == a_record()


def test_no_directory_and_no_record(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").code == "file-not-found"
    assert refusal(tmp_path).code == "no-record"


def test_a_newer_format_names_the_version_to_install(tmp_path: Path) -> None:
    newer = a_record().model_dump(mode="json")["surroundings"] | {"versions": {"tuneyard": "9.9"}}
    problem = refusal(write(tmp_path, format=FORMAT + 1, surroundings=newer))
    assert problem.code == "newer-record"
    assert "9.9" in (problem.hint or "")
    # It may be built in quite another way.
    (tmp_path / RECORD).write_text(json.dumps({"format": FORMAT + 1}))
    assert refusal(tmp_path).code == "newer-record"


def test_a_job_with_an_unknown_key_is_told_by_its_field(tmp_path: Path) -> None:
    spec = a_record().spec.model_dump(mode="json")
    problem = refusal(write(tmp_path, spec=spec | {"warp": 9}))
    assert (problem.code, problem.field) == ("bad-record", "spec.warp")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x"}', "[" * 100_000, "\udcff"])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_bytes(text.encode(errors="surrogateescape"))
    assert refusal(tmp_path).code == "bad-record"


def a_model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "README.md"):
        (folder / name).write_text(name)
    return folder


def test_of_a_base_model_its_configuration_and_weights_count(tmp_path: Path) -> None:
    files = base_files(a_model(tmp_path / "base"))
    assert files == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("config.json", "model.safetensors")}
    (tmp_path / "base" / "model.safetensors").unlink()
    assert set(base_files(tmp_path / "base")) == {"config.json", "pytorch_model.bin"}


def test_inputs_that_are_gone_or_changed_are_all_told(tmp_path: Path) -> None:
    base, data = a_model(tmp_path / "base"), tmp_path / "data.tsv"
    data.touch()
    record = a_record()
    spec = record.spec.model_copy(
        update={
            "model": record.spec.model.model_copy(update={"name_or_path": str(base)}),
            "data": record.spec.data.model_copy(update={"train": (str(data),)}),
        }
    )
    weights = record.base.model_copy(update={"files": base_files(base)})
    record = record.model_copy(update={"spec": spec, "base": weights})
    check_inputs(record)
    (base / "README.md").write_text("another")
    check_inputs(record)

    data.unlink()
    (base / "model.safetensors").write_text("another")
    (base / "config.json").unlink()
    with pytest.raises(SpecErrors) as told:
        check_inputs(record)
    found = sorted((error.code, error.field) for error in told.value.errors)
    changed = ("base-model-changed", "model.name_or_path")
    assert found == [changed, changed, ("file-not-found", "data.train")]

    shutil.rmtree(base)
    with pytest.raises(SpecErrors) as told:
        check_inputs(record)
    assert {error.code for error in told.value.errors} == {"file-not-found"}


def test_names_on_a_hub_are_not_looked_for() -> None:
    check_inputs(a_record())


def test_nothing_differs_from_oneself() -> None:
    here = surroundings().model_copy(update={"tuneyard": None})
    assert differences(here, here) == []
    assert {"tuneyard", "torch", "tokenizers", "safetensors"} <= set(here.versions)
    assert here.cpu


def test_what_differs_is_named_and_what_is_unknown_is_not() -> None:
    then = Surroundings(
        versions={"torch": "1", "peft": "1"}, python="3.11", system="Linux", cpu="A", cpu_capability="AVX2", gpus=("H",)
    )
    now = then.model_copy(update={"versions": {"torch": "2"}, "cpu": "B", "cpu_capability": None, "gpus": ()})
    assert [str(one) for one in differences(then, now)] == [
        "peft: 1 then, absent now",
        "torch: 1 then, 2 now",
        "CPU: A then, B now",
    ]
    again = then.model_copy(update={"cpu_capability": "AVX512", "gpus": ("H", "H")})
    assert [one.what for one in differences(then, again)] == ["CPU instructions", "GPUs"]


def test_code_with_uncommitted_changes_is_never_known_to_be_the_same() -> None:
    clean, dirty = (GitState(commit="a" * 40, dirty=dirty) for dirty in (False, True))
    here = surroundings()

    def told(then: GitState | None, now: GitState | None) -> int:
        return len(differences(here.model_copy(update={"tuneyard": then}), here.model_copy(update={"tuneyard": now})))

    assert [told(clean, clean), told(dirty, dirty), told(clean, None)] == [0, 1, 0]
    assert told(clean, clean.model_copy(update={"commit": "b" * 40})) == 1
