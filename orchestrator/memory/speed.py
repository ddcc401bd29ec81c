"""How long an optimizer step takes, roughly: enough to tell plans apart, not to promise a time. Pure.

Compute by the operations of products (Kaplan et al. 2020; Korthikanti et al. 2022), communication by the volumes of
Rajbhandari et al. 2020 (ZeRO), offload by what passes between GPU and host (Ren et al. 2021, ZeRO-Offload). Rates are
the vendors'; what share of them is reached is a constant here, named and the same for every plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.config import TrainSpec
from launch.contract import ExecutionPlan
from launch.footprint_record import Count, Finite, Footprint
from launch.shape import ModelShape
from orchestrator.cluster.spec import NodeKind

REACHED = 0.45
"""Share of the peak rate that large products reach; PaLM (Chowdhery et al. 2022) reports 46 % over a whole training."""
LINK_REACHED = 0.7
"""Share of a link's rate that collectives reach."""
CORE_FLOPS = 2.0e10
"""A second on one core, in fp32: AVX2 at a quarter of its peak."""
CPU_LINK = 5.0e9
"""Bytes a second between processes of one machine."""
HOST_MEMORY = 1.0e11
"""Bytes a second that the host's cores together read and write in an optimizer step."""
ADAM_BYTES = 28
"""Read and written for a weight in AdamW's step: gradient, moments, weight, and what of these is written."""
LAYER_SECONDS = {"cuda": 2.0e-4, "cpu": 5.0e-4}
"""Of a layer, forward and backward, however few rows there are: kernels that have to be started."""


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    communication: float
    offload: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.offload + self.optimizer


@dataclass(frozen=True)
class Work:
    """What a model has to do for one token, and how much there is to send; operations and elements."""

    forward: Finite
    backward: Finite
    parameters: Count
    trainable: Count
    layers: Count


def work_of(shape: ModelShape | None, spec: TrainSpec, footprint: Footprint) -> Work:
    """2 operations a weight of a product forward, as many for the gradient of its input, and for its own gradient where
    it is trained; 4 a pair of tokens and width of attention, half of which a causal mask leaves out."""
    if shape is None:  # traced, and not known otherwise: as if all weights were products
        forward, share = 2.0 * footprint.parameters, footprint.trainable / max(1, footprint.parameters)
        return Work(forward, forward * (1 + share), footprint.parameters, footprint.trainable, 0)
    of = shape.traits
    products = shape.of_kind("linear") + (of.vocabulary * of.hidden if shape.task == "causal-lm" and of.tied else 0)
    pairs = 4 * footprint.length * of.heads * of.head_dim * of.layers * (0.5 if of.causal else 1.0)
    forward = 2 * products + pairs
    own = 2 * products * min(1.0, footprint.trainable / max(1, footprint.parameters))
    below = 0.0 if spec.train.freeze and footprint.trainable < 0.01 * footprint.parameters else forward + pairs
    return Work(forward, below + own, footprint.parameters, footprint.trainable, of.layers)


def step_time(work: Work, spec: TrainSpec, footprint: Footprint, plan: ExecutionPlan, kind: NodeKind) -> StepTime:
    """Of one optimizer step of `plan` on nodes of `kind`, all rows as long as they may be."""
    gpu, local = kind.gpu, kind.local(plan.world_size)
    rows = -(-spec.train.global_batch_size // plan.world_size)
    steps = plan.gradient_accumulation_steps
    passes = work.forward * (2 if plan.activation_checkpointing else 1) + work.backward
    width = 2 if plan.half else 4
    if gpu is None:
        rate = CORE_FLOPS * kind.cores / local
        started, memory = LAYER_SECONDS["cpu"], HOST_MEMORY / local
    else:
        rate = (gpu.tflops if plan.half else gpu.tflops_fp32) * 1e12 * REACHED
        started, memory = LAYER_SECONDS["cuda"], gpu.memory_gb_s * 1e9
    # A pass reads every weight at least once, however few tokens there are.
    reading = steps * 3 * width * work.parameters / memory
    compute = max(rows * footprint.length * passes / rate, reading) + steps * work.layers * started
    shard = work.trainable / (plan.world_size if plan.zero_stage else 1)
    offload, optimizer = 0.0, shard * ADAM_BYTES / memory
    if gpu is not None and plan.offload != "none":
        optimizer = shard * ADAM_BYTES / (HOST_MEMORY / local)
        offload = shard * 2 * width / kind.host_link_bytes_s
        if plan.offload == "all":
            offload += 2 * steps * width * work.parameters / plan.world_size / kind.host_link_bytes_s
    sent = traffic(work, plan)
    return StepTime(compute, sent / link(kind, plan.world_size), offload, optimizer)


def traffic(work: Work, plan: ExecutionPlan) -> float:
    """Bytes that a rank sends in a step. An all-reduce is a reduce-scatter and an all-gather, each the size of what is
    reduced or gathered, less the rank's own share."""
    others = (plan.world_size - 1) / plan.world_size
    native = 2 if plan.half else 4
    if plan.zero_stage == 0:
        return 2 * 4 * work.trainable * others  # fp32 gradients, once a step
    gradients, weights = native * work.trainable, native * work.trainable
    if plan.zero_stage == 1:
        return (gradients + weights) * others
    steps = plan.gradient_accumulation_steps  # stages 2 and 3 keep no whole gradients from one micro-batch to the next
    if plan.zero_stage == 2:
        return (steps * gradients + weights) * others
    return steps * (gradients + 2 * native * work.parameters) * others


def link(kind: NodeKind, world_size: int) -> float:
    """Bytes a second of a ring through all ranks: its slowest edge."""
    inside = CPU_LINK if kind.gpu is None else kind.gpu_link_bytes_s * LINK_REACHED
    return inside if world_size <= kind.slots else min(inside, kind.network_bytes_s * LINK_REACHED)
