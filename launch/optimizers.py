"""Optimizers by the name that a job file gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers.optimization import Adafactor

from launch.config import OptimSpec
from launch.errors import SpecError


def make_optimizer(
    groups: list[dict[str, Any]], optim: OptimSpec, embeddings: Sequence[torch.Tensor] = ()
) -> torch.optim.Optimizer:
    """The optimizer of `optim` over parameter groups that bring their weight decay. `embeddings` are those weights of
    which an 8-bit optimizer keeps the state in full.

    Raises:
        SpecError: it is in a package that is not installed here.
    """
    if optim.optimizer.endswith("-8bit"):
        return _in_8_bits(groups, optim, embeddings)
    if optim.optimizer == "adafactor":
        # The job's own schedule instead of Adafactor's: transformers' advice for an external learning rate.
        return Adafactor(groups, lr=optim.learning_rate, scale_parameter=False, relative_step=False)
    if optim.optimizer == "lion":
        return Lion(groups, lr=optim.learning_rate, betas=(optim.lion_beta1, optim.lion_beta2))
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        fused=True,  # one pass over memory; unfused, the optimizer took half of a small model's step on a CPU
    )


def _in_8_bits(
    groups: list[dict[str, Any]], optim: OptimSpec, embeddings: Sequence[torch.Tensor]
) -> torch.optim.Optimizer:
    """bitsandbytes' optimizers (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization).

    Of embeddings they keep the state in full, as transformers' Trainer has them do and bitsandbytes advises; of weights
    with fewer than 4096 elements they do so by themselves.
    """
    if find_spec("bitsandbytes") is None:
        raise SpecError(
            f"{optim.optimizer} is bitsandbytes', which is not installed here",
            code="optimizer-not-installed",
            field="train.optimizer",
            hint="pip install 'tuneyard[gpu]' on every node, or take the optimizer adamw or lion",
        )
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager, Lion8bit

    manager = GlobalOptimManager.get_instance()
    for weight in embeddings:
        manager.override_config(weight, "optim_bits", 32)
    made: torch.optim.Optimizer
    if optim.optimizer == "lion-8bit":
        made = Lion8bit(groups, lr=optim.learning_rate, betas=(optim.lion_beta1, optim.lion_beta2))
    else:
        betas = (optim.adam_beta1, optim.adam_beta2)
        made = AdamW8bit(groups, lr=optim.learning_rate, betas=betas, eps=optim.adam_epsilon)
    return made


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, algorithm 2).

    With gradient g, momentum m, weight w, rate r and decay d:

        w <- w - r * (sign(b1 * m + (1 - b1) * g) + d * w)
        m <- b2 * m + (1 - b2) * g
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no loss to return
        assert closure is None, "Lion takes its gradients from the parameters"
        for group in self.param_groups:
            rate, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, state = weight.grad, self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                momentum = state["exp_avg"]
                direction = momentum.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
                weight.mul_(1 - rate * decay).add_(direction, alpha=-rate)
                momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what `optimizer` remembers of the weights: AdamW's two moments, Lion's one, Adafactor's factors, 8-bit
    moments with their scales.

    A count of steps and the like, a single number, is left out; what several weights share counts once.
    """
    kept = {
        id(value): value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    }
    return sum(value.numel() * value.element_size() for value in kept.values())
