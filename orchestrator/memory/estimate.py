"""What a rank will hold at most, from a model's footprint and a plan. Pure; docs/memory.md has the formulas' sources.

N ranks, P weights of which T are trained; w bytes a weight, g bytes a gradient, m bytes a trained weight's fp32 master
(where weights are not fp32) and moments:

    single, ddp   w P + (g + m) T                ZeRO-2   w P + (g + m) T / N
    ZeRO-1        w P + g T + m T / N            ZeRO-3  (w P + (g + m) T) / N + what is gathered

(Rajbhandari et al. 2020, ZeRO). What DeepSpeed holds beside that was read in its source (0.19) and measured on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from launch.contract import ExecutionPlan
from launch.engine_config import (
    BUCKET_ELEMENTS,
    DISK_BUFFERS,
    DISK_PARAMETER_BUFFERS,
    DISK_PARAMETER_ELEMENTS,
    DISK_SUB_GROUP_ELEMENTS,
    LIVE_ELEMENTS,
    NEARBY_BYTES,
)
from launch.footprint_record import Footprint, Passes

FP32 = 4
MIB = 1 << 20

IMPORTED = 458 * MIB
"""cpu: a process with all that training imports, where it was not measured."""
IMPORTED_CODE = 138 * MIB
"""Of that, pages of libraries."""
SETTLED = {"single": 107 * MIB, "ddp": 107 * MIB, "zero": 155 * MIB}
"""cpu: what a process takes beside tensors from then to its first steps: the tokenizer, buffers that libraries keep.
Measured with the pinned versions; DeepSpeed's share is its communication."""
SETTLED_CODE = 35 * MIB
"""The same, of pages of libraries."""
EXPORTING = 31 * MIB
"""The same, for the export."""

CUDA_CONTEXT = 600 * MIB
"""cuda: driver, kernels and workspaces of cuBLAS and NCCL, which torch does not count. With RESERVED measured once, in
one process on an H200: both together were a third of what is counted."""
CUDA_PROCESS = 2560 * MIB
"""Host memory of a process that uses a GPU, beside tensors. Measured once, on an H200: 30 MB more."""
RESERVED = 0.05
"""cuda: of what is allocated, what the caching allocator holds beside it with expandable segments; three times that
without. With expandable segments not measured by us."""


class Side(BaseModel):
    """The memory of a GPU, or of a host, as one rank needs it."""

    model_config = ConfigDict(frozen=True)

    peak_bytes: int
    moment: str
    """When that is: load, passes, later passes (gradients are there), reduce, step, export; steady; of a host."""
    breakdown: dict[str, int]
    """What it consists of at that moment; adds up to peak_bytes."""


class Predicted(BaseModel):
    """Of one rank. On a CPU device and host are one memory, and their sum is what the process holds."""

    model_config = ConfigDict(frozen=True)

    device: Side
    host: Side

    @property
    def peak_bytes(self) -> int:
        """Of both."""
        return self.device.peak_bytes + self.host.peak_bytes


Items = dict[str, float]
"""Bytes by name."""


def predict(
    footprint: Footprint,
    plan: ExecutionPlan,
    *,
    rows: int | None = None,
    save_buffer: bool = True,
    keep_best: bool = False,
    adapter_alone: bool = False,
    memory_copies: bool = False,
    local: int = 1,
) -> Predicted:
    """The most that a rank of `plan` will hold: device and host, each at its own worst moment.

    `rows`: of a step and rank, where they are known: the last micro-batch may be smaller than the others.
    `save_buffer`: checkpoints are copied into host memory before they are written; `keep_best`: the best weights, too.
    `adapter_alone`: the base model is not part of what is exported. `memory_copies`: the state is copied into shared
    memory, twice, and where all ranks hold the same, those of a host divide it (launch.checkpoint.memory). `local`: the
    ranks that share a host; one of them exports, and each is counted with its part of that. If these are all ranks of a
    ddp on a CPU, each sees what they share for averaging gradients (launch.nearby).

    Raises:
        KeyError: the footprint has no passes for the plan's precision and checkpointing.
    """
    passes = footprint.of(plan)
    if passes is None:
        raise KeyError(f"{plan.precision}, checkpointing {plan.activation_checkpointing}, loss {plan.loss}")
    later = min(plan.micro_batch_size, rows - plan.micro_batch_size) if rows is not None else plan.micro_batch_size
    exported = footprint.trainable if adapter_alone else footprint.parameters
    rank = _Rank(footprint, plan, passes, max(1, later), exported)
    host = dict(rank.host_steady())
    if save_buffer:
        host["checkpoint_buffer"] = rank.saved / plan.world_size
    if keep_best:
        host["best_weights"] = rank.masters_here
    if memory_copies:
        best = FP32 * footprint.trainable if keep_best else 0
        host["memory_copies"] = 2 * (rank.saved + best) / (rank.shares if rank.stage else local)
    if plan.device == "cpu" and plan.engine == "ddp" and local == plan.world_size:
        host["exchange"] = 2 * local * min(NEARBY_BYTES, rank.gradients)
    if plan.device == "cpu":
        return Predicted(device=_worst(rank.moments()), host=_worst({"steady": host}))
    device = {name: rank.on_cuda(items) for name, items in rank.moments().items() if name != "export"}
    written = {"export": (rank.width * exported + EXPORTING) / local}
    return Predicted(
        device=_worst(device), host=_worst({"steady": host, "load": rank.host_load(), "export": host | written})
    )


def _worst(moments: Mapping[str, Items]) -> Side:
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    breakdown = {item: round(size) for item, size in moments[name].items() if round(size)}
    return Side(peak_bytes=sum(breakdown.values()), moment=name, breakdown=breakdown)


@dataclass(frozen=True)
class _Rank:
    """The terms of one rank, in bytes."""

    footprint: Footprint
    plan: ExecutionPlan
    passes: Passes
    later_rows: int
    """Of the second micro-batch, if there is one: it finds gradients there."""
    exported: int
    """Weights of the model directory."""

    @property
    def stage(self) -> int:
        return self.plan.zero_stage

    @property
    def narrow(self) -> bool:
        """Whether the weights themselves are of two bytes."""
        return self.stage > 0 and self.plan.half is not None

    @cached_property
    def width(self) -> int:
        """Bytes of a weight, and of its gradient."""
        return FP32 // 2 if self.narrow else FP32

    @property
    def shares(self) -> int:
        """Among how many ranks the optimizer's state is divided."""
        return self.plan.world_size if self.stage else 1

    @property
    def offloads(self) -> bool:
        """Whether anything leaves the device; on a CPU nothing does."""
        return self.plan.device == "cuda" and self.plan.offload != "none"

    @cached_property
    def weights(self) -> float:
        whole = self.width * self.footprint.parameters + self.footprint.buffers_bytes
        if self.stage < 3:
            return whole
        kept = self.width * self.footprint.small
        if self.plan.device == "cuda" and self.plan.offload == "all":
            return kept
        return whole / self.plan.world_size + kept

    @cached_property
    def optimizer(self) -> float:
        """Moments and, under ZeRO, the fp32 master, which it keeps in fp32, too; none of it if it is on a disk."""
        if self.plan.offload_path:
            return 0.0
        return self.footprint.moments_bytes / self.shares + (self.masters if self.stage else 0.0)

    @cached_property
    def masters(self) -> float:
        return FP32 * self.footprint.trainable / self.shares

    @cached_property
    def masters_here(self) -> float:
        """The trained weights as a rank holds them."""
        return self.width * self.footprint.trainable / (self.plan.world_size if self.stage == 3 else 1)

    @cached_property
    def gradients(self) -> float:
        return self.width * self.footprint.trainable

    @cached_property
    def bucket(self) -> float:
        """A buffer in which gradients are reduced."""
        return self.width * min(BUCKET_ELEMENTS, self.footprint.trainable)

    def gathered(self, reduced: int = 0) -> float:
        """Of ZeRO-3: what is kept from the forward pass until the backward pass has used it, less the weights of which
        so many gradients are there already."""
        live = min(LIVE_ELEMENTS, self.footprint.parameters) - reduced
        return self.width * max(live, self.footprint.largest)

    @property
    def saved(self) -> float:
        """A checkpoint, of all ranks together."""
        return FP32 * self.footprint.trainable + self.footprint.moments_bytes

    def state(self) -> Items:
        """What is there all the time."""
        items = {"weights": self.weights, "optimizer": 0.0 if self.offloads else self.optimizer}
        if self.plan.engine == "ddp":
            items["gradients"] = self.gradients  # DDP's buckets, of which gradients are views
        elif self.stage == 3 and not self.offloads:
            items |= {"gradients": self.gradients / self.shares, "buckets": self.bucket}
        if self.plan.device == "cpu":
            items["offload"] = self.offload_buffers
        return items

    @property
    def offload_buffers(self) -> float:
        """What DeepSpeed holds on the host beside what it has moved there: the shard's gradients in fp32; in stages 1
        and 2 twice, and two buffers as large as the largest weight."""
        if self.plan.offload == "none":
            return 0.0
        if self.plan.offload_path:
            return DISK_BUFFERS * FP32 * min(DISK_SUB_GROUP_ELEMENTS, self.footprint.trainable / self.shares)
        return self.masters if self.stage == 3 else 2 * self.masters + 2 * FP32 * self.footprint.largest

    def moments(self) -> dict[str, Items]:
        """What is on the device at each moment that may be the worst."""
        state = self.state()
        rows = self.plan.micro_batch_size
        at_loss, beside = self.passes.at_loss.at(rows), self.passes.beside_gradients.at(rows)
        passes = state | {"activations": min(at_loss, beside), "loss": max(0.0, beside - at_loss)}
        if self.stage == 3:
            passes["gathered"] = self.gathered()
        if self.plan.engine == "single":
            passes["gradients"] = max(0.0, self.passes.with_gradients.at(rows) - beside)
        found = {"passes": passes, "step": dict(self._step(state)), "export": dict(self._export(state))}
        if self.plan.gradient_accumulation_steps > 1 and (self.stage in (1, 2) or self.plan.engine == "single"):
            at_loss, beside = self.passes.at_loss.at(self.later_rows), self.passes.beside_gradients.at(self.later_rows)
            found["later passes"] = state | {
                "activations": min(at_loss, beside),
                "loss": max(0.0, beside - at_loss),
                "gradients": self.gradients / (self.shares if self.stage == 2 else 1),
            }
        if self.stage:
            found["reduce"] = state | self._reducing(rows, beside)
        return found

    def _reducing(self, rows: int, beside: float) -> Items:
        """The backward pass, while gradients go through the bucket and a share of each is kept."""
        none, two = self.passes.while_reducing, self.passes.while_halving
        if self.stage == 3:
            # The bucket is there all the time, and so are the gradients; ranks exchange a copy of what is in it.
            comes = none.at(rows) - self.bucket if none is not None else beside - self.bucket
            gathered = self.gathered(min(BUCKET_ELEMENTS, self.footprint.trainable))
            return {"activations": max(0.0, comes), "communication": self.bucket, "gathered": gathered}
        if none is None or two is None:
            kept = self.gradients / self.shares
            return {"activations": max(0.0, beside - self.bucket), "buckets": self.bucket, "gradients": kept}
        kept = (two.at(rows) - none.at(rows)) * 2 / self.shares
        return {"activations": max(0.0, none.at(rows) - self.bucket), "buckets": self.bucket, "gradients": kept}

    def _step(self, state: Items) -> Iterator[tuple[str, float]]:
        yield from state.items()
        if not self.stage:
            yield "gradients", self.gradients
            yield "step", self.footprint.step_bytes
            return
        share = self.gradients / self.shares
        yield "gradients", share
        # The shard's gradients laid end to end, and in fp32.
        yield "step", (share + self.masters if self.narrow else share) if self.stage < 3 else self.masters

    def _export(self, state: Items) -> Iterator[tuple[str, float]]:
        """On rank 0: the weights as they are written."""
        yield from state.items()
        yield "export", FP32 * self.exported + EXPORTING

    def on_cuda(self, items: Items) -> Items:
        """With what a GPU holds beside tensors."""
        allocated = sum(items.values())
        spare = RESERVED * (1 if self.plan.allocator == "tight" else 3)
        return items | {"allocator": spare * allocated, "context": float(CUDA_CONTEXT)}

    def host_steady(self) -> Iterator[tuple[str, float]]:
        if self.plan.device == "cpu":
            kind = "zero" if self.stage else self.plan.engine
            code = self.footprint.code_bytes or IMPORTED_CODE
            yield "process", (self.footprint.runtime_bytes or IMPORTED) - code
            yield "code", code + SETTLED_CODE
            yield "settled", SETTLED[kind]
            return
        yield "process", CUDA_PROCESS
        if self.offloads:
            yield "optimizer", self.optimizer
            yield "offload", self.offload_buffers
            if self.plan.offload == "all":
                on_disk = DISK_PARAMETER_BUFFERS * DISK_PARAMETER_ELEMENTS
                elements = on_disk if self.plan.offload_path else self.footprint.parameters / self.plan.world_size
                yield "weights", self.width * elements

    def host_load(self) -> Items:
        """The weights are read into host memory; ZeRO-3 shards them as they come, a file at a time."""
        shares = self.plan.world_size if self.stage == 3 else 1
        return {"process": float(CUDA_PROCESS), "weights": FP32 * self.footprint.parameters / shares}
