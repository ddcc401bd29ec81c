"""Validity by published schemas: core objects and KubeRay's and Kueue's custom resources; those of monitoring by ours.

Unknown fields are refused, which an API server would drop without a word.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from k8s.check.model import Finding, Object, Objects, name_of, pods

VERSIONS = ("1.29", "1.33", "1.37")
CRD_ENV = "TUNEYARD_CRD_DIR"
GROUPS = ("ray.io", "kueue.x-k8s.io")
REMEDY = "write the field as the schema has it"


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    fields = {"additionalProperties": False, "properties": properties, "required": required.split()}
    return {"type": "object", **fields}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def _monitoring(**spec: Any) -> dict[str, Any]:
    metadata = _object("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    version = {"const": "monitoring.coreos.com/v1"}
    whole = _object(" ".join(spec), **spec)
    return _object("apiVersion kind metadata spec", apiVersion=version, kind=TEXT, metadata=metadata, spec=whole)


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION = {"type": "string", "pattern": r"^([0-9]+[hms])+$"}
ENDPOINT = _object(
    "port",
    port=TEXT,
    path={"type": "string", "pattern": "^/"},
    scheme={"enum": ["http", "https"]},
    interval=DURATION,
    scrapeTimeout=DURATION,
    authorization=_object(
        "type credentials", type={"const": "Bearer"}, credentials=_object("name key", name=TEXT, key=TEXT)
    ),
)
ALERT = _object("alert expr", alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": DURATION})
# Their published schemas are not at hand: these are the fields that we use, and no other passes.
MONITORING: dict[str, dict[str, Any]] = {
    "ServiceMonitor": _monitoring(selector=_object("matchLabels", matchLabels=TEXTS), endpoints=_list(ENDPOINT)),
    "PrometheusRule": _monitoring(groups=_list(_object("name rules", name=TEXT, rules=_list(ALERT)))),
}


def crd_dir() -> Path:
    """Where the schemas of custom resources are looked for."""
    return Path(os.environ.get(CRD_ENV) or Path(__file__).resolve().parents[3] / "shared" / "schemas")


def closed(schema: Any) -> Any:
    """A CRD's schema with unknown fields refused."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@functools.cache
def custom(api_version: str, kind: str, folder: Path) -> jsonschema.Draft202012Validator | None:
    """The validator of a custom resource; None where its schema is not at hand."""
    if kind in MONITORING:
        return jsonschema.Draft202012Validator(MONITORING[kind])
    group, _, version = api_version.partition("/")
    path = folder / f"{group}_{_plural(kind)}.json"
    if not path.is_file():
        return None
    for one in json.loads(path.read_text())["spec"]["versions"]:
        if one["name"] == version:
            return jsonschema.Draft202012Validator(closed(one["schema"]["openAPIV3Schema"]))
    return jsonschema.Draft202012Validator(False)


def _plural(kind: str) -> str:
    name = kind.lower()
    if name.endswith("y"):
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith("s") else f"{name}s"


def is_custom(item: Object) -> bool:
    return item["apiVersion"].partition("/")[0] in GROUPS or item["kind"] in MONITORING


def check_custom(subject: str, objects: Objects, folder: Path | None = None) -> tuple[list[Finding], set[str]]:
    """What is not valid of custom resources; and the kinds that were not looked at, for want of a schema."""
    found, skipped = [], set()
    for item in filter(is_custom, objects):
        validator = custom(item["apiVersion"], item["kind"], folder or crd_dir())
        if validator is None:
            skipped.add(item["kind"])
            continue
        for error in validator.iter_errors(item):
            message = f"{error.json_path}: {error.message[:300]}"
            found.append(Finding(subject, name_of(item), "custom-resource", message, REMEDY))
    return found, skipped


def check_core(subject: str, objects: Objects, versions: tuple[str, ...] = VERSIONS) -> list[Finding]:
    """What is not valid of objects of Kubernetes itself, and of the pods of Ray's groups."""
    return [
        Finding(subject, name_of(item), f"kubernetes-{version}", message, REMEDY)
        for item in _core(objects)
        for version in versions
        for message in _core_errors(item, version)
    ]


def _core(objects: Objects) -> Iterator[Object]:
    """Objects of Kubernetes itself, and each of Ray's pod templates as the Pod that it becomes."""
    for item in objects:
        if not is_custom(item):
            yield item
    for pod in pods(objects):
        if pod.role:
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.owner}, "spec": pod.spec}


def _core_errors(item: Object, version: str) -> list[str]:
    """Why a Kubernetes of that version would refuse an object."""
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.ValidationError as problem:
        return [f"{'.'.join(map(str, problem.path))}: {problem.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"there is no {item['kind']} in {item['apiVersion']}"]
    return []
