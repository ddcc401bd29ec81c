"""Two engines with one interface: plain PyTorch (one process, or DDP) and DeepSpeed ZeRO.

Both are handed each micro-batch's share of the step's loss, already divided by the whole global batch, and undo
whatever averaging they do themselves. So the gradient is the same for any world size, micro-batch and stage.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs, LoggerType
from torch import nn
from transformers import PreTrainedModel

from launch.checkpoint.state import TrainingState, state_of
from launch.config import Offload, OptimSpec
from launch.contract import ExecutionPlan
from launch.engine_config import deepspeed_config
from launch.errors import ContractError, SpecError
from launch.host import resident_bytes
from launch.int8 import multiply_in_int8, precision_of
from launch.layers import RATE_FACTOR, by_layer
from launch.model import weight_decay_groups
from launch.nearby import average_nearby
from launch.optimisation import WHOLE_WEIGHTS
from launch.optimizers import make_optimizer, state_bytes
from launch.precision import check_precision
from launch.swap import take_folder


class Engine(Protocol):
    """What the loop needs of an engine."""

    accelerator: Accelerator
    module: PreTrainedModel
    """The model itself, without the engine's wrapping."""

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """The model's output; all ranks call it the same number of times."""

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of one micro-batch; gradients are exchanged in the `last`."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, a part of the global batch's loss: the ranks' parts add up, not average."""

    def step(self, learning_rate: float) -> None:
        """Clip, update the weights and forget the gradients."""

    def skip(self) -> None:
        """Forget gradients that are not finite, as if there had been no micro-step; in place of `step`."""

    def fragments(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of this rank's part of the trained weights, by parameter name."""

    def restore(self, fragments: dict[str, torch.Tensor]) -> None:
        """Put back what `fragments` copied: to evaluate and export, since the optimizer does not learn of it."""

    def state(self) -> TrainingState:
        """What a checkpoint holds of it, as views of the live memory."""

    def describe(self) -> ExecutionPlan:
        """What is running, as found in the live engine."""

    def moment_bytes(self) -> int:
        """What the optimizer remembers of the weights on this rank."""

    def master_bytes(self) -> int:
        """fp32 copies of weights that this rank holds beside the weights."""


def make_accelerator(plan: ExecutionPlan, optim: OptimSpec, trackers: tuple[str, ...], tracker_dir: str) -> Accelerator:
    """Join the process group and configure Accelerate for `plan`. Before the model is built: ZeRO-3 shards it as it
    loads, and learns here that it should.

    Raises:
        SpecError: a precision that the device does not have, or a disk for offloading that the node does not have.
        ContractError: the launcher's environment would turn the plan into something else.
    """
    check_precision(plan)
    absent = [tracker for tracker in trackers if not _installed(tracker)]
    if absent:
        raise SpecError(
            f"the tracker {absent[0]} is not installed here",
            code="tracker-not-installed",
            field="trackers",
            hint=f"pip install {absent[0]}, or leave it out",
        )
    common: dict[str, Any] = {"log_with": list(trackers) or None, "project_dir": tracker_dir}
    if plan.zero_stage == 0:
        return Accelerator(
            cpu=plan.device == "cpu",
            mixed_precision=plan.half or "no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
            **common,
        )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise ContractError(
            f"ACCELERATE_USE_CPU=true would turn {plan.engine} into plain DDP",
            field="plan.engine",
            hint="on a CPU, start DeepSpeed with DS_ACCELERATOR=cpu and ACCELERATE_USE_CPU=false",
        )
    os.environ.setdefault("LOCAL_RANK", "0")  # one process started without torchelastic: still a group of one
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # the launcher's DeepSpeed keys; the plan says it all
    backend = "gloo" if plan.device == "cpu" else "nccl"
    folder = take_folder(plan.offload_path) if plan.offload_path else None
    return Accelerator(
        # Precision is DeepSpeed's configuration's to say; an autocast around its engine would be a second opinion.
        mixed_precision="no",
        deepspeed_plugin=DeepSpeedPlugin(
            hf_ds_config=deepspeed_config(optim, plan, folder), zero3_init_flag=plan.zero_stage == 3
        ),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        **common,
    )


def _installed(tracker: str) -> bool:
    """Accelerate leaves out a tracker that it does not find, without a word."""
    return any(tracker == str(LoggerType(found)) for found in get_available_trackers())


def build_engine(accelerator: Accelerator, model: PreTrainedModel, plan: ExecutionPlan, optim: OptimSpec) -> Engine:
    """Wrap `model` and its optimizer as `plan` says, and check that this is what came of it.

    Raises:
        ContractError: the live engine differs from the plan, with every difference, or cannot run what it says.
        SpecError: the job's optimisation, or its precision, does not fit the model.
    """
    if plan.precision == "int8":
        multiply_in_int8(model)
    if plan.zero_stage > 0 and optim.optimizer in WHOLE_WEIGHTS:
        raise ContractError(
            f"{optim.optimizer} needs whole weights, which {plan.engine} does not give it",
            field="plan.engine",
            hint="plan it as single or ddp",
        )
    groups = by_layer(weight_decay_groups(model, optim.weight_decay), model, optim.layer_decay)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    optimizer = make_optimizer(groups, optim, embeddings)
    engine: Engine
    if plan.zero_stage == 0:
        engine = PlainEngine(accelerator, model, optimizer, plan, optim.max_grad_norm)
    else:
        engine = DeepSpeedEngine(accelerator, model, optimizer, plan)
    verify(engine.describe(), plan)
    return engine


def verify(found: ExecutionPlan, plan: ExecutionPlan) -> None:
    """Raises ContractError naming what differs between the engine as found and the plan."""
    differences = [
        f"{name} is {getattr(found, name)}, planned {getattr(plan, name)}"
        for name in ExecutionPlan.model_fields
        if getattr(found, name) != getattr(plan, name)
    ]
    if differences:
        raise ContractError(
            "this rank runs something else than planned: " + "; ".join(differences),
            field="plan",
            hint="start it with the launcher configuration that belongs to the contract",
        )


class PlainEngine:
    """One process, or DistributedDataParallel over several."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        plan: ExecutionPlan,
        max_grad_norm: float | None,
    ) -> None:
        self.accelerator = accelerator
        self.module = model
        self._wrapped, self._optimizer = accelerator.prepare(model, optimizer)
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            average_nearby(self._wrapped, plan)
        self._plan = plan
        self._max_grad_norm = max_grad_norm

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self._wrapped(**inputs)

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self._wrapped):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss * self.accelerator.num_processes)  # DDP takes the mean over ranks

    def step(self, learning_rate: float) -> None:
        set_rates(self._optimizer.param_groups, learning_rate)
        if self._max_grad_norm is not None:
            self._clip(self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _clip(self, max_norm: float) -> None:
        """Clip as torch.nn.utils.clip_grad_norm_; a fused optimizer multiplies while it reads the gradients anyway."""
        optimizer = self._optimizer.optimizer
        if self.accelerator.scaler is not None or not optimizer.defaults.get("fused"):
            self.accelerator.clip_grad_norm_(self._wrapped.parameters(), max_norm)
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(gradients)
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # what it divides by

    def skip(self) -> None:
        self._optimizer.zero_grad()

    def fragments(self) -> dict[str, torch.Tensor]:
        return {name: part.cpu().clone() for name, part in trained_parts(self.module).items()}

    def restore(self, fragments: dict[str, torch.Tensor]) -> None:
        for name, part in trained_parts(self.module).items():
            part.copy_(fragments[name])

    def state(self) -> TrainingState:
        return state_of(self.accelerator, self._wrapped, self._optimizer)

    def describe(self) -> ExecutionPlan:
        kind = self.accelerator.distributed_type.value
        wrapped = isinstance(self._wrapped, nn.parallel.DistributedDataParallel)
        names = {("NO", False): "single", ("MULTI_CPU", True): "ddp", ("MULTI_GPU", True): "ddp"}
        precision = self.accelerator.mixed_precision
        return self._plan.model_copy(
            update={
                "engine": names.get((kind, wrapped), kind),
                "world_size": self.accelerator.num_processes,
                "device": self.accelerator.device.type,
                "precision": precision_of(self.module) if precision == "no" else precision,
                "offload": "none",
                "offload_path": None,
                "activation_checkpointing": self.module.is_activation_checkpointing,
            }
        )

    def moment_bytes(self) -> int:
        return state_bytes(self._optimizer.optimizer)

    def master_bytes(self) -> int:
        return 0  # autocast keeps the weights themselves in fp32


class DeepSpeedEngine:
    """DeepSpeed ZeRO, stage 1 to 3."""

    def __init__(
        self, accelerator: Accelerator, model: PreTrainedModel, optimizer: torch.optim.Optimizer, plan: ExecutionPlan
    ) -> None:
        self.accelerator = accelerator
        self.module = model
        self._plan = plan
        self._engine, self._optimizer = accelerator.prepare(model, optimizer)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self._engine(**inputs)

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        # The last batch of an epoch may need fewer micro-steps than the configuration says.
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        # ZeRO takes the mean over ranks; the division by accumulation steps is asked not to happen.
        self._engine.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        set_rates(self._engine.optimizer.param_groups, learning_rate)
        self._engine.step()

    def skip(self) -> None:
        # ZeRO gives up a step whose gradient norm is not finite, in any precision, and clears what it has gathered of
        # it: the one way to do so that its stages share. They agree on the norm by themselves.
        self._engine.step()
        if not self._engine.optimizer.overflow:
            raise SpecError(
                "a loss that is not finite has finite gradients, so ZeRO took the step and did not skip it",
                code="loss-not-finite",
                field="train.on_nonfinite",
                hint="lower the learning rate, or add warmup_steps",
            )

    def fragments(self) -> dict[str, torch.Tensor]:
        return {name: part.cpu().clone() for name, part in trained_parts(self.module).items()}

    def restore(self, fragments: dict[str, torch.Tensor]) -> None:
        self._engine.empty_partition_cache()  # ZeRO-3 keeps small parameters whole beside its part of them
        for name, part in trained_parts(self.module).items():
            part.copy_(fragments[name])

    def state(self) -> TrainingState:
        return state_of(self.accelerator, self._engine, self._optimizer)

    def describe(self) -> ExecutionPlan:
        live = self._engine
        assert self.accelerator.distributed_type.value == "DEEPSPEED", self.accelerator.distributed_type
        stage = live.zero_optimization_stage()
        assert _partitions(live.optimizer) == stage, f"stage {stage} is configured, {type(live.optimizer)} is running"
        offload, path = _offloaded(live.optimizer)
        return self._plan.model_copy(
            update={
                "engine": f"zero{int(stage)}",
                "world_size": live.dp_world_size,
                "device": self.accelerator.device.type,
                "micro_batch_size": live.train_micro_batch_size_per_gpu(),
                "gradient_accumulation_steps": live.gradient_accumulation_steps(),
                "precision": (
                    "bf16" if live.bfloat16_enabled() else "fp16" if live.fp16_enabled() else precision_of(self.module)
                ),
                "offload": offload,
                "offload_path": path,
                "activation_checkpointing": self.module.is_activation_checkpointing,
            }
        )

    def moment_bytes(self) -> int:
        return state_bytes(self._engine.optimizer.optimizer)

    def master_bytes(self) -> int:
        zero = self._engine.optimizer
        masters = zero.fp32_partitioned_groups_flat if _partitions(zero) == 3 else zero.single_partition_of_fp32_groups
        return sum(master.numel() * master.element_size() for master in masters)


def trained_parts(module: nn.Module) -> dict[str, torch.Tensor]:
    """What this rank holds of each trained weight: its part under ZeRO-3, else all of it. They are the live tensors."""
    return {
        name: getattr(parameter, "ds_tensor", parameter).detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all of `gradients` together, in fp32. On a CPU by dot products, which take a third of the time that
    torch's norms do."""
    if gradients[0].device.type != "cpu":
        return nn.utils.get_total_norm(gradients)
    flat = [gradient.reshape(-1) for gradient in gradients]
    return torch.stack([torch.dot(part, part) for part in flat]).sum().sqrt()


def set_rates(groups: list[dict[str, Any]], learning_rate: float) -> None:
    """The step's rate for every parameter group, by the group's layer."""
    for group in groups:
        group["lr"] = learning_rate * group[RATE_FACTOR]


def _partitions(optimizer: Any) -> int:
    """The ZeRO stage that the optimizer object itself is of."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return 3
    assert isinstance(optimizer, DeepSpeedZeroOptimizer), type(optimizer)
    return 2 if optimizer.partition_gradients else 1


def _offloaded(zero: Any) -> tuple[Offload, str | None]:
    """What a ZeRO optimizer keeps outside of the device, and the directory on a disk where that is, if all of it is."""
    if _partitions(zero) < 3:
        return ("optimizer" if zero.cpu_offload else "none"), None
    parts: dict[Offload, tuple[bool, bool]] = {
        "all": (zero.offload_param, zero.params_in_nvme_and_cpu),
        "optimizer": (zero.offload_optimizer, zero.swap_optimizer),
    }
    moved = [part for part, (moved, _) in parts.items() if moved]
    on_disk = moved != [] and all(parts[part][1] for part in moved)
    # <directory>/<this rank's>/zero_stage_3/optimizer/rank<number>
    path = str(Path(zero.optimizer_swapper.swap_folder).parents[3]) if on_disk else None
    return (moved[0] if moved else "none"), path


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM")
