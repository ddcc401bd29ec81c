"""`python -m launch.checkpoint.stock`: the weights of a checkpoint that DeepSpeed or Accelerate wrote, as a directory
that transformers loads, and so as a job's `model.name_or_path`.

The files are pickles. They are read with torch's weights_only, which runs nothing that they name; of DeepSpeed's own
classes four that hold numbers are allowed.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from launch.checkpoint.export import fail
from launch.checkpoint.hf_directory import INDEX, WEIGHTS, Entry, write_weights
from launch.checkpoint.manifest import CheckpointError
from launch.host import return_memory

_HARMLESS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_")
MAX_SHARD = 5_000_000_000


class Stock(NamedTuple):
    """Whole fp32 weights, one after the other."""

    kind: str
    """deepspeed-zero1 to 3, or accelerate"""
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]


def open_stock(directory: Path) -> Stock:
    """What kind of checkpoint `directory` is, and its weights.

    Raises:
        CheckpointError: it is none that is known, or not whole.
    """
    tag = directory / "latest"
    folder = directory
    if tag.is_file():
        folder = directory / tag.read_text().strip()
        if folder.resolve().parent != directory.resolve() or not folder.is_dir():
            raise CheckpointError(
                f"{tag} names {folder.name}, which is not there",
                code="import-incomplete",
                hint="its newest checkpoint is torn; name an older one's directory itself",
            )
    if any(folder.glob("*_optim_states.pt")):
        return _deepspeed(folder)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return _safetensors(folder)
    if (folder / "pytorch_model.bin").is_file():
        weights = _plain(_load(folder / "pytorch_model.bin"))
        return Stock("accelerate", {name: tuple(t.shape) for name, t in weights.items()}, weights.__getitem__)
    raise CheckpointError(
        f"{directory} is no checkpoint of DeepSpeed or Accelerate",
        code="import-unknown",
        hint="name the directory that save_checkpoint or save_state was given, or one tag in it",
    )


def _deepspeed(folder: Path) -> Stock:
    optimizers = sorted(folder.glob("*_optim_states.pt"), key=_rank_of)
    states = [_load(path)["optimizer_state_dict"] for path in optimizers]
    stage = int(states[0]["zero_stage"])
    counts = states[0]["partition_count"]
    ranks = max(counts) if isinstance(counts, list) else int(counts)
    if len(states) != ranks:
        raise CheckpointError(
            f"{folder} has the optimizer states of {len(states)} ranks, and {ranks} wrote it",
            code="import-incomplete",
            hint="copy the files of all nodes into one directory, or take an older checkpoint",
        )
    models = sorted(folder.glob("*_model_states.pt"), key=_rank_of)
    if not models:
        raise CheckpointError(f"{folder} has no model states", code="import-incomplete", hint="take an older one")
    model = _load(models[0])
    groups: list[dict[str, torch.Size]] = model["param_shapes"]
    trained = _trained_by_parameter if stage == 3 else _trained_by_group
    places = trained(groups, states)
    frozen = model.get("frozen_param_shapes") or {}
    if stage == 3:
        fragments = [_load(path).get("frozen_param_fragments") or {} for path in models] if frozen else []
        for name, shape in frozen.items():
            parts = [of_rank[name].view(-1).float() for of_rank in fragments]
            places[name] = _Place(tuple(shape), [(part, 0, len(part)) for part in parts])
    module = {} if stage == 3 else _plain(model["module"])
    shapes = {name: place.shape for name, place in places.items()}
    # Stage 1 does not say what is frozen: it is what the optimizer has not, and no second name of what it has.
    tied = model.get("shared_params") or {}
    shapes |= {name: tuple(t.shape) for name, t in module.items() if name not in places and name not in tied}
    if any(name.startswith("base_model.model.") for name in shapes):
        raise CheckpointError(
            f"{folder} holds the weights of an adapter and its base under peft's names",
            code="import-adapter",
            hint="load it with peft, and save the adapter or the merged model",
        )

    def read(name: str) -> torch.Tensor:
        return places[name].whole() if name in places else module[name]

    return Stock(f"deepspeed-zero{stage}", shapes, read)


class _Place(NamedTuple):
    shape: tuple[int, ...]
    pieces: list[tuple[torch.Tensor, int, int]]
    """Of which flat tensors, from where, how many elements; padding after the last."""

    def whole(self) -> torch.Tensor:
        numel = torch.Size(self.shape).numel()
        joined = torch.cat([source[start : start + length] for source, start, length in self.pieces])
        return joined[:numel].float().view(self.shape)


def _trained_by_group(groups: list[dict[str, torch.Size]], states: list[dict[str, Any]]) -> dict[str, _Place]:
    """Stages 1 and 2: each rank has an equal piece of the concatenation of a group's parameters."""
    places: dict[str, _Place] = {}
    for index, shapes in enumerate(groups):
        pieces = [state["single_partition_of_fp32_groups"][index].view(-1) for state in states]
        position = 0
        for name, shape in shapes.items():
            end = position + shape.numel()
            found, begin = [], 0
            for piece in pieces:
                first, last = max(position - begin, 0), min(end - begin, len(piece))
                if first < last:
                    found.append((piece, first, last - first))
                begin += len(piece)
            places[name] = _Place(tuple(shape), found)
            position = end
    return places


def _trained_by_parameter(groups: list[dict[str, torch.Size]], states: list[dict[str, Any]]) -> dict[str, _Place]:
    """Stage 3: each rank has an equal part of each parameter, padded, one after the other over all groups."""
    flats = [torch.cat([group.view(-1) for group in state["fp32_flat_groups"]]) for state in states]
    places: dict[str, _Place] = {}
    position = 0
    for shapes in groups:
        for name, shape in shapes.items():
            size = -(-shape.numel() // len(flats))
            places[name] = _Place(tuple(shape), [(flat, position, size) for flat in flats])
            position += size
    return places


def _safetensors(folder: Path) -> Stock:
    index = folder / INDEX
    if index.is_file():
        places = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    else:
        with safe_open(str(folder / WEIGHTS), framework="pt") as opened:
            places = dict.fromkeys(opened.keys(), folder / WEIGHTS)  # it is no mapping
    opened_files = {path: safe_open(str(path), framework="pt") for path in set(places.values())}
    shapes = {name: tuple(opened_files[path].get_slice(name).get_shape()) for name, path in places.items()}
    return Stock("accelerate", shapes, lambda name: opened_files[places[name]].get_tensor(name))


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError) as problem:
        raise CheckpointError(
            f"{path} cannot be read: {str(problem).splitlines()[0]}",
            code="import-incomplete",
            hint="it is torn, or written by another version; take an older checkpoint",
        ) from problem
    except pickle.UnpicklingError as problem:  # the file names code to run
        raise CheckpointError(
            f"{path} holds something that is neither tensors nor numbers, and is not unpickled",
            code="import-unsafe",
            hint="convert it where you trust it: DeepSpeed's zero_to_fp32.py lies beside it",
        ) from problem
    return found


def _plain(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def _rank_of(path: Path) -> int:
    match = _RANK.search(path.name)
    return int(match[1]) if match else 0


def convert(source: Path, model: str, output: Path, max_shard: int = MAX_SHARD) -> dict[str, Any]:
    """Write the weights of the checkpoint `source`, with configuration and tokenizer of `model`, as the directory
    `output`, which must not exist; returns what was written.

    Raises:
        CheckpointError: as open_stock; or the directory exists.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already", code="output-exists", hint="name a directory that does not")
    stock = open_stock(source)
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"configuration and tokenizer of {model} cannot be read: {str(problem).splitlines()[0]}",
            code="model-not-loaded",
            hint="name the model that was trained: a directory or a hub id",
        ) from problem
    head = next((stock.shapes[n] for n in ("classifier.weight", "score.weight") if n in stock.shapes), None)
    if head is not None and config.num_labels != head[0]:
        config.num_labels = head[0]
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    entries = [Entry(name, shape, torch.float32) for name, shape in stock.shapes.items()]
    write_weights(unfinished, entries, stock.read, max_shard)
    unfinished.rename(output)
    return {"directory": str(output), "kind": stock.kind, "tensors": len(entries)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="launch.checkpoint.stock", description=__doc__)
    parser.add_argument("source", type=Path, help="what save_checkpoint or save_state wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True, help="directory or hub id of the model that was trained")
    options = parser.parse_args(argv)
    return_memory()
    try:
        print(json.dumps(convert(options.source.absolute(), options.model, options.output.absolute())))
    except CheckpointError as problem:
        fail(problem)


if __name__ == "__main__":
    main()
