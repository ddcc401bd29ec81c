"""Hidden states of an encoder under autocast on a CPU: of autocast's type between the layers, too.

There each product casts what goes into it, and gives what a sum and a norm then take in fp32: of a small encoder's step
four casts a layer, and as many back. The layers of these encoders end in norms, whose results every reader but the next
sum would round anyway. Weights, norms' statistics and the loss stay fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launch.families import ENCODERS


def carry_narrow(model: PreTrainedModel) -> None:
    """Have the embeddings of an encoder's classifier give what autocast computes in, where it does so on a CPU; other
    models stay as they are. Not under an adapter, which would cast it back to its own type."""
    if model.config.model_type in ENCODERS and type(model).__name__.endswith("ForSequenceClassification"):
        base: Any = model.base_model
        base.embeddings.register_forward_hook(_narrowed)


def _narrowed(_module: nn.Module, _inputs: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return hidden_states.to(torch.get_autocast_dtype("cpu"))
    return hidden_states
