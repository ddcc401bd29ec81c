"""`python -m k8s.check`: render every overlay, and say what is wrong with it, and with the images.

Returns 0 if nothing is, 1 if something is, 2 if it could not be looked at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from k8s.check import image, render, schemas
from k8s.check.model import RULES, Finding
from k8s.check.policy import check_policy


def main(arguments: list[str] | None = None) -> int:
    """Check, and print. Returns an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m k8s.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "subjects", nargs="*", help="base, overlays/NAME, components/NAME; default: all, and the images"
    )
    parser.add_argument("--crd-dir", type=Path, help=f"schemas of custom resources; {schemas.CRD_ENV} is the same")
    parser.add_argument("--rules", action="store_true", help="list the rules")
    options = parser.parse_args(arguments)
    if options.rules:
        told = [(one.name, one.remedy) for one in RULES] + [(one.name, one.remedy) for one in image.IMAGE_RULES]
        print(*(f"{name}: {remedy}" for name, remedy in told), sep="\n")
        return 0
    if render.kubectl() is None:
        print("kubectl is not installed: nothing can be rendered", file=sys.stderr)
        return 2
    known = render.subjects() + [f"components/{name}" for name in render.components()]
    for subject in options.subjects:
        if subject not in known:
            parser.error(f"there is no {subject}; there are {', '.join(sorted(set(known)))}")
    found: list[Finding] = []
    skipped: set[str] = set()
    subjects = options.subjects or render.subjects()
    for subject in subjects:
        try:
            objects = render.render(subject)
        except render.RenderError as problem:
            found.append(Finding(subject, "kustomization.yaml", "renders", str(problem), "see what kubectl says"))
            continue
        broken, unseen = schemas.check_custom(subject, objects, options.crd_dir)
        found += [*broken, *schemas.check_core(subject, objects), *check_policy(subject, objects)]
        skipped |= unseen
    images = [] if options.subjects else image.dockerfiles()
    found += [finding for path in images for finding in image.check_image(path)]
    for finding in found:
        path = source_of(finding)
        print(f"{path}: {finding}" if path else finding)
    if skipped:
        where = options.crd_dir or schemas.crd_dir()
        print(f"not validated, for want of their schemas in {where}: {', '.join(sorted(skipped))}")
    print(f"{len(subjects)} rendered, {len(images)} images, {len(found)} findings")
    return 1 if found else 0


def source_of(finding: Finding) -> str | None:
    """The first file that makes the object of a finding, if one does."""
    kind, _, name = finding.object.partition("/")
    name = name.partition("/")[0].partition(" ")[0]
    for path in sorted(render.K8S.rglob("*.yaml")):
        for item in render.parse(path.read_text()):
            if isinstance(item, dict) and (item.get("kind"), item.get("metadata", {}).get("name")) == (kind, name):
                return str(path.relative_to(render.K8S.parent))
    return None


if __name__ == "__main__":
    sys.exit(main())
