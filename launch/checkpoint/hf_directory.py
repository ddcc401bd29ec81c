"""A directory as transformers reads it, written tensor by tensor: no more than one is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from launch.checkpoint.snapshot import SAFETENSORS, bytes_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    folder: Path, entries: Iterable[Entry], tensor_of: Callable[[str], torch.Tensor], max_shard: int
) -> list[Path]:
    """Write the tensors as safetensors files of at most `max_shard` bytes each (a larger tensor has one of its own),
    with the index that transformers reads if there are several; returns the files.

    Raises:
        OSError: the directory cannot be written.
    """
    shards = cut(entries, max_shard)
    if len(shards) == 1:
        write_file(folder / WEIGHTS, shards[0], tensor_of)
        return [folder / WEIGHTS]
    places: dict[str, str] = {}
    files = []
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(path, shard, tensor_of)
        places |= {entry.name: path.name for entry in shard}
        files.append(path)
    total = sum(entry.size for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def cut(entries: Iterable[Entry], max_shard: int) -> list[list[Entry]]:
    """`entries` in order, in groups of at most `max_shard` bytes; at least one group."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size > max_shard:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    return shards


def write_file(path: Path, entries: list[Entry], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """One safetensors file (https://github.com/huggingface/safetensors, "Format"), durable when this returns."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Larger elements first, so that each is aligned.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    for entry in ordered:
        header[entry.name] = {
            "dtype": SAFETENSORS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.size],
        }
        position += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    room = -(-len(text) // 8) * 8
    with path.open("wb") as out:
        out.write(room.to_bytes(8, "little") + text.ljust(room))
        for entry in ordered:
            tensor = tensor_of(entry.name).detach().to(entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
            if tensor.numel():
                out.write(bytes_of(tensor.view(-1).view(torch.uint8)))
            del tensor
        out.flush()
        os.fsync(out.fileno())


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        assert path.resolve().parent == folder.resolve(), name
        path.write_bytes(data)
