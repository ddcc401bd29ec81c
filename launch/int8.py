"""Products of linear layers in bytes: what a CPU with VNNI and without bf16 multiplies fastest, four times fp32's rate.

`train.precision: int8`. The three products of a layer (forward, the gradient of its input, and of its weight) take
numbers of 8 bits, a scale for each row or column that is summed over, and exact sums of 32 bits (as torchao's int8
mixed-precision training; Wortsman et al. 2023 keep the weight's gradient in 16 bits, which a CPU gains nothing by).
Weights, their gradients and the optimizer's state, norms, attention, the head and the loss are fp32, and so is
evaluation: what is measured is what is exported. For the backward pass a byte an element is kept of what went in.

Scales are of one forward pass: other micro-batches, or more ranks, round otherwise, within the same error.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from launch.config import Precision
from launch.errors import SpecError
from launch.layers import stacks_of
from launch.native import library

NARROWEST = 128
"""Layers with fewer numbers in or out stay fp32: halves of adapters, which have little to multiply."""
FEWEST = 32
"""So do products of fewer rows: making bytes of the weight would take longer than they save."""
MOST = (2**31 - 1) // 127**2
"""Products of bytes that a sum of 32 bits holds."""


def multiply_in_int8(model: PreTrainedModel) -> None:
    """Have the linear layers within the layers of `model` multiply so while they train.

    Raises:
        SpecError: it has none.
    """
    found = 0
    for _, stack in stacks_of(model):
        for module in stack.modules():
            if type(module) is nn.Linear and min(_sizes(module)) >= NARROWEST and max(_sizes(module)) <= MOST:
                module.__class__ = Int8Linear
                found += 1
    if not found:
        raise SpecError(
            f"{type(model).__name__} has no linear layers that int8 is for",
            code="precision-not-available",
            field="train.precision",
            hint="take fp32, bf16 or auto",
        )


def precision_of(model: nn.Module) -> Precision:
    """int8 or fp32: of a model whose weights are fp32, and which no autocast is around."""
    return "int8" if any(isinstance(module, Int8Linear) for module in model.modules()) else "fp32"


def _sizes(layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features, layer.out_features


class Int8Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and FEWEST <= input.numel() // self.in_features <= MOST:
            apply: Callable[..., torch.Tensor] = _Product.apply  # untyped
            return apply(input, self.weight, self.bias)
        return super().forward(input)


class Quantised(NamedTuple):
    """A matrix: bytes times scales."""

    bytes: torch.Tensor
    """int8, (rows, columns)."""
    scales: torch.Tensor
    """fp32, one of each row, or one of each column."""


def by_rows(values: torch.Tensor) -> Quantised:
    """fp32 (rows, columns) with the largest magnitude of each row as 127; not a number where one of a row is not."""
    return _quantised("quantise_rows", values.contiguous(), 0)


def by_columns(values: torch.Tensor) -> Quantised:
    return _quantised("quantise_columns", values.contiguous(), 1)


def _quantised(kernel: str, values: torch.Tensor, scaled: int) -> Quantised:
    assert values.dtype == torch.float32, values.dtype
    rows, columns = values.shape
    found = Quantised(
        torch.empty(values.shape, dtype=torch.int8), torch.empty(values.shape[scaled], dtype=torch.float32)
    )
    if not isinstance(values, FakeTensor):
        getattr(_kernels(), kernel)(values.data_ptr(), found.bytes.data_ptr(), found.scales.data_ptr(), rows, columns)
    return found


def multiplied(left: Quantised, right: Quantised, bias: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 (m, n): `left`, (m, k) by rows, times `right`, (k, n) by columns, and `bias` (n) in each row. Not for
    matrices of one row or column, which torch (2.13) takes for others when they are transposed."""
    sums = torch._int_mm(left.bytes, right.bytes)
    if not isinstance(sums, FakeTensor):
        added = None if bias is None else bias.data_ptr()
        scales = left.scales.data_ptr(), right.scales.data_ptr()
        _kernels().scale_sums(sums.data_ptr(), *scales, added, *sums.shape)
    return sums.view(torch.float32)


def transposed(matrix: Quantised) -> Quantised:
    return Quantised(matrix.bytes.t(), matrix.scales)


class _Input:
    """What goes into a product, in bytes."""

    def __init__(self, input: torch.Tensor) -> None:
        self._of, self._version = weakref.ref(input, self._forget), input._version
        self._matrix = input.detach().reshape(-1, input.shape[-1])
        self.rows = by_rows(self._matrix)

    @functools.cached_property
    def columns(self) -> Quantised:
        return by_columns(self._matrix)

    def is_of(self, input: torch.Tensor) -> bool:
        return self._of() is input and self._version == input._version

    def _forget(self, _: weakref.ref[torch.Tensor]) -> None:
        if _inputs == [self]:
            _inputs.clear()


_inputs: list[_Input] = []
"""The last one, while it lives: queries, keys and values are made of one tensor."""


def _taken(input: torch.Tensor) -> _Input:
    if not (_inputs and _inputs[0].is_of(input)):
        _inputs[:] = [_Input(input)]
    return _inputs[0]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        taken = _taken(input)
        ctx.save_for_backward(weight, *(taken.columns if weight.requires_grad else ()))
        found = multiplied(taken.rows, transposed(by_rows(weight.detach())), bias)
        return found.view(*input.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *columns = ctx.saved_tensors
        matrix = gradient.reshape(-1, gradient.shape[-1])
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = multiplied(by_rows(matrix), by_columns(weight.detach()))
            of_input = of_input.view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            of_weight = multiplied(transposed(by_columns(matrix)), Quantised(*columns))
        if ctx.needs_input_grad[2]:
            of_bias = matrix.sum(0)
        return of_input, of_weight, of_bias


@functools.cache
def _kernels() -> Any:
    kernels = library()
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for quantise in (kernels.quantise_rows, kernels.quantise_columns):
        quantise.argtypes, quantise.restype = (pointer, pointer, pointer, size, size), None
    kernels.scale_sums.argtypes, kernels.scale_sums.restype = (pointer, pointer, pointer, pointer, size, size), None
    return kernels
