"""The part of a vocabulary that a job's data use (`model.vocabulary: used`).

A classifier's table of word embeddings is often half of a small model, and most of a multilingual one, while the data
have a fraction of its tokens. The rows of the others get no gradient. So the table that is trained has the rows of the
tokens that the data have, in training, validation and test alike; the model directory gets the whole table, the others'
rows as they are in the base model. (Trained whole, weight decay would shrink those, too: the one difference.)
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from launch.config import Vocabulary
from launch.data import Rows
from launch.errors import SpecError
from launch.model import whole

Tokens = npt.NDArray[np.int64]
ROWS = "rows"
"""The buffer of a UsedRows with the tokens that its rows are of."""


class UsedRows(nn.Embedding):
    """Rows of a larger table, looked up by their numbers there. A number that it has no row of is an IndexError."""

    rows: torch.Tensor
    """Tokens, ascending, (rows held,); saved, since the weights mean nothing without."""
    places: torch.Tensor
    """Where the row of each token is, (size of the vocabulary,)."""

    def __init__(self, weight: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, padding: int | None) -> None:
        super().__init__(len(rows), weight.shape[1], _weight=weight)
        self.padding_idx = padding
        self.register_buffer(ROWS, rows)
        self.register_buffer("places", places, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.places[input])


def tokens_of(parts: Iterable[Rows], *others: int | None) -> Tokens:
    """The tokens that `parts` have, and `others` such as padding, ascending."""
    found = [np.unique(rows.tokens) for rows in parts]
    return np.unique(np.concatenate([*found, [token for token in others if token is not None]])).astype(np.int64)


def keep_used(model: PreTrainedModel, asked: Vocabulary, parts: Iterable[Rows], pad_token_id: int) -> None:
    """Where that is `asked`, leave `model` those word embeddings alone that `parts` use. Before an engine wraps it; all
    ranks call it.

    Raises:
        SpecError: its embeddings are not one plain table that nothing else uses, or the data have tokens beyond it.
    """
    if asked == "whole":
        return
    table = cast(nn.Embedding, model.get_input_embeddings())
    weight = cast(nn.Parameter, table.weight)
    if type(table) is not nn.Embedding or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        raise _unfit(model, f"its word embeddings are a {type(table).__name__}, not a plain table")
    users = [part for part in model.modules() for one in part.parameters(recurse=False) if one is weight]
    if len(users) > 1 or model.get_output_embeddings() is not None:
        raise _unfit(model, "its word embeddings are used in more than one place")
    tokens = torch.from_numpy(tokens_of(parts, pad_token_id, table.padding_idx))
    if int(tokens[-1]) >= table.num_embeddings:
        raise _unfit(model, f"the data have the token {int(tokens[-1])}, and it has {table.num_embeddings} embeddings")
    places = torch.full((table.num_embeddings,), len(tokens))
    places[tokens] = torch.arange(len(tokens))
    padding = None if table.padding_idx is None else int(places[table.padding_idx])
    with whole([weight]), torch.no_grad():
        device = weight.device
        kept = weight.detach()[tokens.to(device)]
    with _sharded_as_made():
        used = UsedRows(kept, tokens.to(device), places.to(device), padding)
    used.weight.requires_grad_(weight.requires_grad)
    model.set_input_embeddings(used)


def mark_of(model: nn.Module) -> str:
    """What tells the tokens of `model`'s used rows from others; empty where it has whole tables."""
    tokens = [part.rows.cpu().numpy().tobytes() for part in model.modules() if isinstance(part, UsedRows)]
    return "".join(f"-{hashlib.sha256(one).hexdigest()[:16]}" for one in tokens)


def whole_tables(model: nn.Module, weights: Mapping[str, torch.Tensor], base: Any) -> dict[str, torch.Tensor]:
    """`weights` of `model`, gathered, with whole tables in place of used rows: the others are those of `base`
    (launch.checkpoint.base_weights)."""
    found = dict(weights)
    for name, part in model.named_modules():
        if isinstance(part, UsedRows):
            rows = found.pop(f"{name}.{ROWS}")
            found[f"{name}.weight"] = completed(base.read(f"{name}.weight"), rows, found[f"{name}.weight"])
    return found


def completed(table: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A copy of `table` with `weight` in its `rows`."""
    whole_table = table.to(weight.dtype, copy=True)
    whole_table[rows] = weight
    return whole_table


def _sharded_as_made() -> contextlib.AbstractContextManager[Any]:
    """Inside, a module's weights are divided among the ranks as it is made, where ZeRO-3 is configured."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    made: contextlib.AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    return made


def _unfit(model: PreTrainedModel, why: str) -> SpecError:
    return SpecError(
        f"{type(model).__name__} cannot be trained on a part of its vocabulary: {why}",
        code="vocabulary-not-available",
        field="model.vocabulary",
        hint="leave `vocabulary` out, or take `whole`",
    )
