"""One checkpoint into the live state of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from launch.checkpoint import random_state
from launch.checkpoint.manifest import LogicalTensor, Manifest, Unusable
from launch.checkpoint.plans import PartsLoadPlanner
from launch.checkpoint.ranks import Ranks
from launch.checkpoint.shards import ShardReader
from launch.checkpoint.state import BEST, TrainingState
from launch.checkpoint.storage import Storage


class Loaded(NamedTuple):
    """What came of loading, on this rank."""

    read_bytes: int
    random: bool
    """Whether it goes on with random numbers of its own that were saved."""


def load_into(
    state: TrainingState, storage: Storage, manifest: Manifest, ranks: Ranks, best: Mapping[str, torch.Tensor]
) -> Loaded:
    """Fill `state` and `best` with what the checkpoint holds, and go on with its random numbers if they are of as many
    ranks. All ranks call it, and it raises alike on all of them.

    Raises:
        Damaged: bytes are not those that were written; the state may hold some of them by then.
        Unusable: it is not of this training.
        CheckpointError: the store fails.
    """
    check_fits(manifest, state.tensors())
    parts = state.parts() + (state.divide(BEST, best) if best else [])
    room = random_state.capture()
    ours = manifest.plan.world_size == ranks.world_size
    ours = ours and all(f"rng-{ranks.rank}/{name}" in manifest.tensors for name in room)
    reader = ShardReader(storage, manifest)
    planner = PartsLoadPlanner(parts + (random_state.parts_of(ranks.rank, room) if ours else []))
    try:
        load({}, storage_reader=reader, planner=planner, process_group=ranks.group)
    except CheckpointException as problem:
        raise first_failure(problem) from problem
    state.loaded()
    if best:
        state.share(best)
    state.set_scalars(manifest.scalars)
    if ours:
        random_state.restore(room)
    return Loaded(reader.read_bytes, ours)


def check_fits(manifest: Manifest, tensors: Mapping[str, LogicalTensor]) -> None:
    """Raises Unusable if `manifest` is not of the training that has `tensors`."""
    for name, tensor in tensors.items():
        saved = manifest.tensors.get(name)
        if saved is None:
            raise Unusable(
                f"{manifest.id} has no {name}",
                code="checkpoint-differs",
                hint="were the model, the adapter or the optimizer changed? then begin a new job",
            )
        if saved.shape != tensor.shape:
            raise Unusable(
                f"{name} has the shape {list(saved.shape)} in {manifest.id}, and {list(tensor.shape)} here",
                code="checkpoint-differs",
                hint="were the model, the adapter or the labels changed? then begin a new job",
            )


def first_failure(problem: CheckpointException) -> BaseException:
    """What happened on the lowest rank that failed."""
    cause: BaseException = problem.failures[min(problem.failures)][0]
    return cause
