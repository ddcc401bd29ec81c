"""Counting the memory of tensors that are only traced."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Ledger(TorchDispatchMode):
    """The bytes of every tensor that is made inside of it, from its making until it is freed.

    Views cost nothing: what is counted are storages. What a kernel takes and gives back by itself is not seen.
    """

    def __init__(self, bucket_elements: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.gradients = 0
        """Of `live`: gradients of weights that are complete."""
        self.most = self.most_beside = self.most_reducing = self.most_halving = 0
        """Since forget_peaks: the largest `live`, the largest `live - gradients`, and the largest of that with a bucket
        of so many elements, which complete gradients are copied into; last, with half of what was copied, too."""
        self._bucket_elements, self._bucket, self._complete = bucket_elements, 0, 0
        self._known: set[int] = set()

    def forget_peaks(self) -> None:
        self.most, self.most_beside = self.live, self.live - self.gradients
        self.most_reducing = self.most_halving = self.most_beside
        self._bucket = self._complete = 0

    def ignore(self, tensor: torch.Tensor) -> None:
        """`tensor` is there before, and counted elsewhere."""
        self._known.add(tensor.untyped_storage()._cdata)

    def note_gradient(self, gradient: torch.Tensor) -> None:
        """`gradient` of a weight is complete: until it is freed it counts as one."""
        storage = gradient.untyped_storage()
        size = storage.nbytes()
        self.gradients += size
        limit = self._bucket_elements * gradient.element_size()
        self._bucket = min(self._bucket + size, limit)  # what of the bucket has been touched
        self._complete += size
        self._look()
        weakref.finalize(storage, self._less_gradients, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self._look()
        weakref.finalize(storage, self._freed, key, size)

    def _look(self) -> None:
        beside = self.live - self.gradients
        self.most = max(self.most, self.live)
        self.most_beside = max(self.most_beside, beside)
        self.most_reducing = max(self.most_reducing, beside + self._bucket)
        self.most_halving = max(self.most_halving, beside + self._bucket + self._complete // 2)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _less_gradients(self, size: int) -> None:
        self.gradients -= size
