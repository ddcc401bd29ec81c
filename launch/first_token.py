"""The last layer of an encoder whose head looks at the first token alone, computed for that token alone.

A classifier's head reads one hidden state of the last layer. The others go nowhere: of them that layer needs keys and
values, and neither queries, nor what is made of the attention, nor a feed-forward part. What is left out has no
gradient and changes nothing; of a model of six layers it is an eighth of the work. Weights keep their names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from launch.families import ENCODERS

KERNELS = ("sdpa", "eager")
"""Attention that takes fewer queries than keys, with a mask that has a row for each query."""


def narrow_last_layer(model: PreTrainedModel) -> None:
    """Have the last layer of `model` give the first token's hidden state, (rows, 1, hidden), where its head reads no
    other; other models stay as they are. Before an adapter or an engine wraps it."""
    config = model.config
    if (
        config.model_type not in ENCODERS
        or not type(model).__name__.endswith("ForSequenceClassification")
        or config._attn_implementation not in KERNELS
        or getattr(config, "is_decoder", False)
        or getattr(config, "chunk_size_feed_forward", 0)
    ):
        return
    base: Any = model.base_model
    stack = base.transformer if config.model_type == "distilbert" else base.encoder
    last = stack.layer[-1]
    forward = _distilbert if config.model_type == "distilbert" else _bert
    last.__class__ = _narrowed(type(last), forward)  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _narrowed(layer: type, forward: Callable[..., torch.Tensor]) -> type[nn.Module]:
    """A kind of `layer` with another forward pass; as such it can be checkpointed, and found by transformers."""
    return type(f"FirstTokenOf{layer.__name__}", (layer,), {"forward": forward})


def _bert(
    layer: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> Any:
    within = layer.attention.self
    first = hidden_states[:, :1]
    products = (within.query, within.key, within.value)
    attended = _attended(within, products, hidden_states, attention_mask)
    return layer.feed_forward_chunk(layer.attention.output(attended, first))


def _distilbert(
    layer: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> Any:
    within = layer.attention
    first = hidden_states[:, :1]
    products = (within.q_lin, within.k_lin, within.v_lin)
    attended = within.out_lin(_attended(within, products, hidden_states, attention_mask))
    attended = layer.sa_layer_norm(attended + first)
    return layer.output_layer_norm(layer.ffn(attended) + attended)


def _attended(
    within: Any,
    products: tuple[nn.Module, nn.Module, nn.Module],
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """What the first token's query finds among all tokens' keys and values, (rows, 1, hidden)."""
    rows = len(hidden_states)
    query, key, value = products
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(within.config._attn_implementation, eager_attention_forward)
    found, _ = kernel(
        within,
        *(
            product(states).view(rows, states.shape[1], -1, within.attention_head_size).transpose(1, 2)
            for product, states in ((query, hidden_states[:, :1]), (key, hidden_states), (value, hidden_states))
        ),
        mask if mask is None else mask[:, :, :1],
        dropout=within.dropout.p if within.training else 0.0,
        scaling=within.scaling,
    )
    attended: torch.Tensor = found.reshape(rows, 1, -1)
    return attended
