"""The faults of benchmarks.checkpoint_flips in what torch's distributed checkpoint (DCP) and safetensors write."""

from __future__ import annotations

import logging
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.checkpoint_flips import flip_bit, swap

State = dict[str, torch.Tensor]

SECOND, NEWEST = "step-6", "step-8"
KINDS = {"flip": 60, "cut": 16, "missing": 6, "swapped-files": 6, "older-file": 6, "swapped-checkpoints": 6}
"""How often."""


class Format(NamedTuple):
    save: Callable[[State, Path], None]
    """Into a new directory, in two files of data."""
    load: Callable[[State, Path], State]
    """What is there, given a state of the same shapes, which may be overwritten."""
    data: tuple[str, str]
    others: tuple[str, ...]
    """Files beside the data."""


@dataclass
class FormatFigures:
    """What became of the faults in one format."""

    faults: int = 0
    silent: int = 0
    """Loaded without an error."""
    silent_wrong: int = 0
    """And other values than were saved."""
    silent_wrong_by_kind: dict[str, int] = field(default_factory=dict)


def damage_formats(folder: Path, faults: int, seed: int, say: Callable[[str], None]) -> dict[str, FormatFigures]:
    """`faults` of them in each format, by name."""
    logging.disable()  # DCP logs every error that it raises
    try:
        with warnings.catch_warnings(action="ignore"):  # and warns of having no process group
            return {name: _damage_format(one, folder / name, faults, seed, say) for name, one in FORMATS.items()}
    finally:
        logging.disable(logging.NOTSET)


def _damage_format(one: Format, folder: Path, faults: int, seed: int, say: Callable[[str], None]) -> FormatFigures:
    figures = FormatFigures(silent_wrong_by_kind=dict.fromkeys(KINDS, 0))
    states = {step: drawn(number) for number, step in enumerate((SECOND, NEWEST))}
    store, copy = folder / "store", folder / "copy"
    for step, state in states.items():
        one.save(state, store / step)
    for case in range(faults):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store, copy)
        kind = damage(random.Random(f"{seed}/{case}"), copy, one)
        _count(figures, kind, one, copy / NEWEST, states[NEWEST])
    say(f"{folder.name}: {figures}")
    return figures


def damage(draw: random.Random, store: Path, one: Format) -> str:
    """Do one fault to the newest checkpoint; returns its kind."""
    kind = draw.choices(list(KINDS), weights=list(KINDS.values()))[0]
    file = draw.choice(one.data if kind == "older-file" else (*one.data, *one.data, *one.others))
    path = store / NEWEST / file
    if kind == "flip":
        flip_bit(path, draw)
    elif kind == "cut":
        with path.open("r+b") as stream:
            stream.truncate(draw.randrange(path.stat().st_size))
    elif kind == "missing":
        path.unlink()
    elif kind == "older-file":
        shutil.copyfile(store / SECOND / file, path)
    elif kind == "swapped-files":
        swap(*(store / NEWEST / name for name in one.data))
    else:
        swap(store / NEWEST, store / SECOND)
    return kind


def drawn(seed: int) -> State:
    """Weights and moments of a small network."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (256, 32), "0.bias": (256,), "2.weight": (32, 256), "2.bias": (32,)}
    return {
        f"{key}/{name}": torch.rand(shape, generator=generator)
        for key in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }


def _count(figures: FormatFigures, kind: str, one: Format, checkpoint: Path, saved: State) -> None:
    figures.faults += 1
    try:
        loaded = one.load({name: torch.zeros_like(tensor) for name, tensor in saved.items()}, checkpoint)
    except (Exception, CheckpointException):  # whatever it is, somebody hears of it
        return
    figures.silent += 1
    if loaded.keys() != saved.keys() or not all(torch.equal(loaded[name], saved[name]) for name in saved):
        figures.silent_wrong += 1
        figures.silent_wrong_by_kind[kind] += 1


def _save_dcp(state: State, folder: Path) -> None:
    save(state, storage_writer=FileSystemWriter(folder, thread_count=2), no_dist=True)


def _load_dcp(state: State, folder: Path) -> State:
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def _save_safetensors(state: State, folder: Path) -> None:
    folder.mkdir(parents=True)
    names = sorted(state)
    for file, part in zip(FORMATS["safetensors"].data, (names[::2], names[1::2]), strict=True):
        save_file({name: state[name] for name in part}, folder / file)


def _load_safetensors(_state: State, folder: Path) -> State:
    one, other = (load_file(folder / file) for file in FORMATS["safetensors"].data)
    return one | other


FORMATS = {
    "dcp": Format(_save_dcp, _load_dcp, ("__0_0.distcp", "__0_1.distcp"), (".metadata",)),
    "safetensors": Format(_save_safetensors, _load_safetensors, ("rank-0.safetensors", "rank-1.safetensors"), ()),
}
