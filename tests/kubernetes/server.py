"""`python -m tests.kubernetes.server --port N`: an emulated Kubernetes API server, a process of its own.

It is no Kubernetes: there is no scheduler, kubelet or controller behind it (tests.kubernetes.operators plays some), no
authentication, and no admission but for the published schemas. Clients need not know: `kubernetes` and kubectl talk to
it unchanged. Under /emulator a test asks for faults and for what was asked of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.kubernetes.discovery import described
from tests.kubernetes.resources import Object, Resource
from tests.kubernetes.storage import Refusal, Storage, json_patch, merge, resource_of, selector

PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?(?:/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>[^/]+))?)?)?$"
)
BOOKMARK_S = 1.0
OPERATOR = "emulated-operator"
"""User agent of what plays Kubernetes' own controllers: it is not recorded, and has no faults."""


class Emulator:
    """What all requests share."""

    def __init__(self) -> None:
        self.storage = Storage()
        self.requests: list[Object] = []
        self.faults: list[Object] = []
        self.logs: dict[tuple[str, str], bytes] = {}
        self.lock = threading.Lock()
        self.away_until = 0.0
        self.ended = threading.Event()

    def fault(self, asked: Object) -> Object | None:
        """The next fault that this request is to have, one time less from now on."""
        with self.lock:
            for one in self.faults:
                wanted = one.get("match") or {}
                if one["times"] > 0 and all(asked.get(key) == value for key, value in wanted.items()):
                    one["times"] -= 1
                    return one
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    emulator: Emulator

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_PATCH(self) -> None:
        self._handle("PATCH")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        if self.emulator.away_until > time.monotonic():
            self.close_connection = True
            return
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        try:
            if url.path.startswith("/emulator/"):
                self._answer(200, self._control(method, url.path.removeprefix("/emulator/"), raw))
                return
            document = described(url.path) if method == "GET" else None
            if document is not None:
                self._answer(200, document)
                return
            self._object(method, url.path, query, raw)
        except Refusal as problem:
            self._refuse(problem)
        except (ValueError, TypeError) as problem:  # such as protobuf, which kubectl sends for kinds that it knows
            self._refuse(Refusal(400, "BadRequest", f"{type(problem).__name__}: {problem}"))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _object(self, method: str, path: str, query: dict[str, str], raw: bytes) -> None:
        found = PATH.match(path)
        if found is None:
            raise Refusal(404, "NotFound", f"no such path: {path}")
        group, version = found["group"] or "", found["version"] or found["core"]
        namespace, plural, name, sub = found["namespace"] or "", found["plural"], found["name"], found["sub"] or ""
        if plural is None:  # /api/v1/namespaces/NAME
            plural, name, namespace = "namespaces", namespace, ""
        elif not found["namespace"] and plural == "namespaces":
            pass
        resource = resource_of(group, version, plural)
        watching = query.get("watch") in ("1", "true", "True")
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch"}.get(method)
        if method == "GET":
            verb = "watch" if watching else "get" if name else "list"
        if method == "DELETE":
            verb = "delete" if name else "deletecollection"
        asked = {
            "verb": verb, "group": group, "resource": plural, "subresource": sub, "namespace": namespace, "name": name,
        }  # fmt: skip
        fault = None
        if self.headers.get("User-Agent") != OPERATOR:
            with self.emulator.lock:
                self.emulator.requests.append({**asked, "agent": self.headers.get("User-Agent") or "", "query": query})
            fault = self.emulator.fault(asked)
        if fault is not None and "status" in fault:
            headers = {"Retry-After": str(fault["retry_after"])} if "retry_after" in fault else {}
            reason = {429: "TooManyRequests", 409: "Conflict"}.get(fault["status"], "InternalError")
            raise Refusal(fault["status"], reason, "as a test asked for", headers)
        if watching:
            self._watch(resource, namespace, query, name)
            return
        answer = self._do(str(verb), resource, namespace, name, sub, query, raw)
        if fault is not None and fault.get("drop"):
            self.close_connection = True  # done, and nobody is told
            return
        if isinstance(answer, bytes):
            self._send(200, answer, "text/plain")
        else:
            self._answer(201 if verb == "create" and not sub else 200, answer)

    def _do(
        self, verb: str, resource: Resource, namespace: str, name: str, sub: str, query: dict[str, str], raw: bytes
    ) -> Object | bytes:
        storage = self.emulator.storage
        if sub == "log":
            storage.get(resource, namespace, name)
            return self.emulator.logs.get((namespace, name), b"")
        if sub == "eviction":
            storage.delete(resource, namespace, name, (json.loads(raw) or {}).get("deleteOptions") or {})
            return {"kind": "Status", "apiVersion": "v1", "status": "Success", "code": 201}
        match verb:
            case "get":
                return storage.get(resource, namespace, name)
            case "list":
                labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
                items, version = storage.find(resource, namespace, labels, fields)
                metadata = {"resourceVersion": str(version)}
                return {
                    "apiVersion": resource.api_version, "kind": f"{resource.kind}List", "metadata": metadata,
                    "items": items,
                }  # fmt: skip
            case "create":
                return storage.create(resource, namespace, json.loads(raw))
            case "update":
                return storage.replace(resource, namespace, name, sub, lambda _: json.loads(raw))
            case "patch":
                patch, kind = json.loads(raw), (self.headers.get("Content-Type") or "").partition(";")[0]
                if kind == "application/json-patch+json":
                    return storage.replace(resource, namespace, name, sub, lambda old: json_patch(old, patch))
                if kind not in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
                    raise Refusal(415, "UnsupportedMediaType", f"no patch of type {kind}")
                if kind.startswith("application/strategic") and resource.group in ("ray.io", "kueue.x-k8s.io"):
                    raise Refusal(415, "UnsupportedMediaType", "custom resources take no strategic merge patch")
                return storage.replace(resource, namespace, name, sub, lambda old: merge(_unversioned(old), patch))
            case "delete":
                options = json.loads(raw) if raw else {}
                options = {key: query[key] for key in ("propagationPolicy",) if key in query} | options
                if "gracePeriodSeconds" in query:
                    options["gracePeriodSeconds"] = int(query["gracePeriodSeconds"])
                return storage.delete(resource, namespace, name, options)
        raise Refusal(405, "MethodNotAllowed", f"{verb} is not done here")

    def _watch(self, resource: Resource, namespace: str, query: dict[str, str], name: str | None) -> None:
        fields = query.get("fieldSelector", "") or (f"metadata.name={name}" if name else "")
        fits, storage = selector(query.get("labelSelector", ""), fields), self.emulator.storage
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 300)
        bookmarks = query.get("allowWatchBookmarks") in ("1", "true", "True")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        told = query.get("resourceVersion") or ""
        with storage.changed:
            version = int(told) if told not in ("", "0") else storage.version
            if told in ("", "0"):
                for item in storage.find(resource, namespace)[0]:
                    if fits(item):
                        self._event("ADDED", item)
        while time.monotonic() < deadline and not self.emulator.ended.is_set():
            if self.emulator.away_until > time.monotonic():
                self.close_connection = True
                return
            try:
                with storage.changed:
                    news = list(storage.since(resource, namespace, version))
                    if not news:
                        storage.changed.wait(min(BOOKMARK_S, max(0.0, deadline - time.monotonic())))
                        news = list(storage.since(resource, namespace, version))
                    current = storage.version
            except Refusal as problem:
                self._event("ERROR", _status(problem))
                break
            for number, what, item in news:
                version = number
                if fits(item):
                    self._event(what, item)
            if not news and bookmarks:
                version = current
                metadata = {"resourceVersion": str(current)}
                self._event(
                    "BOOKMARK", {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}
                )
        self._chunk(b"")

    def _event(self, what: str, item: Object) -> None:
        self._chunk(json.dumps({"type": what, "object": item}).encode() + b"\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _control(self, method: str, what: str, raw: bytes) -> Any:
        emulator, body = self.emulator, json.loads(raw) if raw else None
        match method, what:
            case "POST", "faults":
                with emulator.lock:
                    emulator.faults.append({"times": 1, **body})
            case "GET", "faults":
                return emulator.faults
            case "DELETE", "faults":
                with emulator.lock:
                    emulator.faults.clear()
            case "GET", "requests":
                with emulator.lock:
                    return list(emulator.requests)
            case "DELETE", "requests":
                with emulator.lock:
                    emulator.requests.clear()
            case "POST", "expire":
                emulator.storage.expire()
            case "POST", "away":
                emulator.away_until = time.monotonic() + body["seconds"]
            case "POST", "log":
                emulator.logs[body["namespace"], body["pod"]] = body["text"].encode()
            case _:
                raise Refusal(404, "NotFound", what)
        return {}

    def _refuse(self, problem: Refusal) -> None:
        self._answer(problem.code, _status(problem), problem.headers)

    def _answer(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(body).encode(), "application/json", headers)

    def _send(self, code: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _unversioned(item: Object) -> Object:
    """As a merge patch finds it: a version that the patch does not name is not compared."""
    return {**item, "metadata": {key: value for key, value in item["metadata"].items() if key != "resourceVersion"}}


def _status(problem: Refusal) -> Object:
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": problem.message,
        "reason": problem.reason, "code": problem.code,
    }  # fmt: skip


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    emulator, port = Emulator(), options.port
    for name in ("default", "kube-system"):
        emulator.storage.create(resource_of("", "v1", "namespaces"), "", {"metadata": {"name": name}})
    Handler.emulator = emulator
    while True:
        server = Server(("127.0.0.1", port), Handler)
        if not options.port:
            port = options.port = server.server_address[1]
            print(port, flush=True)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        serving.start()
        while emulator.away_until <= time.monotonic():
            time.sleep(0.02)
        server.shutdown()
        server.server_close()  # from now on connections are refused
        time.sleep(max(0.0, emulator.away_until - time.monotonic()))


if __name__ == "__main__":
    sys.exit(main())
