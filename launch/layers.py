"""Which parameters train, and how fast: freezing, and learning rates by layer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from launch.errors import SpecError

RATE_FACTOR = "rate_factor"
"""Key of a parameter group: what the scheduled learning rate is multiplied by."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Keep every parameter fixed whose name one of `patterns` matches.

    Raises:
        SpecError: a pattern that matches no name, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
        if not matched:
            nearest = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.0)
            raise SpecError(
                f"no parameter's name matches {pattern!r}",
                code="no-such-parameter",
                field="train.freeze",
                hint=f"the nearest names: {', '.join(nearest)}",
            )
        for parameter in matched:
            parameter.requires_grad = False
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise SpecError(
            "nothing is left to train: every parameter is frozen",
            code="all-frozen",
            field="train.freeze",
            hint="leave the head out, such as with `freeze: ['*.encoder.*']`",
        )


def by_layer(groups: list[dict[str, Any]], model: PreTrainedModel, decay: float | None) -> list[dict[str, Any]]:
    """`groups` divided by layer, each with its RATE_FACTOR; as they are, with a factor of 1, where `decay` is None.

    With L layers, layer k (1 at the bottom) gets decay^(L + 1 - k), the embeddings decay^(L + 1), head and final norm
    1: the numbering of BEiT's and ELECTRA's fine-tuning.

    Raises:
        SpecError: the model has no list of its layers to number.
    """
    if decay is None:
        return [{**group, RATE_FACTOR: 1.0} for group in groups]
    depths = layer_depths(model)
    top = max(depths.values())
    found = []
    for group in groups:
        of_depth: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            of_depth.setdefault(depths[parameter], []).append(parameter)
        for depth, members in sorted(of_depth.items()):
            found.append({**group, "params": members, RATE_FACTOR: decay ** (top - depth)})
    return found


def layer_depths(model: PreTrainedModel) -> dict[nn.Parameter, int]:
    """0 for what comes before the first layer (embeddings), k for layer k, and L + 1 for what comes after the last."""
    stacks = dict(stacks_of(model))
    if not stacks:
        raise SpecError(
            f"{type(model).__name__} does not list its layers, so they have no order to decay by",
            code="no-layers",
            field="train.layer_decay",
            hint="remove train.layer_decay, or freeze what should stay with train.freeze",
        )
    layers = len(next(iter(stacks.values())))
    depths: dict[nn.Parameter, int] = {}
    outside = 0  # parameters are registered in the order in which they are used
    for name, parameter in model.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is None:
            depths[parameter] = outside
        else:
            depths[parameter] = 1 + int(name.removeprefix(f"{stack}.").partition(".")[0])
            outside = layers + 1
    return depths


def stacks_of(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """The lists of all of a model's layers, by name; none where it does not keep them in one."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
