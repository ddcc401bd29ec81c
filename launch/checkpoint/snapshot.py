"""The copy of a rank's parts that is written while training goes on: the very bytes of its file, in one host buffer."""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from launch.checkpoint.manifest import BLOCK, Fragment
from launch.checkpoint.state import Part, dtype_name

SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGN = 4096


class Layout:
    """Where each part lies in the file: a safetensors header, then the parts, larger elements first.

    So every element is aligned and none lies across the border of two blocks.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.order = sorted(range(len(parts)), key=lambda i: -parts[i].tensor.element_size())
        entries: dict[str, object] = {}
        position = 0
        ends: list[tuple[Part, int]] = []
        for part in (parts[i] for i in self.order):
            size = part.tensor.numel() * part.tensor.element_size()
            entries[f"{part.name}[{part.start}]"] = {
                "dtype": SAFETENSORS[part.tensor.dtype],
                "shape": [part.tensor.numel()],
                "data_offsets": [position, position + size],
            }
            ends.append((part, position))
            position += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        room = -(-(8 + len(text)) // _ALIGN) * _ALIGN
        self.header = (room - 8).to_bytes(8, "little") + text.ljust(room - 8)
        self.size = room + position
        self.fragments = tuple(
            Fragment(name=part.name, start=part.start, length=part.tensor.numel(), offset=room + begin)
            for part, begin in ends
        )
        self.dtypes = tuple(part.tensor.dtype for part, _ in ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.header == other.header

    __hash__ = None  # type: ignore[assignment]  # compared, never looked up


class HostBuffer:
    """Memory for one file, taken once and used for every save."""

    def __init__(self, layout: Layout, *, pinned: bool, mapped: mmap.mmap | None = None) -> None:
        """`mapped` is memory to use instead of some of its own."""
        self.layout = layout
        if mapped is not None:
            self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        elif pinned:  # a GPU copies to pageable memory at half the speed, and not beside the host
            self._bytes = torch.zeros(layout.size, dtype=torch.uint8, pin_memory=True)
        else:
            memory = mmap.mmap(-1, layout.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
            self._bytes.numpy().fill(0)  # the first copy need not wait for the kernel to find the pages
        bytes_of(self._bytes)[: len(layout.header)] = layout.header
        self._pieces = [
            self._bytes[f.offset : f.offset + f.length * dtype.itemsize]
            for f, dtype in zip(layout.fragments, layout.dtypes, strict=True)
        ]

    def copy(self, parts: Sequence[Part], after: torch.cuda.Event | None = None) -> None:
        """Copy `parts`, which lie as those the layout was made of; when this returns they may change.

        From any thread: a GPU's go over a stream of their own, once `after` has passed.
        """
        stream = torch.cuda.Stream() if after is not None else None
        if stream is not None:
            stream.wait_event(after)  # type: ignore[arg-type]
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            for piece, index in zip(self._pieces, self.layout.order, strict=True):
                copy_bytes(piece, parts[index].tensor)
        if stream is not None:
            stream.synchronize()

    def blocks(self) -> Iterator[memoryview]:
        """The file, BLOCK bytes at a time."""
        memory = bytes_of(self._bytes)
        for start in range(0, len(memory), BLOCK):
            yield memory[start : start + BLOCK]


def streamed_blocks(layout: Layout, parts: Sequence[Part]) -> Iterator[memoryview]:
    """The same file with no more memory than a block, from the live tensors: training must wait for it."""
    staging = torch.empty(BLOCK, dtype=torch.uint8)
    memory = bytes_of(staging)
    memory[: min(BLOCK, len(layout.header))] = layout.header[:BLOCK]
    filled = len(layout.header)
    rest = memoryview(layout.header)[BLOCK:]
    while filled >= BLOCK:  # a header longer than a block
        yield memory
        filled -= BLOCK
        memory[: min(BLOCK, len(rest))] = rest[:BLOCK]
        rest = rest[BLOCK:]
    for index in layout.order:
        source = parts[index].tensor
        done, size = 0, source.element_size()
        while done < len(source):
            count = min(len(source) - done, (BLOCK - filled) // size)
            copy_bytes(staging[filled : filled + count * size], source[done : done + count])
            done, filled = done + count, filled + count * size
            if filled == BLOCK:
                yield memory
                filled = 0
    if filled:
        yield memory[:filled]


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a flat tensor to as many bytes of the host; from a GPU, in the order of the current stream.

    The host's own by this thread alone. torch would have it take the cores of those that compute; and after its first
    parallel operation a thread has threads of OpenMP's for ever, more than there are cores, so that those of the
    training sleep between operations instead of spinning: a tenth of a small model's step.
    """
    if source.is_cuda:
        target.copy_(source.view(torch.uint8), non_blocking=target.is_pinned())
    else:
        np.copyto(target.numpy(), source.view(torch.uint8).numpy())


def bytes_of(memory: torch.Tensor) -> memoryview:
    """The same memory, for storage: of a tensor of uint8 on the host."""
    return memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers; its stubs do not say so


def dtype_of(name: str) -> torch.dtype:
    """The inverse of dtype_name; raises KeyError for one that no shard can hold."""
    return {dtype_name(dtype): dtype for dtype in SAFETENSORS}[name]
