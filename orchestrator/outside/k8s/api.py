"""Kubernetes' API as verbs need it: few calls, each again while its server is away or asks for patience."""

from __future__ import annotations

import functools
import http.client
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import tenacity
from kubernetes import client as k8s
from kubernetes import config as k8s_config
from kubernetes import watch as k8s_watch
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from orchestrator.errors import ConflictError, ExecutorError, NotFoundError, SpecError, UnauthorizedError, YardError
from orchestrator.outside.k8s.again import WatchExpired

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

GROUP, VERSION = "ray.io", "v1"
KUEUE, KUEUE_VERSION = "kueue.x-k8s.io", "v1beta1"
CALL_S = 20.0
FIRST_PAUSE_S, MOST_PAUSE_S = 0.25, 10.0
TELL_AFTER_S = 3.0
AGAIN = frozenset({429, 500, 502, 503, 504})
GONE = 410
Object = dict[str, Any]


class Api:
    """One API server. Every method asks again, for `patience_s`, while there is no answer or one of AGAIN.

    Raises, whichever method:
        YardError: it did not answer in that time.
        UnauthorizedError: it does not let this user do it.
        NotFoundError: there is no such thing.
        ConflictError: the thing exists already, or has changed meanwhile.
        SpecError: it refuses what it was given.
    """

    def __init__(self, context: str | None = None, patience_s: float = 10.0) -> None:
        self._patience_s = patience_s
        self._client = client = _connected(context)
        self._custom = k8s.CustomObjectsApi(client)
        self._core = k8s.CoreV1Api(client)

    @property
    def server(self) -> str:
        return str(self._client.configuration.host)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        return dict(
            self._ask(
                lambda: self._custom.get_namespaced_custom_object(
                    *_where(plural, namespace), name, _request_timeout=CALL_S
                )
            )
        )

    def find(self, plural: str, namespace: str, labels: str = "") -> list[Object]:
        answer = self._ask(
            lambda: self._custom.list_namespaced_custom_object(
                *_where(plural, namespace), label_selector=labels, _request_timeout=CALL_S
            )
        )
        return list(answer["items"])

    def create(self, plural: str, namespace: str, body: Object) -> Object:
        """Raises ConflictError where the name is taken: by an earlier try of this very call, maybe."""
        return dict(
            self._ask(
                lambda: self._custom.create_namespaced_custom_object(
                    *_where(plural, namespace), body, field_validation="Strict", _request_timeout=CALL_S
                )
            )
        )

    def patch(self, plural: str, namespace: str, name: str, body: Object) -> Object:
        """A merge patch; with a metadata.resourceVersion only of that version."""
        return dict(self._ask(
            lambda: self._custom.patch_namespaced_custom_object(
                *_where(plural, namespace), name, body, field_validation="Strict",
                _content_type="application/merge-patch+json", _request_timeout=CALL_S,
            )
        ))  # fmt: skip

    def delete(self, plural: str, namespace: str, name: str, propagation: str = "Foreground") -> None:
        """Ask for its end; what it owns ends first. That there is none is no error."""
        try:
            self._ask(
                lambda: self._custom.delete_namespaced_custom_object(
                    *_where(plural, namespace), name, propagation_policy=propagation, _request_timeout=CALL_S
                )
            )
        except NotFoundError:
            return

    def workloads(self, namespace: str) -> list[Object]:
        """Kueue's; none where there is no Kueue, or this user may not look."""
        found = self._optional(
            lambda: self._custom.list_namespaced_custom_object(
                KUEUE, KUEUE_VERSION, namespace, "workloads", _request_timeout=CALL_S
            )
        )
        return list(found["items"]) if found is not None else []

    def pods(self, namespace: str, labels: str) -> list[Object]:
        found = self._ask(
            lambda: self._core.list_namespaced_pod(namespace, label_selector=labels, _request_timeout=CALL_S)
        )
        return [self._plain(one) for one in found.items]

    def events(self, namespace: str, kind: str, name: str) -> list[Object]:
        """What is told of an object, oldest first; none where this user may not look."""
        fields = f"involvedObject.kind={kind},involvedObject.name={name}"
        found = self._optional(
            lambda: self._core.list_namespaced_event(namespace, field_selector=fields, _request_timeout=CALL_S)
        )
        events = [self._plain(one) for one in found.items] if found is not None else []
        return sorted(events, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))

    def log(self, namespace: str, pod: str, container: str | None = None) -> bytes:
        def ask() -> bytes:
            found: Any = self._core.read_namespaced_pod_log(
                pod, namespace, container=container, _preload_content=False, _request_timeout=CALL_S
            )
            return bytes(found.data)

        found: bytes = self._ask(ask)
        return found

    def watch(self, plural: str, namespace: str, name: str, seconds: int) -> Iterator[Object]:
        """The object as it is (`type` ADDED), and whenever it changes, for so many seconds at most. It begins without a
        version: that of an object that has not changed for long is one that the server may have forgotten.

        Raises:
            WatchExpired: this watcher was too slow for what the server remembers.
        """
        stream = k8s_watch.Watch()
        try:
            for event in stream.stream(
                self._custom.list_namespaced_custom_object, *_where(plural, namespace),
                field_selector=f"metadata.name={name}", timeout_seconds=seconds,
                allow_watch_bookmarks=True, _request_timeout=(CALL_S, seconds + CALL_S),
            ):  # fmt: skip
                if event["type"] != "BOOKMARK":
                    yield {"type": event["type"], "object": event["raw_object"]}
        except ApiException as problem:
            if problem.status == GONE:
                raise WatchExpired from problem
            raise _refused(problem) from problem
        except (HTTPError, http.client.HTTPException, OSError) as problem:
            raise YardError(f"the watch broke: {problem}", code="kubernetes-unreachable") from problem
        finally:
            stream.stop()

    def _plain(self, found: Any) -> Object:
        return dict(self._client.sanitize_for_serialization(found))

    def _optional(self, call: Callable[[], Any]) -> Any:
        try:
            return self._ask(call)
        except (NotFoundError, UnauthorizedError):
            return None

    def _ask(self, call: Callable[[], Any]) -> Any:
        told = _Told(self.server)
        try:
            for attempt in tenacity.Retrying(
                retry=tenacity.retry_if_exception(_passes),
                wait=_pause,
                stop=tenacity.stop_after_delay(self._patience_s),
                before_sleep=told,
                reraise=True,
            ):
                with attempt:
                    return call()
        except ApiException as problem:
            raise _refused(problem) from problem
        except (HTTPError, http.client.HTTPException, OSError) as problem:
            raise YardError(
                f"the Kubernetes API at {self.server} has not answered for {self._patience_s:.0f} s: {problem}",
                code="kubernetes-unreachable",
                hint="`kubectl cluster-info` tells whether it is up; say the same again, nothing is doubled",
            ) from problem
        raise AssertionError("tenacity ends by an answer or an exception")


class _Told:
    """Says once on stderr that the server is waited for."""

    def __init__(self, server: str) -> None:
        self._server, self._said = server, False

    def __call__(self, state: tenacity.RetryCallState) -> None:
        pause_s = state.next_action.sleep if state.next_action is not None else 0.0
        if not self._said and (state.seconds_since_start or 0.0) + pause_s >= TELL_AFTER_S:
            self._said = True
            print(f"the Kubernetes API at {self._server} does not answer; waiting for it", file=sys.stderr, flush=True)


def _passes(problem: BaseException) -> bool:
    if isinstance(problem, ApiException):
        return problem.status in AGAIN
    return isinstance(problem, HTTPError | http.client.HTTPException | OSError)


_exponential = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=MOST_PAUSE_S)


def _pause(state: tenacity.RetryCallState) -> float:
    """What the server asks for, else ever longer, and never the same for all who wait."""
    problem = state.outcome.exception() if state.outcome is not None else None
    headers: Mapping[str, str] = (problem.headers or {}) if isinstance(problem, ApiException) else {}
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else FIRST_PAUSE_S / 2 + _exponential(state)


def _refused(problem: ApiException) -> Exception:
    try:
        body = json.loads(problem.body or "{}")
    except ValueError:
        body = {}
    message = body.get("message") or f"{problem.status} {problem.reason}"
    match problem.status:
        case 404:
            return NotFoundError(f"Kubernetes: {message}", field="job")
        case 409:
            return ConflictError(f"Kubernetes: {message}", code=body.get("reason", "conflict").lower())
        case 401 | 403:
            return UnauthorizedError(
                f"Kubernetes: {message}",
                hint="k8s/users holds a Role for those who hand over jobs; `kubectl auth can-i`",
            )
        case 400 | 413 | 422:
            return SpecError(
                f"Kubernetes refuses it: {message}",
                code="kubernetes-refused",
                hint="look at what is asked of it: `tuneyard render k8s FILE`; --with changes it",
            )
        case _:
            return ExecutorError(f"Kubernetes: {message}", code="kubernetes-refused")


def _where(plural: str, namespace: str) -> tuple[str, str, str, str]:
    return GROUP, VERSION, namespace, plural


def _connected(context: str | None) -> ApiClient:
    settings = k8s.Configuration()
    settings.retries = False  # _ask does it
    try:
        if context is None and "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            k8s_config.load_incluster_config(settings)
        else:
            file = os.environ.get("KUBECONFIG")  # the client looks when it is imported
            k8s_config.load_kube_config(file, context, settings, persist_config=False)
        return k8s.ApiClient(settings)
    except (ConfigException, OSError) as problem:
        raise YardError(
            f"no Kubernetes cluster is known here: {problem}",
            code="no-kubernetes",
            hint="a kubeconfig names one (KUBECONFIG, ~/.kube/config); --with context=NAME takes another of it",
        ) from problem


@functools.cache
def api(context: str | None, patience_s: float) -> Api:
    """One a context: its connections are kept."""
    return Api(context, patience_s)
