"""`python -m launch.checkpoint.diff`: what differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.export import fail
from launch.checkpoint.manifest import CheckpointError, CheckpointId, Manifest
from launch.checkpoint.storage import open_storage
from launch.checkpoint.stored import StoredTensors


def diff(first: StoredTensors, second: StoredTensors) -> dict[str, Any]:
    """What differs, as JSON types. Random states are compared by equality alone; of weights and moments the largest
    absolute difference is told, and that of the whole tensor relative to the first: |a - b| / |a| by 2-norm.

    Raises:
        Damaged: the bytes of one are not those that were written.
    """
    mine, other = first.manifest, second.manifest
    both = [name for name in mine.tensors if name in other.tensors]
    reshaped = [name for name in both if mine.tensors[name].shape != other.tensors[name].shape]
    changed: list[dict[str, Any]] = []
    equal = 0
    for name in both:
        if name in reshaped:
            continue
        a, b = first.read(name), second.read(name)
        if torch.equal(a, b):
            equal += 1
            continue
        entry: dict[str, Any] = {"name": name, "max_abs": None, "relative": None}
        if a.is_floating_point() and not name.startswith("rng-"):
            gap, norm = (a.double() - b.double()), float(a.double().norm())
            entry["max_abs"] = float(gap.abs().max())
            entry["relative"] = float(gap.norm()) / norm if norm > 0 else None
        changed.append(entry)
    return {
        "ids": [mine.id, other.id],
        "facts": _facts(mine, other),
        "only_in_first": [name for name in mine.tensors if name not in other.tensors],
        "only_in_second": [name for name in other.tensors if name not in mine.tensors],
        "reshaped": reshaped,
        "equal": equal,
        "changed": sorted(changed, key=lambda entry: -(entry["max_abs"] or 0.0)),
    }


def _facts(mine: Manifest, other: Manifest) -> dict[str, list[Any]]:
    """What the manifests say otherwise of step, data and layout: name → of the first, of the second."""

    def facts(manifest: Manifest) -> dict[str, Any]:
        told = {"step": manifest.step, "samples": manifest.samples, **manifest.scalars}
        told |= {f"plan.{name}": value for name, value in manifest.plan.model_dump(mode="json").items()}
        return told | {f"metrics.{name}": value for name, value in (manifest.metrics or {}).items()}

    a, b = facts(mine), facts(other)
    return {name: [a.get(name), b.get(name)] for name in {**a, **b} if a.get(name) != b.get(name)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch.checkpoint.diff", description=__doc__)
    parser.add_argument("store", help="directory or URL of the checkpoints")
    parser.add_argument("first", help="step-N.attempt-A")
    parser.add_argument("second", help="step-N.attempt-A")
    parser.add_argument("--second-store", help="where the second is, if elsewhere")
    options = parser.parse_args()
    try:
        found = [
            _stored(url, name)
            for url, name in (
                (options.store, options.first),
                (options.second_store or options.store, options.second),
            )
        ]
        print(json.dumps(diff(*found)))
    except CheckpointError as problem:
        fail(problem)


def _stored(url: str, name: str) -> StoredTensors:
    found = CheckpointId.parse(name)
    if found is None:
        raise CheckpointError(
            f"{name} is not the id of a checkpoint", code="no-such-checkpoint", hint="step-N.attempt-A"
        )
    storage = open_storage(url)
    return StoredTensors(storage, Catalogue(storage).manifest(found))


if __name__ == "__main__":
    main()
