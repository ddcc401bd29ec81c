"""An emulated API server as tests hold it: started, spoken to, told to fail, asked what was asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.kubernetes.resources import RESOURCES, ROOT, Object, Resource
from tests.kubernetes.server import OPERATOR

START_S = 30.0


class Answer(Exception):
    """A refusal."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def resource(plural: str) -> Resource:
    return next(one for one in RESOURCES if one.plural == plural)


class Cluster:
    """One server; `env` lets clients find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace = "default"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kubernetes.server"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "emulated", "cluster": {"server": self.url}}],
                    "users": [{"name": "me", "user": {}}],
                    "contexts": [{"name": "emulated", "context": {"cluster": "emulated", "user": "me"}}],
                    "current-context": "emulated",
                }
            )
        )
        self.env = {"KUBECONFIG": str(self.kubeconfig), "HOME": str(folder)}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """As Kubernetes' own controllers do: not recorded, and never failed."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        try:
            headers = {"User-Agent": OPERATOR, "Content-Type": kind}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            found = json.loads(answer.read() or b"null")
        finally:
            connection.close()
        if answer.status >= 300:
            raise Answer(answer.status, found.get("message", ""))
        return found

    def path(self, plural: str, name: str = "", sub: str = "") -> str:
        one = resource(plural)
        where = f"{one.root}/namespaces/{self.namespace}/{plural}" if one.namespaced else f"{one.root}/{plural}"
        return where + (f"/{name}" if name else "") + (f"/{sub}" if sub else "")

    def find(self, plural: str, labels: str = "") -> list[Object]:
        found: list[Object] = self.ask("GET", f"{self.path(plural)}?labelSelector={labels}")["items"]
        return found

    def get(self, plural: str, name: str) -> Object | None:
        try:
            found: Object = self.ask("GET", self.path(plural, name))
        except Answer as problem:
            if problem.code == 404:
                return None
            raise
        return found

    def create(self, plural: str, body: Object) -> Object:
        made: Object = self.ask("POST", self.path(plural), body)
        return made

    def patch(self, plural: str, name: str, body: Object, sub: str = "") -> None:
        self.ask("PATCH", self.path(plural, name, sub), body, "application/merge-patch+json")

    def status(self, plural: str, name: str, **status: Any) -> None:
        self.patch(plural, name, {"status": status}, "status")

    def delete(self, plural: str, name: str, **options: Any) -> None:
        self.ask("DELETE", self.path(plural, name), options)

    def control(self, what: str, method: str = "POST", **body: Any) -> Any:
        return self.ask(method, f"/emulator/{what}", body if method == "POST" else None)

    def fail(self, times: int = 1, **fault: Any) -> None:
        """status=, retry_after=, drop=True; verb= and resource= say which requests."""
        match = {key: fault.pop(key) for key in ("verb", "resource") if key in fault}
        self.control("faults", times=times, match=match, **fault)

    def asked(self, agent: str = "") -> list[Object]:
        """Every request by others than the operators, of whom says `agent` in its User-Agent."""
        found: list[Object] = self.control("requests", "GET")
        return [one for one in found if agent in one["agent"]]

    def forget(self) -> None:
        self.control("requests", "DELETE")

    def empty(self) -> None:
        """Take away what clients and operators have made."""
        for plural in ("rayjobs", "rayclusters", "workloads", "pods"):
            for item in self.find(plural):
                name = item["metadata"]["name"]
                try:
                    self.patch(plural, name, {"metadata": {"finalizers": None}})
                    self.delete(plural, name, gracePeriodSeconds=0)
                except Answer as problem:
                    if problem.code != 404:  # its owner took it along
                        raise
        self.control("faults", "DELETE")

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            ["kubectl", *arguments], env={**os.environ, **self.env}, input=stdin, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


@contextmanager
def a_cluster(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def rules_of(path: Path) -> list[Object]:
    """The rules of all Roles in a file, or in the files of a folder."""
    found: list[Object] = []
    for one in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
        for item in YAML(typ="safe", pure=True).load_all(one.read_text()):
            if item and item.get("kind") == "Role":
                found += item["rules"]
    return found


def beyond(requests: Iterable[Object], rules: list[Object]) -> list[str]:
    """What was asked that no rule allows, as RBAC decides it."""

    def allows(rule: Object, one: Object) -> bool:
        what = f"{one['resource']}/{one['subresource']}" if one["subresource"] else one["resource"]
        if one["group"] not in rule["apiGroups"] or what not in rule["resources"] or one["verb"] not in rule["verbs"]:
            return False
        names = rule.get("resourceNames")
        field = one["query"].get("fieldSelector", "")
        named = one["name"] or (field.removeprefix("metadata.name=") if field.startswith("metadata.name=") else None)
        return names is None or named in names

    wrong = {
        f"{one['verb']} {one['group']}/{one['resource']}/{one['subresource']}"
        for one in requests
        if not any(allows(rule, one) for rule in rules)
    }
    return sorted(wrong)


def unused(requests: Iterable[Object], rules: list[Object]) -> list[str]:
    """What rules allow that nobody asked for: a Role is to be no wider than what is done."""
    done = {(one["group"], f"{one['resource']}/{one['subresource']}".rstrip("/"), one["verb"]) for one in requests}
    allowed = {
        (group, what, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for what in rule["resources"]
        for verb in rule["verbs"]
    }
    return sorted(" ".join(one) for one in allowed - done)
