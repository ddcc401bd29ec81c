"""`python -m launch.checkpoint.export`: a checkpoint as a directory that transformers, or peft, loads.

Tensor by tensor, on one machine without GPUs, whatever the model's size: what is not in the checkpoint because it was
not trained is read from the base model's own files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from launch.checkpoint.assets import load_assets
from launch.checkpoint.base_weights import BaseWeights
from launch.checkpoint.catalogue import Catalogue, no_such
from launch.checkpoint.hf_directory import Entry, write_files, write_weights
from launch.checkpoint.manifest import CheckpointError, CheckpointId
from launch.checkpoint.state import BUFFER, WEIGHT, dtype_name
from launch.checkpoint.storage import open_storage
from launch.checkpoint.stored import StoredTensors
from launch.config import TrainSpec
from launch.errors import SpecError, TuneyardError
from launch.host import return_memory
from launch.model import AUTO_CLASSES
from launch.vocabulary import ROWS, completed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD = 5_000_000_000
ADAPTER_CONFIG = "adapter_config.json"


class Exported(NamedTuple):
    directory: Path
    id: str
    kind: str
    """model, merged model or adapter"""
    tensors: int
    size: int
    """Bytes of the weights."""


def export(
    url: str,
    found: CheckpointId,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    merge: bool = False,
    best: bool = False,
    max_shard: int = MAX_SHARD,
) -> Exported:
    """Write the checkpoint `found` of the store at `url` as the directory `output`, which must not exist.

    `best` takes the weights of the best evaluation so far instead of those of the step; `merge` folds an adapter into
    the base's weights.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged, or holds nothing to export.
        SpecError: the base model cannot be read.
        OSError: the directory cannot be written.
    """
    storage = open_storage(url)
    catalogue = Catalogue(storage)
    listing = catalogue.listing()
    if found not in listing.committed:
        raise no_such(found, listing.committed)
    manifest = catalogue.manifest(found)
    if manifest.assets is None:
        raise CheckpointError(
            f"{found} was saved without configuration and tokenizer, so it cannot be exported",
            code="checkpoint-without-assets",
            hint="give checkpoints_of(..., assets=...) when saving",
        )
    if output.exists():
        raise CheckpointError(f"{output} exists already", code="output-exists", hint="name a directory that does not")
    assets = load_assets(storage, manifest.assets)
    source = Source(StoredTensors(storage, manifest), assets, best=best)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_files(unfinished, {name: data for name, data in assets.items() if name != ADAPTER_CONFIG})
    if source.adapted and not merge:
        kind, size, tensors = "adapter", *write_adapter(unfinished, source, dtype)
    else:
        kind = "merged model" if source.adapted else "model"
        entries = source.entries(dtype)
        tensor_of = merged_tensors(source) if source.adapted else source.tensor
        files = write_weights(unfinished, entries, tensor_of, max_shard)
        size, tensors = sum(file.stat().st_size for file in files), len(entries)
    write_config(unfinished, source, dtype)
    unfinished.rename(output)
    return Exported(output, manifest.id, kind, tensors, size)


class Source:
    """Weights by the model's own names: from the checkpoint what was trained, from the base what was not."""

    def __init__(self, stored: StoredTensors, assets: Mapping[str, bytes], *, best: bool) -> None:
        self.stored, self.assets = stored, assets
        self.spec = TrainSpec.model_validate_json(assets["job.json"])
        self.adapted = ADAPTER_CONFIG in assets
        self._prefix = WEIGHT
        if best:
            if not stored.names("best"):
                raise CheckpointError(
                    f"{stored.manifest.id} holds no best weights beside those of its step",
                    code="no-best-weights",
                    hint="train with `keep_best: true`, or export without --best",
                )
            self._prefix = "best"
        self.model = empty_model(self.spec, assets)
        self._base: BaseWeights | None = None

    def entries(self, dtype: torch.dtype) -> list[Entry]:
        """What a directory of the whole model holds, floats as `dtype`; tied weights once."""
        kept = set(self.model.state_dict())
        tensors: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        tensors |= {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        return [
            Entry(name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        ]

    def trained(self, name: str) -> torch.Tensor | None:
        """What the checkpoint has of it."""
        for key in (f"{self._prefix}/{name}", f"{BUFFER}/{name}"):
            if key in self.stored:
                return self.stored.read(key)
        return None

    def base(self, name: str) -> torch.Tensor:
        """The base model's own."""
        if self._base is None:
            self._base = BaseWeights(self.spec.model, self.model)
        return self._base.read(name)

    def tensor(self, name: str) -> torch.Tensor:
        found = self.trained(name)
        if found is None:
            return self.base(name)
        rows = self.trained(f"{name.rpartition('.')[0]}.{ROWS}")
        return found if rows is None else completed(self.base(name), rows, found)


def empty_model(spec: TrainSpec, assets: Mapping[str, bytes]) -> PreTrainedModel:
    """The model without memory for its weights: names and shapes."""
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as folder:
        write_files(Path(folder), {"config.json": assets["config.json"]})
        config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: PreTrainedModel = AUTO_CLASSES[spec.model.task].from_config(config)
    return model


def adapted_model(source: Source) -> nn.Module:
    """The same with the adapter's layers in it; `source.model` is wrapped in place."""
    from peft import PeftConfig, get_peft_model

    with tempfile.TemporaryDirectory(prefix="tuneyard-") as folder:
        write_files(Path(folder), {ADAPTER_CONFIG: source.assets[ADAPTER_CONFIG]})
        config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    with torch.device("meta"):
        model: nn.Module = get_peft_model(source.model, config)
    return model


def write_adapter(folder: Path, source: Source, dtype: torch.dtype) -> tuple[int, int]:
    """The adapter alone, as peft names its weights; returns bytes and tensors."""
    model: Any = adapted_model(source)
    weights = {name: source.trained(name) for name in source.stored.names(WEIGHT)}
    model.save_pretrained(folder, state_dict={name: t.to(dtype) for name, t in weights.items() if t is not None})
    write_files(folder, {ADAPTER_CONFIG: source.assets[ADAPTER_CONFIG]})  # as it was trained, base included
    return (folder / "adapter_model.safetensors").stat().st_size, len(weights)


def merged_tensors(source: Source) -> Callable[[str], torch.Tensor]:
    """Tensors of the whole model by its own names, the adapter in them: peft merges one layer at a time."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    model = adapted_model(source)
    prefix = "base_model.model."
    layers = {name.removeprefix(prefix): part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    whole = [name for name, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)]

    def tensor(name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf == "weight":
            return _merge(source, prefix + owner, layers[owner], source.base(name))
        for saved in whole:
            inner = saved.removeprefix(prefix)
            if name.startswith(inner + "."):
                trained = source.trained(f"{saved}.modules_to_save.default{name.removeprefix(inner)}")
                if trained is not None:
                    return trained
        return source.base(name)

    return tensor


def _merge(source: Source, owner: str, layer: Any, base: torch.Tensor) -> torch.Tensor:
    """The weight of one layer with its adapter; the layer holds memory only meanwhile."""
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(base)
        for name, parameter in layer.named_parameters():
            trained = source.trained(f"{owner}.{name}")
            if trained is not None:
                parameter.copy_(trained)
        layer.merge()
    merged: torch.Tensor = layer.get_base_layer().weight.detach()
    layer.to("meta")
    layer.merged_adapters = []
    return merged


def write_config(folder: Path, source: Source, dtype: torch.dtype) -> None:
    """config.json names the class and the type, which transformers adds as it saves a model."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = [type(source.model).__name__]
    config["dtype"] = dtype_name(dtype)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="launch.checkpoint.export", description=__doc__)
    parser.add_argument("store", help="directory or URL of the checkpoints")
    parser.add_argument("id", help="step-N.attempt-A")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--merge", action="store_true", help="fold an adapter into the base's weights")
    parser.add_argument("--best", action="store_true", help="the weights of the best evaluation so far")
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD)
    options = parser.parse_args(argv)
    return_memory()
    try:
        found = CheckpointId.parse(options.id)
        if found is None:
            raise CheckpointError(
                f"{options.id} is not the id of a checkpoint", code="no-such-checkpoint", hint="step-N.attempt-A"
            )
        done = export(
            options.store, found, options.output.absolute(), dtype=DTYPES[options.dtype], merge=options.merge,
            best=options.best, max_shard=options.max_shard_bytes,
        )  # fmt: skip
    except (CheckpointError, SpecError) as problem:
        fail(problem)
    print(json.dumps({**done._asdict(), "directory": str(done.directory)}))


def fail(problem: TuneyardError) -> None:
    """The error as JSON on stdout, for the command that runs this; exit status 1."""
    print(json.dumps({"error": problem.as_dict()}))
    sys.exit(1)


if __name__ == "__main__":
    main()
