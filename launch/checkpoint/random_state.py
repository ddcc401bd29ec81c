"""The random numbers of one rank, as tensors."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch

from launch.checkpoint.state import Part


class Moment(NamedTuple):
    """Where the generators were, as they say it themselves: quick to take."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: torch.Tensor


def now() -> Moment:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    return Moment(random.getstate(), state, torch.get_rng_state())


def capture(moment: Moment | None = None) -> dict[str, torch.Tensor]:
    """The states of Python's, numpy's and torch's generators, then or now; the same names and shapes every time. A
    GPU's are those of now."""
    moment = moment or now()
    version, words, gauss = moment.python
    assert (version == 3 and gauss is None) or isinstance(gauss, float)
    _, keys, position, has_gauss, cached = moment.numpy
    found = {
        "python": torch.tensor([*words, -1 if gauss is None else 1], dtype=torch.int64),
        "python-gauss": torch.tensor([gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy-gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": moment.torch,
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(found: dict[str, torch.Tensor]) -> None:
    """Go on where `capture` was."""
    words = found["python"].tolist()
    gauss = None if words[-1] < 0 else float(found["python-gauss"])
    random.setstate((3, tuple(words[:-1]), gauss))
    *keys, position, has_gauss = found["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), float(found["numpy-gauss"]))
    )
    torch.set_rng_state(found["torch"])
    if "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])


def parts_of(rank: int, found: dict[str, torch.Tensor]) -> list[Part]:
    return [Part(f"rng-{rank}/{name}", 0, tensor) for name, tensor in found.items()]
