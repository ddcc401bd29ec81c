"""Which rows a step trains on, and which of them a rank does: pure functions, torch-free.

The order of an epoch depends on (dataset fingerprint, seed, epoch) alone, and progress is the number of samples
consumed by all ranks together. So a job that goes on with another world size or micro-batch sees every sample
exactly once per epoch, as it would have without the change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

WINDOW_BATCHES = 50  # as transformers' group_by_length: enough rows to sort, few enough to stay random


def shuffled(rows: int, *key: str | int) -> Indices:
    """A permutation of `range(rows)` that is a pure function of `key`.

    Philox is counter-based and its raw stream is fixed by NumPy's compatibility policy, unlike the shuffles built
    on it; sorting one 64-bit key a row is a uniform shuffle up to collisions, which the stable sort makes harmless.
    """
    digest = hashlib.sha256("|".join(str(part) for part in key).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(rows)
    return np.argsort(bits, kind="stable")


def epoch_order(fingerprint: str, seed: int, epoch: int, rows: int) -> Indices:
    """The order in which epoch `epoch` (0-based) visits its rows; shape (rows,)."""
    return shuffled(rows, "epoch", fingerprint, seed, epoch)


def grouped_by_length(order: Indices, lengths: Indices, batch: int, *key: str | int) -> Indices:
    """`order` with rows of like length brought into one batch of `batch`, so that little is padding.

    Rows move within a window of WINDOW_BATCHES batches only, and the batches are then shuffled, so that neither the
    model nor an evaluation in mid-epoch sees short rows first. The rows of a last, smaller batch stay last.
    """
    whole = len(order) // batch * batch
    window = WINDOW_BATCHES * batch
    cuts = [order[start : min(start + window, whole)] for start in range(0, whole, window)]
    if not cuts:
        return order
    in_batches = np.concatenate([cut[np.argsort(lengths[cut], kind="stable")] for cut in cuts]).reshape(-1, batch)
    return np.concatenate([in_batches[shuffled(len(in_batches), "batches", *key)].reshape(-1), order[whole:]])


@dataclass(frozen=True, eq=False)
class Sampler:
    """The training order of one dataset."""

    fingerprint: str
    seed: int
    rows: int
    global_batch_size: int
    lengths: Indices | None = None
    """Tokens of each row: then rows of like length share a batch. They are content, so the fingerprint covers them."""
    _orders: dict[int, Indices] = field(default_factory=dict, repr=False)

    def order(self, epoch: int) -> Indices:
        """The order in which epoch `epoch` (0-based) visits its rows; shape (rows,)."""
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self.fingerprint, self.seed, epoch, self.rows)
            if self.lengths is not None:
                key = (self.fingerprint, self.seed, epoch)
                order = grouped_by_length(order, self.lengths, self.global_batch_size, *key)
            self._orders.clear()  # one epoch at a time is walked through; two threads may cross its end apart
            self._orders[epoch] = order
        return order

    def batch(self, consumed: int) -> Indices:
        """Rows of the step that follows `consumed` samples; the last batch of an epoch may be smaller."""
        epoch, start = divmod(consumed, self.rows)
        return self.order(epoch)[start : start + self.global_batch_size]

    def consumed_after(self, steps: int) -> int:
        """Samples of the first `steps` batches."""
        epochs, more = divmod(steps, -(-self.rows // self.global_batch_size))
        return epochs * self.rows + more * self.global_batch_size

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps of `epochs` passes, a part of a pass rounded up to whole steps; at least one."""
        samples = round(epochs * self.rows)
        whole, part = divmod(samples, self.rows)
        return max(1, whole * -(-self.rows // self.global_batch_size) + -(-part // self.global_batch_size))


def micro_steps(rows: int, world_size: int, micro_batch_size: int) -> int:
    """Forward passes that every rank makes for a batch of `rows`: enough for the rank that has most."""
    rows_of_first_rank = -(-rows // world_size)
    return -(-rows_of_first_rank // micro_batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass. A dummy only keeps this rank's collectives in step: its weight is 0."""

    rows: Indices
    dummy: bool = False


def rank_micro_batches(batch: Indices, rank: int, world_size: int, micro_batch_size: int) -> Sequence[MicroBatch]:
    """This rank's part of `batch`, cut into micro-batches; the same number of them on every rank.

    The last may be smaller, and a rank that has fewer rows than others ends with dummies: ZeRO-3 gathers
    parameters in every forward pass and DDP reduces in the last backward pass, so all must make them.
    """
    assert len(batch) > 0
    mine = batch[rank::world_size]
    cuts = [MicroBatch(mine[start : start + micro_batch_size]) for start in range(0, len(mine), micro_batch_size)]
    missing = micro_steps(len(batch), world_size, micro_batch_size) - len(cuts)
    return cuts + [MicroBatch(batch[:1], dummy=True)] * missing
