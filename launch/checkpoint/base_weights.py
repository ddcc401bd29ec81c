"""The base model's own weights, read tensor by tensor from its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from launch.checkpoint.hf_directory import INDEX, WEIGHTS
from launch.config import ModelSpec
from launch.errors import SpecError


class BaseWeights:
    """Weights of the model that `spec` names, by the names that `model` (which may be without memory) gives them.

    A model whose files are not safetensors, or have other names than it has, is loaded whole instead.
    """

    def __init__(self, spec: ModelSpec, model: PreTrainedModel) -> None:
        self._spec, self._prefix = spec, model.base_model_prefix
        self._files: dict[str, Path] = weight_files(spec)
        self._open: dict[Path, Any] = {}
        self._whole: dict[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        """Raises SpecError: the base has no such weight, or cannot be read."""
        if self._whole is None:
            for candidate in self._candidates(name):
                if candidate in self._files:
                    path = self._files[candidate]
                    if path not in self._open:
                        self._open[path] = safe_open(str(path), framework="pt", device="cpu")
                    found: torch.Tensor = self._open[path].get_tensor(candidate)
                    return found
            self._whole = self._load_whole()
        if name not in self._whole:
            raise SpecError(
                f"the base model {self._spec.name_or_path} has no {name}, and the checkpoint neither",
                code="model-not-loaded",
                field="model.name_or_path",
                hint="is it the model that the training began with?",
            )
        return self._whole[name]

    def _candidates(self, name: str) -> tuple[str, ...]:
        """A base without a head is stored without its prefix, and the other way round."""
        prefix = f"{self._prefix}."
        return (name, name.removeprefix(prefix), prefix + name)

    def _load_whole(self) -> dict[str, torch.Tensor]:
        from launch.model import load_model

        print(f"{self._spec.name_or_path} is loaded whole: its files name weights otherwise", file=sys.stderr)
        model, _ = load_model(self._spec, (), 0)
        return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def weight_files(spec: ModelSpec) -> dict[str, Path]:
    """Which safetensors file has which weight; empty if there are none.

    Raises:
        SpecError: a hub id that cannot be downloaded.
    """
    folder = Path(spec.name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(snapshot_download(spec.name_or_path, revision=spec.revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as problem:
            raise SpecError(
                f"the base model {spec.name_or_path} cannot be read: {problem}",
                code="model-not-loaded",
                field="model.name_or_path",
                hint="check the hub id and the connection, or put the model's directory where the job named it",
            ) from problem
    index = folder / INDEX
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in places.items()}
    single = folder / WEIGHTS
    if not single.is_file():
        return {}
    with safe_open(str(single), framework="pt", device="cpu") as opened:
        return dict.fromkeys(opened.keys(), single)
