"""The output layer of a language model, evaluated where a token is predicted and nowhere else.

A vocabulary is large: logits of every position are a good part of a small model's work and the largest tensor of any.
Only positions with a target get them, and where the model returns its output layer's result as it is, the layer and
the loss are one function that goes through the positions in chunks, so that the whole of the logits never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

CHUNK_BYTES = 1 << 26
"""fp32 logits that exist at once."""


def token_losses(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy in fp32 of each token, shape (n,), from logits (n, vocabulary) and token ids (n,)."""
    return functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


class OutputLayer:
    """Stands before the output layer of `model` and in its place; all ranks go the same way through it.

    Between `at` and the end of the forward pass the layer sees the chosen positions alone. Otherwise, when text is
    generated for one, it is as it was.
    """

    def __init__(self, model: PreTrainedModel, smoothing: float, *, chunked: bool = True) -> None:
        layer = model.get_output_embeddings()
        self._smoothing = smoothing
        self._positions: torch.Tensor | None = None
        self._targets = torch.empty(0)
        self._returned: torch.Tensor | None = None
        self._fused: bool | None = None
        """Whether layer and loss are one; None until a forward pass has shown what the model does with logits."""
        if layer is None:
            return  # every position has its logits
        self._layer = layer
        self._plain = layer.forward
        layer.register_forward_pre_hook(self._choose, with_kwargs=True)
        if chunked and type(layer) is nn.Linear:  # an adapter's, or another that is more than a product, stays as it is
            layer.forward = self._forward  # type: ignore[assignment]
        else:
            self._fused = False

    @property
    def fused(self) -> bool:
        """Whether logits are made in chunks; known after a forward pass and `losses`."""
        return bool(self._fused)

    def at(self, positions: torch.Tensor, targets: torch.Tensor) -> None:
        """Predict `targets`, token ids (n,), at `positions`, flat indices (n,) into (rows, longest)."""
        self._positions, self._targets, self._returned = positions, targets, None

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """From what the model gave as logits, the loss of each target (n,); in training maybe their sum, (1,)."""
        positions, targets, returned = self._positions, self._targets, self._returned
        assert positions is not None
        self._positions = self._returned = None
        if self._fused:
            return logits.flatten()
        if self._fused is None and returned is not None:
            # Under ZeRO-3 a module's result comes back as another tensor on the same memory.
            same = _place(logits) == _place(returned) and logits.shape == returned.shape
            self._fused = same and logits._version == returned._version == 0
        if logits.shape[:2] != (1, len(targets)):  # the model did not call the layer on its last hidden states
            logits = logits.flatten(0, 1).index_select(0, positions)[None]
        return token_losses(logits[0], targets, self._smoothing if torch.is_grad_enabled() else 0.0)

    def _choose(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._positions is None or len(args) != 1 or args[0].dim() != 3:
            return None
        hidden: torch.Tensor = args[0]
        return (hidden.flatten(0, 1).index_select(0, self._positions)[None],), kwargs

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._positions is None:
            plain: torch.Tensor = self._plain(hidden)
            return plain
        if not self._fused:
            # fp32 at once, so that nothing between here and the loss has a reason to make another tensor of it.
            self._returned = self._plain(hidden).float()
            return self._returned
        weight, bias = self._layer.weight, self._layer.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if torch.is_grad_enabled():
                apply: Callable[..., torch.Tensor] = LinearCrossEntropy.apply  # untyped
                return apply(hidden[0], weight, bias, self._targets, self._smoothing).view(1, 1, 1)
            return linear_losses(hidden[0], weight, bias, self._targets)[None, :, None]


def _place(tensor: torch.Tensor) -> tuple[int, int | torch.SymInt]:
    """Where its memory begins; without its address, which a tensor that is only traced lacks."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def linear_losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The plain cross-entropy of each token, (n,), from hidden states (n, width); nothing is kept for gradients."""
    cuts = zip(hidden.split(rows_at_once(weight)), targets.split(rows_at_once(weight)), strict=True)
    return torch.cat([token_losses(functional.linear(part, weight, bias), wanted) for part, wanted in cuts])


def rows_at_once(weight: torch.Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * weight.shape[0]))


class LinearCrossEntropy(torch.autograd.Function):
    """The sum over tokens of cross_entropy(hidden @ weight.T + bias, targets), its gradients made on the way.

    With p = softmax(logits), V tokens in the vocabulary and smoothing e, a token y has

        loss = logsumexp(logits) - (1 - e) * logits[y] - e / V * sum(logits)
        d loss / d logits = p - (1 - e) * onehot(y) - e / V

    As the sum's gradient is one number for all tokens, these can be made before it is known. What is kept until the
    backward pass is as large as hidden states and weights, whatever the vocabulary (Hsu et al. 2024, Liger Kernel).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        of_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wants_bias and bias is not None else None
        total = hidden.new_zeros((), dtype=torch.float32)
        size = rows_at_once(weight)
        for start in range(0, len(hidden), size):
            part, wanted = hidden[start : start + size], targets[start : start + size, None]
            logits = functional.linear(part, weight, bias).float()
            total -= (1 - smoothing) * logits.gather(1, wanted).sum()
            if smoothing:
                total -= smoothing * logits.mean(dim=1).sum()
            # logsumexp and softmax by hand: in place, and with one exp for the two.
            top = logits.amax(dim=1, keepdim=True)
            gradient = logits.sub_(top).exp_()
            norm = gradient.sum(dim=1, keepdim=True)
            total += top.sum() + norm.log().sum()
            gradient.div_(norm)
            if smoothing:
                gradient -= smoothing / gradient.shape[1]
            gradient.scatter_add_(1, wanted, gradient.new_full((), smoothing - 1).expand_as(wanted))
            if of_bias is not None:
                of_bias += gradient.sum(dim=0)
            narrow = gradient.to(weight.dtype)
            if of_hidden is not None:
                torch.mm(narrow, weight, out=of_hidden[start : start + size])
            if of_weight is not None:
                if weight.dtype == torch.float32:
                    of_weight.addmm_(narrow.t(), part)
                else:
                    of_weight += narrow.t() @ part
            del logits, gradient, narrow  # before the next ones are made
        # Under ZeRO the weight's gradient has the weight's own type.
        kept = (of_hidden, of_weight, of_bias)
        ctx.save_for_backward(*(None if part is None else part.to(hidden.dtype) for part in kept))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*(None if part is None else part * gradient.to(part.dtype) for part in ctx.saved_tensors), None, None)
