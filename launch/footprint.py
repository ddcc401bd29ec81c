"""`python -m launch.footprint --config job.yaml`: traces what training would hold, without weights, data or a GPU.

The model that train.py would build is built of tensors that have shapes and no memory (torch's FakeTensorMode), and a
forward and a backward pass run through the training's own loss, while a ledger counts what would be alive. A few
micro-batches make a curve over the rows. A configuration of 70 billion parameters is traced on a laptop.

The last line of stdout is a Footprint as JSON. Ends with ExitCode.USER_ERROR where the job file is at fault.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from launch import dropout
from launch.attempt import ExitCode
from launch.config import LossMode, Precision, TrainSpec, half_of, load_train_spec
from launch.contract import Device
from launch.data import Batch
from launch.document import read_document
from launch.dropout import drop_cheaply
from launch.engine import Engine
from launch.engine_config import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from launch.errors import SpecError
from launch.footprint_record import Curve, Footprint, Passes
from launch.head import CHUNK_BYTES
from launch.host import resident_bytes
from launch.int8 import multiply_in_int8
from launch.layers import by_layer
from launch.ledger import Ledger
from launch.model import build_model, weight_decay_groups
from launch.objective import objective_of
from launch.optimizers import make_optimizer, state_bytes

DEEP = 12
"""More layers than these are not all traced."""
LAYERS = (4, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}


class Mode(NamedTuple):
    """What is traced apart."""

    precision: Precision
    native: bool
    checkpointing: bool
    loss: LossMode


class Traced(NamedTuple):
    """Bytes at one micro-batch."""

    beside: int
    most: int
    reducing: int
    halving: int
    at_loss: int
    loss: LossMode


class NoMemory(FakeTensorMode):
    """Tensors that are made inside have shapes and no memory."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, _memo: dict[int, Any]) -> NoMemory:
        """Itself: a tensor is copied with what it refers to (torch 2.13), and a copy of this, with weak references to
        storages that are then given back twice, breaks the process's memory. peft copies a head."""
        return self


def footprint(spec: TrainSpec, device: Device = "cpu") -> Footprint:
    """Trace `spec`'s model on `device`: at the longest rows that may come, in every way that a plan may choose.

    Raises:
        SpecError: the model cannot be built, or cannot be traced.
    """
    import launch.train  # noqa: F401  # all that a rank imports

    runtime, code = (resident_bytes(), resident_bytes("RssFile")) if device == "cpu" else (None, 0)
    with NoMemory():
        model = traced_model(spec, checkpointing=False, device=device)
        length = longest(spec, model)
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        moments, step_bytes = optimizer_bytes(spec, model)
        known = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trainable": sum(parameter.numel() for parameter in trainable),
            "buffers_bytes": sum(buffer.untyped_storage().nbytes() for buffer in model.buffers()),
            "small": sum(p.numel() for p in model.parameters() if p.numel() <= PERSISTENT_ELEMENTS),
            "largest": max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        }
        depth = depth_of(model)
        del model, trainable
        rows = rows_to_trace(spec, length, vocabulary)
        passes = [passes_of(spec, mode, rows, length, device, depth) for mode in modes(spec)]
    return Footprint(
        source="traced",
        length=length,
        moments_bytes=moments,
        step_bytes=step_bytes,
        vocabulary=vocabulary,
        runtime_bytes=runtime,
        code_bytes=code,
        passes=tuple(passes),
        **known,
    )


def modes(spec: TrainSpec) -> Iterator[Mode]:
    """What the planner may choose, where the job file does not say it."""
    causal, wish = spec.model.task == "causal-lm", spec.train
    losses: Iterable[LossMode] = (
        ("whole",) if not causal else (wish.loss_mode,) if wish.loss_mode else ("chunked", "whole")
    )
    # Under autocast too, for ZeRO: where nothing is cast the two are the same.
    natives = {"single": (False,), "ddp": (False,), "auto": (False, True)}.get(spec.strategy, (True,))
    recompute = (False, True) if wish.activation_checkpointing is None else (wish.activation_checkpointing,)
    for precision in wish.precisions:
        for native in natives if half_of(precision) else (False,):
            for checkpointing in recompute:
                for loss in losses:
                    yield Mode(precision, native, checkpointing, loss)


def rows_to_trace(spec: TrainSpec, length: int, vocabulary: int) -> tuple[int, ...]:
    """Few rows; where chunks of logits are full; and what the job file asks for."""
    rows = {1, 8}
    if spec.model.task == "causal-lm":
        full = -(-CHUNK_BYTES // (4 * vocabulary * length)) + 1
        rows = {1, full, 2 * full}
    return tuple(sorted(rows | ({spec.train.micro_batch_size} if spec.train.micro_batch_size else set())))


def longest(spec: TrainSpec, model: PreTrainedModel) -> int:
    """Tokens of the longest row that may come."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(spec.data.max_length, places or spec.data.max_length)


def traced_model(spec: TrainSpec, *, checkpointing: bool, device: Device, layers: int | None = None) -> PreTrainedModel:
    labels = ("0", "1") if spec.model.task == "sequence-classification" else ()
    with torch.device(device), mock.patch.object(nn.Module, "to", _to):
        model = build_model(spec, labels, 0, checkpointing=checkpointing, traced=True, layers=layers)
    if device == "cpu":
        drop_cheaply(model)
    return model


def _to(module: nn.Module, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> nn.Module:
    """In place of `Module.to`, which tensors without memory refuse; all of them are on one device as it is."""
    if dtype is not None:
        convert(module, dtype)
    return module


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every weight of `model` this type; a weight in two places stays one."""
    changed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                new = nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)
                module._parameters[name] = changed.setdefault(id(weight), new)


def depth_of(model: PreTrainedModel) -> int:
    """Layers, if they are all alike; else 0."""
    config = model.config.get_text_config()
    alike = len(set(getattr(config, "layer_types", None) or ["one"])) == 1
    return int(getattr(config, "num_hidden_layers", 0)) if alike else 0


def passes_of(spec: TrainSpec, mode: Mode, rows: tuple[int, ...], length: int, device: Device, depth: int) -> Passes:
    """Traced at all layers; of a deep model at fewer, of which two numbers make a line."""
    if depth <= DEEP:
        traced = traces(spec, mode, rows, length, device, None)
    else:
        few, more = (traces(spec, mode, rows, length, device, layers) for layers in LAYERS)
        traced = [deeper(*pair, depth) for pair in zip(few, more, strict=True)]
    curves = [Curve(rows=rows, bytes=tuple(float(one[i]) for one in traced)) for i in range(5)]
    return Passes(
        precision=mode.precision,
        native=mode.native,
        activation_checkpointing=mode.checkpointing,
        loss=traced[0].loss,
        beside_gradients=curves[0],
        with_gradients=curves[1],
        while_reducing=curves[2],
        while_halving=curves[3],
        at_loss=curves[4],
    )


def deeper(few: Traced, more: Traced, depth: int) -> Traced:
    """What `depth` layers take, from what LAYERS took. What is alive when the backward pass begins grows evenly; what
    comes on top of it then does not grow."""
    layer = (more.at_loss - few.at_loss) / (LAYERS[1] - LAYERS[0])
    grown = round(layer * (depth - LAYERS[1]))
    gradients = round((more.most - few.most) / (LAYERS[1] - LAYERS[0]) * (depth - LAYERS[1]))
    most = more.most + max(grown, gradients)
    halving = more.halving + max(
        grown, round((more.halving - few.halving) / (LAYERS[1] - LAYERS[0]) * (depth - LAYERS[1]))
    )
    return Traced(more.beside + grown, most, more.reducing + grown, halving, more.at_loss + grown, more.loss)


def traces(
    spec: TrainSpec, mode: Mode, rows: tuple[int, ...], length: int, device: Device, layers: int | None
) -> list[Traced]:
    """One forward and backward pass for each of `rows`."""
    model = traced_model(spec, checkpointing=mode.checkpointing, device=device, layers=layers)
    if mode.native:
        convert(model, DTYPES[mode.precision])
    if mode.precision == "int8":
        multiply_in_int8(model)
    model.train()
    objective = objective_of(spec, model, None, mode.loss)
    engine = cast(Engine, TracedEngine(model, None if mode.native else DTYPES[mode.precision]))
    ledger = Ledger(BUCKET_ELEMENTS)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.ignore(tensor)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: ledger.note_gradient(cast(Any, weight.grad)))
    found = objective.probe(engine, torch.device(device))
    model.train()
    traced = []
    for count in rows:
        ledger.forget_peaks()
        before = ledger.live
        with numpy_free(), ledger:
            loss = objective.summed(engine, batch_of(spec, count, length, device)) / 2.0
            at_loss = ledger.live
            loss.backward()
        tops = (ledger.most_beside, ledger.most, ledger.most_reducing, ledger.most_halving, at_loss)
        beside, most, reducing, halving, at_loss = (top - before for top in tops)
        traced.append(Traced(beside, most, reducing, halving, at_loss, found))
        del loss
        model.zero_grad()
    return traced


class TracedEngine:
    """As much of an engine as a loss asks for."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None) -> None:
        self.module = model
        self._autocast = autocast if autocast != torch.float32 else None

    def __call__(self, **inputs: torch.Tensor) -> Any:
        if self._autocast is None:
            return self.module(**inputs)
        with torch.autocast(inputs["input_ids"].device.type, self._autocast):
            output = self.module(**inputs)
        return convert_outputs_to_fp32(lambda: output)()


def batch_of(spec: TrainSpec, rows: int, length: int, device: Device) -> Batch:
    """Rows that fill the length, every token of which is learned, as the loop would hand them over."""
    ids = torch.zeros((rows, length), dtype=torch.int64, device=device)
    if spec.model.task == "sequence-classification":
        return Batch(ids, torch.ones_like(ids), torch.zeros(rows, dtype=torch.int64, device=device))
    at = torch.arange(rows * (length - 1), device=device)
    if not spec.data.packing:
        return Batch(ids, torch.ones_like(ids), ids.clone(), predicting=at)
    mask = torch.ones((rows, 1, length, length), dtype=torch.bool, device=device)
    return Batch(ids, mask, ids.clone(), torch.zeros_like(ids), at)


@contextlib.contextmanager
def numpy_free() -> Iterator[None]:
    """Masks of dropout without numpy, which is not traced: the words they are drawn from, and a byte an element."""

    def mask_of(shape: torch.Size, _threshold: int) -> torch.Tensor:
        words = torch.empty(shape, dtype=torch.int16)
        return words >= 0

    with mock.patch.object(dropout, "mask_of", mask_of):
        yield


def optimizer_bytes(spec: TrainSpec, model: PreTrainedModel) -> tuple[int, int]:
    """What the optimizer keeps of all trained weights, and what its step holds beside that for a moment."""
    optim = spec.train
    optimizer = make_optimizer(
        by_layer(weight_decay_groups(model, optim.weight_decay), model, optim.layer_decay), optim
    )
    ledger = Ledger()
    for parameter in model.parameters():
        ledger.ignore(parameter)
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            ledger.ignore(parameter.grad)
    with ledger:
        optimizer.step()
    kept = state_bytes(optimizer)
    return kept, max(0, ledger.most - ledger.live)


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch.footprint", description="Trace the memory of a job's model.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="the job file")
    source.add_argument("--spec", type=Path, help="a TrainSpec as JSON, its paths absolute")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of the job file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it would train")
    parser.add_argument("-o", choices=("json",), default="json", help="the format of the last line")
    arguments = parser.parse_args()
    try:
        if arguments.spec is not None:
            spec = TrainSpec.model_validate_json(arguments.spec.read_bytes())
        else:
            spec = load_train_spec(read_document(arguments.config, arguments.set), planned=False)
        print(footprint(spec, arguments.device).model_dump_json())
    except SpecError as problem:
        print(problem, file=sys.stderr)
        sys.exit(ExitCode.USER_ERROR)


if __name__ == "__main__":
    main()
