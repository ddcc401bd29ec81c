"""All rules, in one place: importing the modules registers them."""

from __future__ import annotations

from k8s.check import access, monitoring, pods, ray, references
from k8s.check.model import RULES, Finding, Objects

__all__ = ["access", "monitoring", "pods", "ray", "references"]


def check_policy(subject: str, objects: Objects) -> list[Finding]:
    """What these objects, which are applied together, break of our rules."""
    return [finding for rule in RULES for finding in rule.check(subject, objects)]
