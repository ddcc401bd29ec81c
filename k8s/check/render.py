"""Overlays as `kubectl kustomize` renders them; and components that no overlay has, over the base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ruamel.yaml import YAML

from k8s.check.model import Objects

K8S = Path(__file__).resolve().parents[1]
BEFORE: dict[str, tuple[str, ...]] = {"racks": ("gpu-h100",), "redis": ("gcs-fault-tolerance",)}
"""What a component needs before it, where no overlay has it."""


class RenderError(Exception):
    """kubectl renders nothing; the message is its own."""


def overlays(root: Path = K8S) -> list[str]:
    return sorted(path.parent.name for path in root.glob("overlays/*/kustomization.yaml"))


def components(root: Path = K8S) -> list[str]:
    return sorted(path.parent.name for path in root.glob("components/*/kustomization.yaml"))


def used(root: Path = K8S) -> set[str]:
    """Components that some overlay has."""
    found = set()
    for name in overlays(root):
        (file,) = parse((root / "overlays" / name / "kustomization.yaml").read_text())
        found |= {Path(path).name for path in file.get("components", [])}
    return found


def subjects(root: Path = K8S) -> list[str]:
    """Everything that is to be rendered: base, overlays, and the components that are in none."""
    alone = [f"components/{name}" for name in components(root) if name not in used(root)]
    return ["base", *(f"overlays/{name}" for name in overlays(root)), *alone]


def kubectl() -> str | None:
    """The program, or None where it is not installed."""
    return shutil.which("kubectl")


def render(subject: str, root: Path = K8S) -> Objects:
    """The objects of `base`, `overlays/NAME` or `components/NAME` over the base.

    Raises:
        RenderError: kubectl refuses it.
    """
    if not subject.startswith("components/"):
        return _kustomize(root / subject)
    name = Path(subject).name
    with tempfile.TemporaryDirectory(prefix="tuneyard-k8s-") as temporary:
        folder = Path(temporary).resolve()
        base = os.path.relpath(root / "base", folder)
        wanted = [os.path.relpath(root / "components" / one, folder) for one in (*BEFORE.get(name, ()), name)]
        lines = ["resources:", f"  - {base}", "components:", *(f"  - {path}" for path in wanted)]
        (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
        return _kustomize(folder)


def _kustomize(folder: Path) -> Objects:
    program = kubectl()
    if program is None:
        raise RenderError("kubectl is not installed")
    argv = [program, "kustomize", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RenderError(done.stderr.strip())
    return parse(done.stdout)


def parse(text: str) -> Objects:
    """The documents of a YAML file, as JSON would have them."""
    return [json.loads(json.dumps(item)) for item in YAML(typ="safe", pure=True).load_all(text) if item]
