"""What the emulated API server says of itself: its groups, kinds, and that it validates what is patched and created."""

from __future__ import annotations

from itertools import groupby

from tests.kubernetes.resources import RESOURCES, Object, Resource

VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def described(path: str) -> Object | str | None:
    """The document at a path; None where there is none."""
    match path.strip("/").split("/"):
        case ["version"]:
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0-emulated", "platform": "none"}
        case ["healthz" | "readyz" | "livez"]:
            return "ok"
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        case ["apis"]:
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(name) for name in _groups()]}
        case ["api", "v1"]:
            return _resources("", "v1")
        case ["apis", group]:
            return _group(group) if group in _groups() else None
        case ["apis", group, version]:
            return _resources(group, version)
        case ["openapi", "v3"]:
            roots = sorted({one.root for one in RESOURCES})
            return {"paths": {root[1:]: {"serverRelativeURL": f"/openapi/v3{root}?hash=1"} for root in roots}}
        case ["openapi", "v3", *rest]:
            root = "/" + "/".join(rest)
            return _openapi([one for one in RESOURCES if one.root == root])
    return None


def _groups() -> list[str]:
    return [name for name, _ in groupby(sorted({one.group for one in RESOURCES if one.group}))]


def _group(name: str) -> Object:
    versions = sorted({one.version for one in RESOURCES if one.group == name})
    some = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": some, "preferredVersion": some[-1], "kind": "APIGroup", "apiVersion": "v1"}


def _resources(group: str, version: str) -> Object | None:
    found = [one for one in RESOURCES if (one.group, one.version) == (group, version)]
    if not found:
        return None
    listed = []
    for one in found:
        common = {"namespaced": one.namespaced, "kind": one.kind, "singularName": one.kind.lower()}
        listed.append({"name": one.plural, "verbs": VERBS, "shortNames": list(one.short), **common})
        listed += [
            {"name": f"{one.plural}/{sub}", "verbs": ["get", "patch", "update"], **common} for sub in one.subresources
        ]
    return {
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": found[0].api_version, "resources": listed,
    }  # fmt: skip


def _openapi(found: list[Resource]) -> Object | None:
    """As much as kubectl looks for: kinds, and that PATCH and POST know fieldValidation."""
    if not found:
        return None
    validates = {
        "parameters": [{"name": name, "in": "query"} for name in ("fieldValidation", "dryRun", "fieldManager")]
    }
    paths = {}
    schemas = {}
    for one in found:
        kind = {"group": one.group, "version": one.version, "kind": one.kind}
        place = f"{one.root}/namespaces/{{namespace}}/{one.plural}" if one.namespaced else f"{one.root}/{one.plural}"
        operation = {**validates, "x-kubernetes-group-version-kind": kind, "responses": {}}
        paths[place] = {"post": operation}
        paths[f"{place}/{{name}}"] = {"patch": operation, "put": operation}
        schemas[f"{one.group}.{one.version}.{one.kind}"] = {"type": "object", "x-kubernetes-group-version-kind": [kind]}
    info = {"title": "Kubernetes", "version": "v1.33.0"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}
