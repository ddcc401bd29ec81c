"""This rank's micro-batches, step by step, as tensors on its device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from launch.contract import ExecutionPlan
from launch.data import Batch, Rows, collate
from launch.errors import ContractError
from launch.sampler import Indices, Sampler, micro_steps, rank_micro_batches


class Micro(NamedTuple):
    batch: Batch
    weight: float
    """0 for a dummy, which only keeps this rank's collectives in step."""
    rows: Indices
    """Which rows of the data they are; none for a dummy."""


class Feed:
    """What comes after so many consumed samples; with a GPU, the step after that is laid out meanwhile.

    On a CPU the thread that would do it is one of those that compute.
    """

    def __init__(
        self,
        rows: Rows,
        sampler: Sampler,
        plan: ExecutionPlan,
        rank: int,
        pad_token_id: int,
        *,
        causal: bool,
        varlen: bool,
        ahead: bool,
    ) -> None:
        self._rows, self._sampler, self._plan, self._rank = rows, sampler, plan, rank
        self._pad_token_id, self._causal, self._varlen = pad_token_id, causal, varlen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed") if ahead else None
        self._next: tuple[int, Future[list[Micro]]] | None = None

    def chosen(self, consumed: int) -> Indices:
        """The rows of the step that follows `consumed` samples, over all ranks."""
        return self._sampler.batch(consumed)

    def consumed_after(self, steps: int) -> int:
        """Samples that all ranks together have consumed after so many steps, left out or not."""
        return self._sampler.consumed_after(steps)

    def step(self, consumed: int, device: torch.device) -> Iterator[Micro]:
        """This rank's micro-batches of that step, the same number of them on every rank."""
        for micro in self._taken(consumed):
            yield micro._replace(batch=micro.batch.to(device))

    def _taken(self, consumed: int) -> list[Micro]:
        if self._thread is None:
            return self._laid_out(consumed)
        if self._next is not None and self._next[0] == consumed:
            found = self._next[1].result()
        else:
            found = self._laid_out(consumed)
        following = consumed + len(self.chosen(consumed))
        self._next = (following, self._thread.submit(self._laid_out, following))
        return found

    def _laid_out(self, consumed: int) -> list[Micro]:
        parts = rank_micro_batches(
            self.chosen(consumed), self._rank, self._plan.world_size, self._plan.micro_batch_size
        )
        found = []
        for part in parts:
            batch = collate(self._rows, part.rows, self._pad_token_id, causal=self._causal, varlen=self._varlen)
            if self._plan.device == "cuda":
                batch = batch.map(torch.Tensor.pin_memory)
            found.append(Micro(batch, 0.0, part.rows[:0]) if part.dummy else Micro(batch, 1.0, part.rows))
        return found


def check_accumulation(plan: ExecutionPlan, global_batch_size: int) -> None:
    """Raises ContractError if the plan's micro-batches do not add up to the job's batch."""
    wanted = micro_steps(global_batch_size, plan.world_size, plan.micro_batch_size)
    if plan.gradient_accumulation_steps != wanted:
        raise ContractError(
            f"{plan.gradient_accumulation_steps} accumulation steps of {plan.micro_batch_size} rows on "
            f"{plan.world_size} ranks are not the global batch of {global_batch_size} rows",
            field="plan.gradient_accumulation_steps",
            hint=f"{wanted} would be",
        )
