"""Dropout whose random numbers are cheap on a CPU.

torch draws a mask one Bernoulli number at a time: at the sizes that are fine-tuned on a CPU, a seventh of a step. Here
each element takes 16 bits of a fast stream. The stream's seed is drawn from torch's generator, so all that is seeded,
saved, restored and replayed (recomputed activations) by that generator holds for the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LEVELS = 1 << 16
VECTOR = 16
"""Numbers in fp32 that a processor (AVX-512) takes at once; of bf16 twice as many."""
UNUSUAL = ("position_bias", "cache", "softcap")
"""What transformers may hand to an attention, and only its own function takes."""


def drop_cheaply(model: nn.Module) -> None:
    """Have every dropout layer of `model`, and its attention by `sdpa`, draw as this module does."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


class Dropout(nn.Dropout):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropped(input, self.p) if self.training else input


def dropped(values: torch.Tensor, probability: float) -> torch.Tensor:
    """`values` with each element zero with `probability`, in steps of 1 / LEVELS, and the others scaled up in turn."""
    threshold = round(probability * LEVELS)
    if threshold == 0 or values.device.type != "cpu":
        return nn.functional.dropout(values, probability)
    if threshold == LEVELS:
        return values * 0.0
    apply: Callable[..., torch.Tensor] = _Dropped.apply  # untyped
    return apply(values, mask_of(values.shape, threshold), LEVELS / (LEVELS - threshold))


def mask_of(shape: torch.Size, threshold: int) -> torch.Tensor:
    """Booleans, false for `threshold` of LEVELS elements on average."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4))
    return torch.from_numpy(words.view(np.uint16)[: shape.numel()] >= threshold).view(shape)


class _Dropped(torch.autograd.Function):
    """Keeps a byte an element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return values.mul(kept.view(torch.uint8)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return gradient.mul(kept.view(torch.uint8)).mul_(ctx.scale), None, None


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention by `sdpa`. With dropout on a CPU, torch has no kernel for that and takes this very way.

    query (rows, heads, length, width), key and value with as many heads or a divisor of them; returns (rows, length,
    heads, width).
    """
    if dropout == 0.0 or query.device.type != "cpu" or any(others.get(name) is not None for name in UNUSUAL):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **others)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(2, 3))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(attention_mask.logical_not(), torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = dropped(softmax(scores).to(value.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension. Of less than a vector torch's kernel takes one number at a time: many times as long for
    rows of 15 numbers as for rows of 16. So short rows are taken in fp32, filled up to a vector of it; what comes is
    fp32 then."""
    length = scores.shape[-1]
    if length >= (VECTOR if scores.dtype == torch.float32 else 2 * VECTOR):
        return scores.softmax(dim=-1)
    if length >= VECTOR:
        return scores.float().softmax(dim=-1)
    return nn.functional.pad(scores.float(), (0, VECTOR - length), value=-torch.inf).softmax(dim=-1)[..., :length]
