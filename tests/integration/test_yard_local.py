"""A yard without Ray, driven by every verb: what programs read, what is imported, and where secrets do not lie."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.serve.secret import API_TOKEN
from tests.yards import Yard, a_yard, until

SECRET = "s3cr3t-of-the-node-0123456789"
CHECK = f"import os, sys; sys.exit(os.environ['HF_TOKEN'] != '{SECRET[:10]}' + '{SECRET[10:]}')"
HEAVY = ("torch", "transformers", "ray", "deepspeed", "datasets", "accelerate", "pyarrow", "sqlalchemy", "fastapi")


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    os.environ["NODE_TOKEN"] = SECRET
    try:
        with a_yard("--executor", "local", cpu_slots="4") as yard:
            yield yard
    finally:
        del os.environ["NODE_TOKEN"]


@pytest.fixture(scope="module")
def job(yard: Yard) -> str:
    """A job that has found its secret."""
    path = yard.job_file(
        name="quiet", run=[sys.executable, "-c", CHECK], env={"HF_TOKEN": {"from_env": "NODE_TOKEN"}, "PLAIN": "text"}
    )
    job = yard.submit(path)
    assert yard.json("wait", job)["state"] == "succeeded"
    return job


def test_every_verb_prints_one_json_value(yard: Yard, job: str) -> None:
    live = yard.submit(yard.ticker("live", processes=1))
    until(lambda: yard.ticks(live))
    verbs = [
        ["up"], ["ls"], ["describe", job], ["wait", job], ["nodes"], ["doctor"], ["submit", "--dry-run"],
        ["cancel", live, "--wait"], ["wait", live],
    ]  # fmt: skip
    for verb in verbs:
        file = [str(yard.home / "quiet.yaml")] if "submit" in verb else []
        done = yard.run(*verb, *file, "-o", "json", check=False)
        (line,) = done.stdout.splitlines()
        assert "errors" not in json.loads(line), verb
    refused = yard.run("describe", "none-such", "-o", "json", check=False)
    (line,) = refused.stdout.splitlines()
    assert (refused.returncode, json.loads(line)["errors"][0]["code"]) == (4, "not-found")
    assert yard.run("cancel", job, check=False).returncode == 4
    assert yard.run("wait", live, check=False).returncode == 5


def test_an_impossible_gang_is_told_with_its_line(yard: Yard) -> None:
    path = yard.home / "wide.yaml"
    path.write_text("name: wide\nrun: ['true']\nresources:\n  num_processes: 64\n")
    before = yard.json("ls")
    done = yard.run("submit", str(path), "-o", "json", check=False)
    (error,) = json.loads(done.stdout)["errors"]
    assert done.returncode == 2
    assert (error["code"], error["field"]) == ("impossible-gang", "resources.num_processes")
    assert (error["file"], error["line"]) == (str(path), 4)
    assert f"--> {path}:4\n" in done.stderr
    assert yard.json("ls") == before


def test_submitting_imports_nothing_heavy(yard: Yard) -> None:
    path = yard.job_file(name="light", run=["true"])
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "orchestrator", "submit", str(path), "-o", "json"],
        env=yard.env, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "orchestrator" in imported
    assert imported.isdisjoint(HEAVY)


def test_secrets_lie_nowhere(yard: Yard, job: str) -> None:
    token = (yard.home / API_TOKEN).read_text()
    assert len(token) >= 32
    files = [path for path in yard.home.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"yard.db", "yard.json", "contract.json", "request.json", "controller.log"} <= names
    for path in files:
        data = path.read_bytes()
        assert SECRET.encode() not in data, path
        assert path.name == API_TOKEN or token.encode() not in data, path
    assert SECRET not in json.dumps(yard.describe(job))
    assert token not in yard.run("describe", job, "--config").stdout
    assert re.fullmatch(r"[0-9a-f]+", token)


def test_the_token_is_its_owners_alone(yard: Yard) -> None:
    assert stat.S_IMODE((yard.home / API_TOKEN).stat().st_mode) == 0o600


def test_a_home_without_a_yard(tmp_path: Path) -> None:
    done = Yard(tmp_path).run("ls", "-o", "json", check=False)
    assert (done.returncode, json.loads(done.stdout)["errors"][0]["code"]) == (3, "yard-unreachable")
