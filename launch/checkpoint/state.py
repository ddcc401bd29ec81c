"""What training consists of, as ranges of logical tensors: the same names and ranges whatever divides them.

`weight/NAME` is a trained parameter in full precision, `exp_avg/NAME` and so on what the optimizer keeps of it,
`buffer/NAME` a persistent buffer of the model, `best/NAME` a weight of the best evaluation so far. Elements of a
flattened tensor are numbered; a rank has ranges of them, as views of the live memory, so that the same list serves to
save and to load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from launch.checkpoint import swapped
from launch.checkpoint.manifest import CheckpointError, LogicalTensor

WEIGHT = "weight"
BUFFER = "buffer"
BEST = "best"
STEPS = "optimizer_steps"
LOSS_SCALE = "loss_scale"
NOT_OF_WEIGHTS = frozenset({"step", "qmap1", "qmap2"})
"""Of an optimizer's state: the count of its steps, and the numbers that bytes of an 8-bit state stand for, always the
same."""


class Part(NamedTuple):
    """Elements [start, start + len(tensor)) of the logical tensor `name`."""

    name: str
    start: int
    tensor: torch.Tensor
    """1-D, and where it is written to, the training changes."""


class TrainingState(Protocol):
    """One engine's state. What all ranks hold alike is divided among them, so that each saves and reads its share."""

    def tensors(self) -> dict[str, LogicalTensor]:
        """Every logical tensor; the same on every rank."""

    def parts(self) -> list[Part]:
        """This rank's; those of all ranks together cover every tensor once."""

    def loaded(self) -> None:
        """Bring everything in line with `parts`, which were written to. All ranks call it."""

    def before_step(self, hook: Callable[[], None]) -> None:
        """Have `hook` called before every step of the optimizer: the one thing that changes weights and moments."""

    def scalars(self) -> dict[str, float]: ...

    def set_scalars(self, scalars: Mapping[str, float]) -> None: ...

    def divide(self, prefix: str, weights: Mapping[str, torch.Tensor]) -> list[Part]:
        """This rank's parts of `weights`, which are divided as the trained parameters are (Engine.fragments)."""

    def share(self, weights: Mapping[str, torch.Tensor]) -> None:
        """After the parts of `weights` were written to: bring the rest of them in line. All ranks call it."""

    def among(self, rank: int, world_size: int, /) -> TrainingState:
        """The same, where what all ranks hold alike is divided among so many, of which this is the `rank`-th. What is
        sharded stays as it is. To be copied, not loaded."""


def logical(tensor: torch.Tensor) -> LogicalTensor:
    return LogicalTensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PlainState:
    """One process, or DistributedDataParallel: every rank has everything."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        rank: int,
        world_size: int,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._module, self._optimizer, self._scaler = module, optimizer, scaler
        self._rank, self._world_size = rank, world_size

    def _live(self) -> dict[str, torch.Tensor]:
        materialise(self._optimizer)
        live: dict[str, torch.Tensor] = {}
        for name, parameter in trained(self._module):
            live[f"{WEIGHT}/{name}"] = parameter.detach()
            for key, value in self._optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and key not in NOT_OF_WEIGHTS:
                    live[f"{key}/{name}"] = value
        return live | buffers(self._module)

    def tensors(self) -> dict[str, LogicalTensor]:
        return {name: logical(tensor) for name, tensor in self._live().items()}

    def parts(self) -> list[Part]:
        return share_of(self._live(), self._rank, self._world_size)

    def loaded(self) -> None:
        exchange(self._live(), self._world_size)

    def before_step(self, hook: Callable[[], None]) -> None:
        self._optimizer.register_step_pre_hook(lambda *_: hook())

    def scalars(self) -> dict[str, float]:
        found = {STEPS: steps_taken(self._optimizer)}
        if self._scaler is not None and self._scaler.is_enabled():
            found[LOSS_SCALE] = float(self._scaler.get_scale())
        return found

    def set_scalars(self, scalars: Mapping[str, float]) -> None:
        set_steps(self._optimizer, scalars[STEPS])
        if self._scaler is not None and self._scaler.is_enabled() and LOSS_SCALE in scalars:
            self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": scalars[LOSS_SCALE]})

    def divide(self, prefix: str, weights: Mapping[str, torch.Tensor]) -> list[Part]:
        return share_of(_prefixed(prefix, weights), self._rank, self._world_size)

    def share(self, weights: Mapping[str, torch.Tensor]) -> None:
        exchange(weights, self._world_size)

    def among(self, rank: int, world_size: int, /) -> TrainingState:
        return PlainState(self._module, self._optimizer, rank, world_size, self._scaler)


class ZeroState:
    """DeepSpeed ZeRO. Stages 1 and 2 cut the flat concatenation of a parameter group, stage 3 each parameter.

    The full-precision weights are the optimizer's own; the model's are made from them when they were loaded.
    """

    def __init__(self, module: nn.Module, engine: Any) -> None:
        self._module, self._zero = module, engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._rank, self._world_size = int(engine.global_rank), int(engine.dp_world_size)
        self._names = {id(parameter): name for name, parameter in trained(module)}

    def tensors(self) -> dict[str, LogicalTensor]:
        found: dict[str, LogicalTensor] = {}
        keys = self._keys()
        for name, parameter in trained(self._module):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            for key in (WEIGHT, *keys):
                found[f"{key}/{name}"] = LogicalTensor(dtype="float32", shape=shape)
        return found | {name: logical(tensor) for name, tensor in buffers(self._module).items()}

    def parts(self) -> list[Part]:
        self._materialise()
        parts: list[Part] = []
        files = swapped.views(self._zero) if self._stage == 3 else {}
        for name, start, flat, offset, length in self._addresses():
            for key, value in {WEIGHT: flat, **self._held(flat)}.items():
                live = files.get(id(value), value)
                parts.append(Part(f"{key}/{name}", start, live.detach().narrow(0, offset, length)))
        return parts + share_of(buffers(self._module), self._rank, self._world_size)

    def loaded(self) -> None:
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
        else:
            for index in range(len(zero.fp16_groups)):
                with swapped.in_memory(zero, index):
                    zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                # Small parameters are kept whole beside this rank's part; whole they are still the old ones.
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        exchange(buffers(self._module), self._world_size)

    def before_step(self, hook: Callable[[], None]) -> None:
        self._zero.optimizer.register_step_pre_hook(lambda *_: hook())

    def scalars(self) -> dict[str, float]:
        found = {STEPS: steps_taken(self._zero.optimizer)}
        if self._zero.dynamic_loss_scale:
            found[LOSS_SCALE] = float(self._zero.loss_scaler.cur_scale)
        return found

    def set_scalars(self, scalars: Mapping[str, float]) -> None:
        set_steps(self._zero.optimizer, scalars[STEPS])
        if self._zero.dynamic_loss_scale and LOSS_SCALE in scalars:
            self._zero.loss_scaler.cur_scale = scalars[LOSS_SCALE]

    def divide(self, prefix: str, weights: Mapping[str, torch.Tensor]) -> list[Part]:
        if self._stage < 3:
            return share_of(_prefixed(prefix, weights), self._rank, self._world_size)
        parts = []
        for name, parameter in trained(self._module):
            start, length = self._own_range(parameter)
            if length > 0:
                parts.append(Part(f"{prefix}/{name}", start, weights[name].view(-1).narrow(0, 0, length)))
        return parts

    def share(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self._stage < 3:
            exchange(weights, self._world_size)

    def among(self, _rank: int, _world_size: int, /) -> TrainingState:
        return self

    def _flats(self) -> list[torch.Tensor]:
        zero = self._zero
        flats: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flats

    def _materialise(self) -> None:
        zero = self._zero
        if self._stage < 3:
            materialise(zero.optimizer)
            return
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if not zero.optimizer.state[flat]:
                groups: list[list[torch.Tensor]] = [[] for _ in zero.optimizer.param_groups]
                groups[zero.sub_group_to_group_id[index]].append(flat)
                with swapped.in_memory(zero, index, write=True):
                    materialise(zero.optimizer, groups)

    def _keys(self) -> list[str]:
        self._materialise()
        return sorted({key for flat in self._flats() for key in self._held(flat)})

    def _held(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the optimizer keeps of every element of `flat`."""
        state = self._zero.optimizer.state[flat]
        held = {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0}
        assert all(value.shape == flat.shape for value in held.values()), f"{list(held)} are not by element"
        return held

    def _addresses(self) -> Iterator[tuple[str, int, torch.Tensor, int, int]]:
        """Of every parameter of which this rank has a part: its name, where in it the part begins, the flat tensor
        that holds the part, where in that it lies, and how many elements it has."""
        if self._stage == 3:
            for _, parameter in trained(self._module):
                group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start, length = self._own_range(parameter)
                if length > 0:
                    flat = self._zero.fp32_partitioned_groups_flat[group]
                    yield self._names[id(parameter)], start, flat, offset, length
            return
        for flat, group in zip(self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    inside, held = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield self._names[id(parameter)], inside.start, flat, held.start, held.numel

    def _own_range(self, parameter: Any) -> tuple[int, int]:
        """Stage 3: equal parts for all ranks, the last of them padded."""
        size = int(parameter.partition_numel())
        start = size * self._rank
        return start, min(size, int(parameter.ds_numel) - start)


def state_of(accelerator: Any, model: Any, optimizer: Any) -> TrainingState:
    """The state of what `accelerator.prepare` returned."""
    if accelerator.distributed_type.value == "DEEPSPEED":
        return ZeroState(model.module, model)
    return PlainState(
        accelerator.unwrap_model(model),
        optimizer.optimizer,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.scaler,
    )


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent buffers; others are made anew from the configuration."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return {
        f"{BUFFER}/{name}": buffer
        for name, buffer in module.named_buffers()
        if name not in transient and buffer.numel()
    }


def materialise(optimizer: torch.optim.Optimizer, groups: list[list[torch.Tensor]] | None = None) -> None:
    """Let the optimizer make the state that it makes at its first step, without a step.

    An optimizer that has taken a step has it; before, its own step is the one thing that knows what to make. With a
    zero gradient and no learning rate nothing else comes of it. `groups` are the tensors of its parameter groups, where
    they are put there for a step alone.
    """
    given = groups if groups is not None else [group["params"] for group in optimizer.param_groups]
    everything = [tensor for group in given for tensor in group if tensor.requires_grad]
    missing = {id(tensor) for tensor in everything if not optimizer.state[tensor]}
    if not missing:
        return
    gradients = [tensor.grad for tensor in everything]
    before = [(group["params"], group["lr"]) for group in optimizer.param_groups]
    for tensor in everything:
        tensor.grad = torch.zeros_like(tensor) if id(tensor) in missing else None
    for group, tensors in zip(optimizer.param_groups, given, strict=True):
        group["params"], group["lr"] = tensors, 0.0
    optimizer.step()
    for group, (tensors, rate) in zip(optimizer.param_groups, before, strict=True):
        group["params"], group["lr"] = tensors, rate
    for tensor, gradient in zip(everything, gradients, strict=True):
        tensor.grad = gradient
    for tensor in everything:
        assert optimizer.state[tensor], f"{type(optimizer).__name__} keeps nothing of a tensor it was given"
        if id(tensor) in missing and "step" in optimizer.state[tensor]:
            _set_step(optimizer.state[tensor], 0)


def steps_taken(optimizer: torch.optim.Optimizer) -> float:
    """Optimizer steps; 0 if the optimizer does not count them. A parameter that never had a gradient counts none."""
    return max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0.0)


def set_steps(optimizer: torch.optim.Optimizer, steps: float) -> None:
    for state in optimizer.state.values():
        if "step" in state:
            _set_step(state, steps)


def _set_step(state: dict[str, Any], steps: float) -> None:
    if torch.is_tensor(state["step"]):
        state["step"].fill_(steps)
    else:
        state["step"] = int(steps)


def share_of(whole: Mapping[str, torch.Tensor], rank: int, world_size: int) -> list[Part]:
    """This rank's equal share of the elements of all tensors of `whole`, one after the other."""
    parts = []
    for name, start, length in _ranges(whole, rank, world_size):
        parts.append(Part(name, start, flat(name, whole[name]).narrow(0, start, length)))
    return parts


def exchange(whole: Mapping[str, torch.Tensor], world_size: int) -> None:
    """Give every rank the shares of all others (`share_of`); collectives on the tensors' own device."""
    if world_size == 1:
        return
    waits = []
    for owner in range(world_size):
        for name, start, length in _ranges(whole, owner, world_size):
            view = flat(name, whole[name]).narrow(0, start, length)
            waits.append(torch.distributed.broadcast(view, src=owner, async_op=True))
    for wait in waits:
        assert wait is not None
        wait.wait()


def _ranges(whole: Mapping[str, torch.Tensor], rank: int, world_size: int) -> Iterator[tuple[str, int, int]]:
    total = sum(tensor.numel() for tensor in whole.values())
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    position = 0
    for name, tensor in whole.items():
        start, end = max(first - position, 0), min(last - position, tensor.numel())
        if start < end:
            yield name, start, end - start
        position += tensor.numel()


def flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as one dimension, the same memory.

    Raises:
        CheckpointError: its memory is not contiguous.
    """
    if not tensor.is_contiguous():
        raise CheckpointError(
            f"{name} is not contiguous in memory, so it has no flat ranges",
            code="not-contiguous",
            hint="make the parameter contiguous before training",
        )
    return tensor.detach().view(-1)


def _prefixed(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in weights.items()}
