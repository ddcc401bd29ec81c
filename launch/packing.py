"""Several short rows in one sequence, none of which sees another.

Which rows share a sequence is fixed before training, from content and seed alone: to the sampler a pack is a row,
so its order stays pure and every row is still seen exactly once per epoch.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
from transformers import PreTrainedModel

from launch.errors import SpecError
from launch.sampler import Indices, shuffled

OPEN_PACKS = 256
"""Packs that may still take a row. A bound keeps packing linear in the rows; more would hardly fill them better."""
IMPLEMENTATIONS = ("sdpa", "flash_attention_2")


def first_fit(lengths: Indices, capacity: int, *key: str | int) -> list[Indices]:
    """Row numbers of each pack: rows in an order that is a pure function of `key`, each into the first open pack
    with room for it. No pack holds more than `capacity` tokens, and each row stands in exactly one."""
    assert len(lengths) > 0
    assert lengths.max() <= capacity
    room = np.zeros(OPEN_PACKS, dtype=np.int64)
    number = np.zeros(OPEN_PACKS, dtype=np.int64)
    packs: list[list[int]] = []
    for row in shuffled(len(lengths), "packs", *key):
        length = lengths[row]
        fits = room >= length
        if fits.any():
            slot = int(fits.argmax())
        else:
            slot = int(room.argmin())  # the fullest makes place
            room[slot], number[slot] = capacity, len(packs)
            packs.append([])
        room[slot] -= length
        packs[number[slot]].append(int(row))
    return [np.asarray(pack, dtype=np.int64) for pack in packs]


def block_diagonal(segments: torch.Tensor) -> torch.Tensor:
    """Boolean attention mask, shape (rows, 1, length, length), from each token's segment number, (rows, length).

    True where a token may look: at itself and what is before it in its own segment. Padding is a segment, too, so
    that no token looks at nothing, whose softmax would not be a number.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


def check_packable(model: PreTrainedModel, max_length: int) -> None:
    """Check that the model keeps rows of a pack apart when given positions and a mask.

    Raises:
        SpecError: its attention implementation or its layers would let one row see another.
    """
    config = model.config.get_text_config()
    implementation = model.config._attn_implementation
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    field, hint = "data.packing", "leave packing out"
    if implementation not in IMPLEMENTATIONS:
        problem = f"packing needs attention by {' or '.join(IMPLEMENTATIONS)}, and this model runs {implementation}"
        field, hint = "model.attn_implementation", "take `attn_implementation: sdpa`, or leave packing out"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        problem = "packing needs a model that takes position_ids, and this one does not"
    elif layers:
        problem = f"packing would mix rows in this model's layers of type {', '.join(sorted(layers))}"
    elif window is not None and window < max_length:
        problem = f"the model looks back {window} tokens, fewer than data.max_length, which a packed mask cannot say"
        hint = f"set max_length to {window} or less, or leave packing out"
    else:
        return
    raise SpecError(problem, code="cannot-pack", field=field, hint=hint)
