"""Where a job file sends its checkpoints: found from the file, without secrets, and to a store that there is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from launch.document import Document, parse_document, read_document
from launch.errors import SpecErrors
from orchestrator.job.check import check_job
from orchestrator.job.spec import AnyJob, check_submission, load_job

COMMAND = {"name": "job", "run": ["true"]}
TRAINING = {
    "name": "job",
    "model": {"name_or_path": "org/model", "task": "sequence-classification"},
    "data": {"train": "org/data"},
    "train": {"max_steps": 1},
}
KINDS = pytest.mark.parametrize("base", [COMMAND, TRAINING], ids=["command", "training"])


def a_file(folder: Path, base: dict[str, Any], directory: str) -> Document:
    path = folder / "job.yaml"
    path.write_text(json.dumps(base | {"checkpoint": {"directory": directory}}))
    return read_document(path, ())


def refused(job: AnyJob | None, document: Document) -> Any:
    with pytest.raises(SpecErrors) as told:
        check_job(job or load_job(document), document)
    (error,) = told.value.errors
    assert error.hint
    return error


@KINDS
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ck", "{base}/ck"),
        ("../ck", "{parent}/ck"),
        ("/data/ck", "/data/ck"),
        ("file:///data/ck", "/data/ck"),
        ("file://ck", "{base}/ck"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("hdfs://host:9000/ck", "hdfs://host:9000/ck"),
        ("s3://bucket/me@home/a:b", "s3://bucket/me@home/a:b"),
    ],
)
def test_a_directory_is_found_from_the_job_file(tmp_path: Path, base: dict[str, Any], written: str, meant: str) -> None:
    folder = tmp_path.resolve()
    job = load_job(a_file(folder, base, written))
    assert job.checkpoint.directory == meant.format(base=folder, parent=folder.parent)


@KINDS
@pytest.mark.parametrize(
    "directory",
    [
        "s3://KEYID:s3cr3t@bucket/ck",
        "s3://KEYID@bucket",
        "s3://KEYID:s3/cr3t@bucket/ck",
        "https://me:s3cr3t@host:9000/ck",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(
    tmp_path: Path, base: dict[str, Any], directory: str
) -> None:
    document = a_file(tmp_path, base, directory)
    with pytest.raises(SpecErrors) as told:
        load_job(document)
    (error,) = told.value.errors
    assert (error.code, error.field, error.line) == ("secret-by-value", "checkpoint.directory", 1)
    assert "from_env" in (error.hint or "")
    assert "cr3t" not in str(told.value)
    with pytest.raises(SpecErrors) as told:
        check_submission(base | {"checkpoint": {"directory": directory}})
    assert told.value.errors[0].code == "secret-by-value"
    assert "cr3t" not in str(told.value)


@KINDS
def test_a_kind_of_store_that_there_is_not(tmp_path: Path, base: dict[str, Any]) -> None:
    error = refused(None, a_file(tmp_path, base, "s4://bucket/ck"))
    assert (error.code, error.field, error.line) == ("unknown-storage", "checkpoint.directory", 1)
    error = refused(None, a_file(tmp_path, base, "simplecache::s3://bucket/ck"))
    assert error.code == "unknown-storage"


@KINDS
def test_a_store_whose_package_is_missing(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = a_file(tmp_path, base, "s3://bucket/ck")
    check_job(load_job(document), document)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    error = refused(None, document)
    assert (error.code, error.field) == ("storage-not-installed", "checkpoint.directory")
    assert "pip install 'tuneyard[s3]'" in error.hint


def test_no_directory_is_none() -> None:
    assert load_job(parse_document(json.dumps(COMMAND))).checkpoint.directory is None
