"""Rules for alerts and dashboards: they ask for metrics that exist, by labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from k8s.check.model import Found, Objects, name_of, of_kind, rule
from orchestrator.watch.families import FAMILIES

LABELS = {sample: family.labels for family in FAMILIES for sample in family.samples}
OF_TARGETS = frozenset({"job", "instance", "namespace", "pod", "service", "endpoint", "container"})
"""Labels that Prometheus adds."""


@rule("name metrics and labels of orchestrator/watch/families.py")
def metrics_exist(objects: Objects) -> Found:
    for where, expression in expressions(objects):
        yield from ((where, told) for told in unknown_in(expression))


@rule("an alert has a severity (critical, warning, info), a summary, a description, and a name of its own")
def alerts_say_what_they_are(objects: Objects) -> Found:
    for item in of_kind(objects, "PrometheusRule"):
        seen = set()
        for group in item["spec"]["groups"]:
            for alert in group["rules"]:
                name = alert.get("alert")
                if name is None or name in seen:
                    yield name_of(item), f"{name} is no name of its own"
                seen.add(name)
                if alert.get("labels", {}).get("severity") not in ("critical", "warning", "info"):
                    yield name_of(item), f"{name} has no severity"
                for key in ("summary", "description"):
                    if not alert.get("annotations", {}).get(key):
                        yield name_of(item), f"{name} has no {key}"


@rule("a dashboard is JSON with a uid, a title and panels, each with a target")
def dashboards_are_readable(objects: Objects) -> Found:
    for where, text in dashboards(objects):
        try:
            board = json.loads(text)
        except ValueError as problem:
            yield where, f"is not JSON: {problem}"
            continue
        if not board.get("uid") or not board.get("title") or not board.get("panels"):
            yield where, "has no uid, title or panels"
        numbers = [panel["id"] for panel in board.get("panels", [])]
        if len(set(numbers)) != len(numbers):
            yield where, "two panels have one id"
        for panel in board.get("panels", []):
            if not all(target.get("expr") for target in panel.get("targets", [])) or not panel.get("targets"):
                yield where, f"the panel {panel.get('title')} asks for nothing"


def dashboards(objects: Objects) -> Iterator[tuple[str, str]]:
    """(ConfigMap, text) of every dashboard."""
    for item in of_kind(objects, "ConfigMap"):
        if item["metadata"].get("labels", {}).get("grafana_dashboard"):
            yield from ((name_of(item), text) for text in item.get("data", {}).values())


def expressions(objects: Objects) -> Iterator[tuple[str, str]]:
    """(where, expression) of every alert and panel."""
    for item in of_kind(objects, "PrometheusRule"):
        for group in item["spec"]["groups"]:
            yield from ((f"{name_of(item)} {one.get('alert')}", one["expr"]) for one in group["rules"])
    for where, text in dashboards(objects):
        try:
            panels = json.loads(text).get("panels", [])
        except ValueError:
            continue  # told by another rule
        for panel in panels:
            yield from ((f"{where} {panel['title']}", one.get("expr", "")) for one in panel.get("targets", []))


def unknown_in(expression: str) -> Iterator[str]:
    """What an expression asks for and is not there: enough of PromQL's grammar for ours."""
    names = re.findall(r"\btuneyard_\w+", expression)
    if not names:
        yield "asks for nothing of the yard's"
    for name in names:
        if name not in LABELS:
            yield f"there is no metric {name}"
    known = {label for name in names for label in LABELS.get(name, ())} | OF_TARGETS
    for name, selector in re.findall(r"\b(tuneyard_\w+)\{([^}]*)\}", expression):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector):
            if label not in {*LABELS.get(name, ()), *OF_TARGETS}:
                yield f"{name} has no label {label}"
    for group in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression):
        for label in filter(None, re.split(r"[,\s]+", group)):
            if label not in known:
                yield f"nothing there has a label {label}"
