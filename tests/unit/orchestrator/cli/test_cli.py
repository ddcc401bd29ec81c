"""The command line in process: what `init`, `schema` and `doctor` print, and that errors have statuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from launch import __version__
from launch.document import parse_document, read_document
from launch.errors import SpecError
from orchestrator.cli import wants_json
from orchestrator.cli.doctor import examine
from orchestrator.cli.init import Kind, template
from orchestrator.cli.output import age, duration, size
from orchestrator.cli.status import of_error, of_job
from orchestrator.errors import ConflictError, ExecutorError, NotFoundError, StoreError, UnauthorizedError, YardError
from orchestrator.job.check import check_job
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import job_schema, load_job
from orchestrator.settings import Settings

JOB_FILES = sorted((Path(__file__).parents[4] / "configs" / "jobs").glob("*.yaml"))
PASSWORD = "pa55w0rd-of-the-database"


def test_version(tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    assert tuneyard("--version") == (0, f"{__version__}\n", "")


def test_help_names_every_verb_and_status(tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = tuneyard("--help")
    assert status == 0
    for verb in (
        "init", "run", "reproduce", "up", "down", "submit", "ls", "describe", "logs", "wait", "pause", "resume",
        "cancel", "priority", "queues", "nodes", "cordon", "drain", "uncordon", "doctor",
    ):  # fmt: skip
        assert re.search(rf"\b{verb}\b", out)
    assert "5 cancelled" in " ".join(out.split())


@pytest.mark.parametrize("kind", list(Kind))
def test_init_writes_a_file_that_lacks_only_files(
    kind: Kind, tmp_path: Path, tuneyard: Callable[..., tuple[int, str, str]]
) -> None:
    path = tmp_path / "My Job.yaml"
    status, out, _ = tuneyard("init", str(path), "--kind", kind.value)
    assert (status, str(path) in out) == (0, True)
    document = read_document(path)
    job = load_job(document)
    assert job.name == "my-job"
    with pytest.raises(SpecError) as caught:
        check_job(job, document)
    assert {error.code for error in getattr(caught.value, "errors", [])} == {"file-not-found"}
    assert len(template(kind, path).splitlines()) > 8


def test_init_does_not_overwrite(tmp_path: Path, tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("mine")
    status, _, err = tuneyard("init", str(path))
    assert (status, path.read_text()) == (2, "mine")
    assert "error[file-exists]" in err
    assert "--force" in err
    assert tuneyard("init", str(path), "--force")[0] == 0
    assert path.read_text() != "mine"
    assert "file-unwritable" in tuneyard("init", str(tmp_path / "none" / "job.yaml"))[2]


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(job_schema())
    return jsonschema.Draft202012Validator(job_schema())


def plain(path: Path) -> Any:
    """The file as an editor's schema check sees it."""
    return YAML(typ="safe").load(path)


def test_the_schema_is_what_the_verb_prints(tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = tuneyard("schema")
    assert (status, json.loads(out)) == (0, job_schema())


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_examples(path: Path, schema: jsonschema.Draft202012Validator) -> None:
    schema.validate(plain(path))


@pytest.mark.parametrize("kind", list(Kind))
def test_the_schema_accepts_what_init_writes(
    kind: Kind, tmp_path: Path, schema: jsonschema.Draft202012Validator
) -> None:
    (tmp_path / "job.yaml").write_text(template(kind, tmp_path / "job.yaml"))
    schema.validate(plain(tmp_path / "job.yaml"))


COMMAND = {"name": "x", "run": ["a"]}
TRAINING = {
    "name": "x",
    "model": {"name_or_path": "m", "task": "causal-lm"},
    "data": {"train": "a.csv"},
    "train": {"epochs": 1},
}


@pytest.mark.parametrize(
    "keys",
    [
        {"priority": "high"}, {"priority": 7}, {"max_duration": "2h"}, {"max_duration": 90}, {"max_duration": "1.5 d"},
        {"resources": {"num_processes": "2..8"}}, {"resources": {"num_processes": 3}},
        {"env": {"A": "b", "KEY": {"from_env": "KEY"}}}, {"max_duration": None}, {"after": ["a-1", "b"]},
        {"array": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", [COMMAND, TRAINING], ids=["command", "training"])
def test_what_the_schema_accepts_the_program_accepts(
    base: dict[str, Any], keys: dict[str, Any], schema: jsonschema.Draft202012Validator
) -> None:
    schema.validate(base | keys)
    load_job(parse_document(json.dumps(base | keys)))


@pytest.mark.parametrize(
    "keys",
    [
        {"colour": 1}, {"priority": "urgent"}, {"priority": 5000}, {"max_duration": "two hours"}, {"max_duration": 0},
        {"name": "Bad Name"}, {"resources": {"num_processes": 0}}, {"resources": {"num_processes": "many"}},
        {"resources": []}, {"retry": {"max_restarts": -1}}, {"env": {"A": 1}}, {"queue": "../q"}, {"after": "a-1"},
        {"after": ["A"]}, {"array": 0}, {"array": {}}, {"array": {"a": []}}, {"array": [1]}, {"array_at_once": 0},
        {"array_of": {"id": "a", "index": 0}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", [COMMAND, TRAINING], ids=["command", "training"])
def test_what_the_schema_refuses_the_program_refuses(
    base: dict[str, Any], keys: dict[str, Any], schema: jsonschema.Draft202012Validator
) -> None:
    assert not schema.is_valid(base | keys)
    with pytest.raises(SpecError):
        load_job(parse_document(json.dumps(base | keys)))


def test_the_schema_refuses_half_a_job(schema: jsonschema.Draft202012Validator) -> None:
    assert not schema.is_valid({"name": "x"})
    assert not schema.is_valid(COMMAND | TRAINING)


def test_doctor_looks_at_everything(tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = tuneyard("doctor", "-o", "json")
    findings = {finding["check"]: finding for finding in json.loads(out)}
    assert {"python", "torch", "compiler", "gpus", "cpu", "memory", "disk", "database", "yard"} <= set(findings)
    levels = {finding["level"] for finding in findings.values()}
    assert levels <= {"ok", "warn", "fail"}
    assert status == (1 if "fail" in levels else 0)
    assert all(finding["remedy"] for finding in findings.values() if finding["level"] != "ok")


@pytest.mark.parametrize(("has", "level"), [(True, "ok"), (False, "warn")])
def test_doctor_tells_of_a_cpu_on_which_bf16_is_slow(has: bool, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.doctor.multiplies_bf16", lambda: has)
    (found,) = (finding for finding in examine(Settings()) if finding.check == "cpu")
    assert found.level == level
    assert (found.remedy is not None and "fp32" in found.remedy) is not has


@pytest.mark.parametrize("has", [True, False])
def test_doctor_tells_of_a_cpu_that_multiplies_bytes(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.doctor.multiplies_int8", lambda: has)
    (found,) = (finding for finding in examine(Settings()) if finding.check == "cpu")
    assert ("int8" in found.found) is has


def test_doctor_fails_for_what_does_not_work(
    tmp_path: Path, tuneyard: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "yard.json").write_text("{")
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", f"postgresql://me:{PASSWORD}@127.0.0.1:1/none?connect_timeout=1")
    status, out, err = tuneyard("doctor", "-o", "json")
    findings = {finding["check"]: finding for finding in json.loads(out)}
    assert status == 1
    assert (findings["database"]["level"], findings["yard"]["level"]) == ("fail", "fail")
    assert PASSWORD not in out + err
    status, out, err = tuneyard("doctor")
    assert status == 1
    assert "fail" in out
    assert PASSWORD not in out + err


@pytest.mark.parametrize("url", ["nonsense", f"nosuch://me:{PASSWORD}@host/db", f"mysql+nosuch://me:{PASSWORD}@h/db"])
def test_a_bad_database_url_is_told_without_its_password(
    url: str, tuneyard: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", url)
    status, out, err = tuneyard("doctor", "-o", "json")
    finding = next(one for one in json.loads(out) if one["check"] == "database")
    assert (status, finding["level"]) == (1, "fail")
    assert PASSWORD not in out + err


def test_a_damaged_record_of_a_yard_is_no_traceback(
    tmp_path: Path, tuneyard: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "yard.json").write_text('{"id": 1}')
    status, _, err = tuneyard("ls")
    assert status == 3
    assert "error[yard-record]" in err
    assert "hint:" in err


@pytest.mark.parametrize(
    "verb",
    [
        ["ls"], ["nodes"], ["describe", "x"], ["pause", "x"], ["resume", "x"], ["cancel", "x"], ["logs", "x"],
        ["wait", "x"], ["priority", "x", "low"], ["queues"], ["queues", "set", "x", "--weight", "1"],
        ["queues", "rm", "x"], ["cordon", "x"], ["drain", "x"], ["uncordon", "x"],
    ],
)  # fmt: skip
def test_without_a_yard_every_verb_says_so(verb: list[str], tuneyard: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = tuneyard(*verb)
    assert status == 3
    assert "tuneyard up" in err


def test_a_yard_elsewhere_needs_its_token(
    tuneyard: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEYARD_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("TUNEYARD_TOKEN", raising=False)
    status, _, err = tuneyard("ls")
    assert (status, "error[no-token]" in err) == (3, True)


@pytest.mark.parametrize(
    ("kind", "status"),
    [(YardError, 3), (StoreError, 3), (UnauthorizedError, 3), (NotFoundError, 4), (ConflictError, 4),
     (SpecError, 2), (ExecutorError, 1)],
)  # fmt: skip
def test_errors_have_statuses(kind: type[YardError], status: int) -> None:
    assert of_error(kind("x")) == status


def test_ends_have_statuses() -> None:
    assert [of_job(state) for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)] == [0, 1, 5]


def test_json_is_asked_for_by_its_flag_alone() -> None:
    assert wants_json(["ls", "-o", "json"])
    assert not wants_json(["run", "json"])
    assert not wants_json(["run", "-o", "text", "json"])
    assert not wants_json(["run", "-o"])


def test_words_for_numbers() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 60, 3599, 3600, 90061)] == [
        "0s", "59s", "1m 0s", "59m 59s", "1h 0m", "25h 1m",
    ]  # fmt: skip
    assert [size(count) for count in (None, 0, 1023, 1024, 3 << 30, 5 << 40)] == [
        "-", "0 B", "1023 B", "1.0 KiB", "3.0 GiB", "5.0 TiB",
    ]  # fmt: skip
    assert (age(None), age(10.0, 75.0)) == ("-", "1m 5s")
