"""torch.distributed.checkpoint's planners for ranges of logical tensors: it works out who reads what from whom."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from launch.checkpoint.manifest import CheckpointError, LogicalTensor, Manifest
from launch.checkpoint.snapshot import dtype_of
from launch.checkpoint.state import Part


class PartsSavePlanner(SavePlanner):
    """Every rank writes its parts; the coordinator checks that together they cover every tensor once."""

    def __init__(self, parts: Sequence[Part], tensors: dict[str, LogicalTensor]) -> None:
        self._parts, self._tensors = parts, tensors

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(part, self._numel(part)) for part in self._parts])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        faults = _validate_global_plan(plans, metadata)
        # The validation is silent about gaps where there is one rank alone, and about a tensor that nobody has.
        for name, tensor in self._tensors.items():
            saved = metadata.state_dict_metadata.get(name)
            held = sum(chunk.sizes[0] for chunk in saved.chunks) if isinstance(saved, TensorStorageMetadata) else 0
            if held != tensor.numel:
                faults.append(f"{name} has {tensor.numel} elements, and the ranks hold {held} of them")
        if faults:
            raise CheckpointError(f"the ranks' parts are not the whole: {faults[0]}", code="state-incomplete")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        raise AssertionError("the writer has the parts already")

    def _numel(self, part: Part) -> int:
        known = self._tensors.get(part.name)
        return known.numel if known is not None else part.start + len(part.tensor)


def _write_item(part: Part, numel: int) -> WriteItem:
    start, length = torch.Size([part.start]), torch.Size([len(part.tensor)])
    return WriteItem(
        index=MetadataIndex(part.name, start),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=start, sizes=length),
            properties=TensorProperties(dtype=part.tensor.dtype),
            size=torch.Size([numel]),
        ),
    )


class PartsLoadPlanner(LoadPlanner):
    """Every rank asks for its parts, however they were divided when they were saved."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = {(part.name, part.start): part for part in parts}
        self._metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None
        items: list[ReadItem] = []
        for part in self._parts.values():
            saved = self._metadata.state_dict_metadata[part.name]
            assert isinstance(saved, TensorStorageMetadata)
            chunk = ChunkStorageMetadata(torch.Size([part.start]), torch.Size([len(part.tensor)]))
            found = create_read_items_for_chunk_list(part.name, saved, [chunk])
            covered = sum(item.lengths[0] for item in found)
            if covered != len(part.tensor):
                asked = f"elements {part.start} to {part.start + len(part.tensor)}"
                raise CheckpointError(
                    f"{part.name}: of {asked} the checkpoint has {covered}",
                    code="checkpoint-incomplete",
                )
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("there are tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where the item's elements go: a view of a part."""
        assert read_item.dest_index.offset is not None
        part = self._parts[read_item.dest_index.fqn, read_item.dest_index.offset[0]]
        return part.tensor.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def metadata_of(manifest: Manifest) -> Metadata:
    """What DCP plans with. The n-th chunk of a tensor is the n-th fragment of that name in the manifest's shards."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for shard in manifest.shards:
        for fragment in shard.fragments:
            chunk = ChunkStorageMetadata(torch.Size([fragment.start]), torch.Size([fragment.length]))
            chunks.setdefault(fragment.name, []).append(chunk)
    return Metadata(
        state_dict_metadata={
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype_of(tensor.dtype)),
                size=torch.Size([tensor.numel]),
                chunks=chunks.get(name, []),
            )
            for name, tensor in manifest.tensors.items()
        }
    )
