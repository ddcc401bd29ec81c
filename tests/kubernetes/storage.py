"""What the emulated API server holds: objects, their versions, who owns whom, and what happened since when."""

from __future__ import annotations

import copy
import datetime
import re
import secrets
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tests.kubernetes.resources import RESOURCES, Object, Resource, faults

FOREGROUND = "foregroundDeletion"
KEEP = 2000
Key = tuple[Resource, str, str]


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.headers = code, reason, message, headers or {}


class Storage:
    """Every method may be called from any thread; `changed` is notified of every change."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.objects: dict[Key, Object] = {}
        self.history: list[tuple[int, str, Resource, Object]] = []
        self.version = 100
        self.oldest = 0
        """Changes up to this version are forgotten."""

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        with self.changed:
            found = self.objects.get((resource, namespace, name))
            if found is None:
                raise Refusal(404, "NotFound", f'{resource.plural} "{name}" not found')
            return copy.deepcopy(found)

    def find(self, resource: Resource, namespace: str, labels: str = "", fields: str = "") -> tuple[list[Object], int]:
        """And the version that this is."""
        fits = selector(labels, fields)
        with self.changed:
            found = [
                copy.deepcopy(one)
                for (kind, where, _), one in sorted(self.objects.items(), key=lambda entry: entry[0][1:])
                if kind == resource and (not namespace or where == namespace) and fits(one)
            ]
            return found, self.version

    def create(self, resource: Resource, namespace: str, body: Object) -> Object:
        item = copy.deepcopy(body)
        item["apiVersion"], item["kind"] = resource.api_version, resource.kind
        metadata = item.setdefault("metadata", {})
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                raise Refusal(422, "Invalid", "metadata.name: Required value: name or generateName is required")
            metadata["name"] = metadata["generateName"] + secrets.token_hex(3)[:5]
        if resource.namespaced:
            metadata["namespace"] = namespace
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", metadata["name"]):
            raise Refusal(422, "Invalid", f"metadata.name: Invalid value: {metadata['name']!r}")
        if "status" in resource.subresources and resource.kind != "Pod":
            item.pop("status", None)
        self._check(resource, item)
        key = (resource, namespace, metadata["name"])
        with self.changed:
            if key in self.objects:
                raise Refusal(409, "AlreadyExists", f'{resource.plural} "{metadata["name"]}" already exists')
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
            self._write(key, item, "ADDED")
            return copy.deepcopy(item)

    def replace(self, resource: Resource, namespace: str, name: str, subresource: str, change: Callable) -> Object:
        """`change` makes of the object what it is to be. Raises Refusal 409 for another version than it names."""
        with self.changed:
            old = self.get(resource, namespace, name)
            new = change(copy.deepcopy(old))
            told = (new.get("metadata") or {}).get("resourceVersion")
            if told not in (None, "", old["metadata"]["resourceVersion"]):
                message = f'Operation cannot be fulfilled on {resource.plural} "{name}": the object has been modified'
                raise Refusal(409, "Conflict", message)
            fixed = {key: old["metadata"][key] for key in ("uid", "creationTimestamp", "name", "generation")}
            fixed |= {key: old["metadata"][key] for key in ("namespace", "deletionTimestamp") if key in old["metadata"]}
            if subresource == "status":
                item = copy.deepcopy(old)
                item["status"] = new.get("status") or {}
            else:
                item = new
                if "status" in resource.subresources:
                    item.pop("status", None)
                    if "status" in old:
                        item["status"] = old["status"]
            item["apiVersion"], item["kind"] = resource.api_version, resource.kind
            item["metadata"] = {**item["metadata"], **fixed}
            if item.get("spec") != old.get("spec"):
                item["metadata"]["generation"] += 1
            item["metadata"].pop("resourceVersion", None)
            before = {**old, "metadata": {k: v for k, v in old["metadata"].items() if k != "resourceVersion"}}
            if item == before:
                return old
            self._check(resource, item)
            self._write((resource, namespace, name), item, "MODIFIED")
            self._settle((resource, namespace, name))
            return copy.deepcopy(item)

    def delete(self, resource: Resource, namespace: str, name: str, options: Object) -> Object:
        key = (resource, namespace, name)
        with self.changed:
            item = self.get(*key)
            wanted = (options.get("preconditions") or {}).get("uid")
            if wanted not in (None, item["metadata"]["uid"]):
                raise Refusal(409, "Conflict", "the UID in the precondition is not the object's")
            policy = options.get("propagationPolicy") or "Background"
            metadata = item["metadata"]
            if policy == "Orphan":
                for one in list(self._owned_by(metadata["uid"])):
                    child = self.objects[one]
                    child["metadata"]["ownerReferences"] = []
                    self._write(one, child, "MODIFIED")
            if policy == "Foreground" and FOREGROUND not in metadata.setdefault("finalizers", []):
                metadata["finalizers"].append(FOREGROUND)
            grace = options.get("gracePeriodSeconds")
            if resource.kind == "Pod" and grace != 0 and item["spec"].get("nodeName"):
                said = item["spec"].get("terminationGracePeriodSeconds", 30)
                metadata["deletionGracePeriodSeconds"] = said if grace is None else grace
            elif resource.kind == "Pod":
                metadata.pop("deletionGracePeriodSeconds", None)
            if not metadata.get("finalizers"):
                metadata.pop("finalizers", None)
            metadata.setdefault("deletionTimestamp", now())
            self._write(key, item, "MODIFIED")
            self._settle(key)
            return copy.deepcopy(item)

    def expire(self) -> None:
        """Forget what happened: who watches from a version before now must list again."""
        with self.changed:
            self.version += 1  # so that even who has heard all is behind
            self.oldest = self.version
            self.history.clear()
            self.changed.notify_all()

    def since(self, resource: Resource, namespace: str, version: int) -> Iterator[tuple[int, str, Object]]:
        """What happened after `version`. Raises Refusal 410. Call it while holding `changed`."""
        if version < self.oldest:
            raise Refusal(410, "Expired", f"too old resource version: {version} ({self.oldest})")
        for number, what, kind, item in self.history:
            inside = not namespace or item["metadata"].get("namespace") == namespace
            if number > version and kind == resource and inside:
                yield number, what, item

    def _check(self, resource: Resource, item: Object) -> None:
        wrong = faults(resource, item)
        if wrong:
            raise Refusal(
                422, "Invalid", f'{resource.kind} "{item["metadata"]["name"]}" is invalid: {"; ".join(wrong)}'
            )

    def _write(self, key: Key, item: Object, what: str) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        if what == "DELETED":
            self.objects.pop(key, None)
        else:
            self.objects[key] = item
        self.history.append((self.version, what, key[0], copy.deepcopy(item)))
        if len(self.history) > KEEP:
            self.oldest = self.history[0][0]
            del self.history[: KEEP // 2]
            self.oldest = self.history[0][0] - 1
        self.changed.notify_all()

    def _owned_by(self, uid: str) -> Iterator[Key]:
        for key, item in list(self.objects.items()):
            if any(one["uid"] == uid for one in item["metadata"].get("ownerReferences") or ()):
                yield key

    def _settle(self, key: Key) -> None:
        """Take away what is to be deleted and held by nobody, and what it owned: the garbage collector, at once."""
        item = self.objects.get(key)
        if item is None or "deletionTimestamp" not in item["metadata"]:
            return
        metadata, uid = item["metadata"], item["metadata"]["uid"]
        if FOREGROUND in (metadata.get("finalizers") or ()):
            for one in list(self._owned_by(uid)):
                child = self.objects.get(one)
                if child is not None and "deletionTimestamp" not in child["metadata"]:
                    self.delete(*one, {"propagationPolicy": "Foreground" if any(self._owned_by(_uid(child))) else None})
            if any(self._owned_by(uid)):
                return
            item = self.objects.get(key)
            if item is None:
                return
            item["metadata"]["finalizers"] = [one for one in item["metadata"]["finalizers"] if one != FOREGROUND]
        if item["metadata"].get("finalizers") or item["metadata"].get("deletionGracePeriodSeconds"):
            return
        owners = [one["uid"] for one in item["metadata"].get("ownerReferences") or ()]
        self._write(key, item, "DELETED")
        for one in list(self._owned_by(uid)):
            child = self.objects.get(one)
            alive = {_uid(other) for other in self.objects.values()}
            if child is not None and not any(ref["uid"] in alive for ref in child["metadata"]["ownerReferences"]):
                self.delete(*one, {})
        for other in [one for one, found in self.objects.items() if _uid(found) in owners]:
            self._settle(other)


def _uid(item: Object) -> str:
    return str(item["metadata"]["uid"])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def resource_of(group: str, version: str, plural: str) -> Resource:
    for one in RESOURCES:
        if (one.group, one.version, one.plural) == (group, version, plural):
            return one
    raise Refusal(404, "NotFound", "the server could not find the requested resource")


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def json_patch(target: Object, operations: list[Object]) -> Object:
    """RFC 6902: add, replace, remove, test."""
    result: Any = copy.deepcopy(target)
    for one in operations:
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in one["path"].split("/")[1:]]
        place = result
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        at: Any = last if isinstance(place, dict) else (len(place) if last == "-" else int(last))
        known = at in place if isinstance(place, dict) else at < len(place)
        match one["op"]:
            case "test":
                if not known or place[at] != one["value"]:
                    raise Refusal(422, "Invalid", f"the test of {one['path']} failed")
            case "add" if isinstance(place, list):
                place.insert(at, one["value"])
            case "remove":
                if not known:
                    raise Refusal(422, "Invalid", f"{one['path']} is not there")
                del place[at]
            case "replace" if not known:
                raise Refusal(422, "Invalid", f"{one['path']} is not there")
            case _:
                place[at] = one["value"]
    return dict(result)


def selector(labels: str, fields: str) -> Callable[[Object], bool]:
    """Whether an object fits a labelSelector and a fieldSelector."""
    tests: list[Callable[[Object], bool]] = []
    for part in re.findall(r"[^,()]+(?:\([^)]*\))?", labels):
        tests.append(_label(part.strip()))
    for part in filter(None, fields.split(",")):
        path, sign, value = re.match(r"([^=!]+)(!=|==|=)(.*)", part).groups()  # type: ignore[union-attr]
        tests.append(lambda item, p=path, s=sign, v=value: (_at(item, p) == v) == (s != "!="))  # type: ignore[misc]
    return lambda item: all(test(item) for test in tests)


def _label(part: str) -> Callable[[Object], bool]:
    def have(item: Object) -> dict[str, str]:
        return item["metadata"].get("labels") or {}

    some = re.fullmatch(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)", part)
    if some:
        wanted = {one.strip() for one in some[3].split(",")}
        return lambda item: (have(item).get(some[1]) in wanted) == (some[2] == "in")
    equal = re.fullmatch(r"([^=!\s]+)\s*(!=|==|=)\s*(\S*)", part)
    if equal:
        return lambda item: (have(item).get(equal[1]) == equal[3]) == (equal[2] != "!=")
    return (lambda item: part[1:] not in have(item)) if part.startswith("!") else (lambda item: part in have(item))


def _at(item: Any, path: str) -> str:
    for part in path.split("."):
        item = item.get(part) if isinstance(item, dict) else None
    return "" if item is None else str(item)
