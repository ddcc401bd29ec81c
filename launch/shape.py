"""ModelShape: the sizes of a model with its head, from config.json alone. Torch-free; nothing is loaded.

Where the weights' files lie beside it, their headers say which parameters are new (a head), as loading would find out.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from launch.config import HUB_ID, AdapterSpec, ModelSpec, Task, TrainSpec
from launch.errors import SpecError
from launch.families import FAMILIES, Family, Kind, Traits, Weight, linear
from launch.family_defaults import DEFAULTS

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LABELS = 2
"""Classes of a new head where neither the configuration nor anybody else says: a head is small."""
MAX_HEADER = 100 << 20
"""Bytes; safetensors itself refuses a longer header."""


@dataclass(frozen=True)
class ModelShape:
    """A model with the head of its task: sizes, and every parameter by name, each shared one once."""

    name: str
    model_type: str
    task: Task
    traits: Traits
    weights: tuple[Weight, ...]
    new: frozenset[str]
    """Names of the parameters that the checkpoint lacks: they are drawn, and trained with an adapter, too."""
    attention: str | None = None
    """The kernel that the configuration asks for."""

    @property
    def parameters(self) -> int:
        """Elements."""
        return sum(weight.elements for weight in self.weights)

    def of_kind(self, kind: Kind) -> int:
        """Elements of one kind of parameters."""
        return sum(weight.elements for weight in self.weights if weight.kind == kind)


@dataclass(frozen=True)
class Trained:
    """Which parameters there are when training begins, and which of them are trained."""

    weights: tuple[Weight, ...]
    """With an adapter: its own, too, and a second copy of whatever is trained whole beside it."""
    names: frozenset[str]
    """Of those that are trained."""
    adapted: tuple[Weight, ...] = ()
    """Weights that an adapter is added to."""

    @property
    def parameters(self) -> int:
        """Elements of all."""
        return sum(weight.elements for weight in self.weights)

    @property
    def trainable(self) -> int:
        """Elements that are trained."""
        return sum(weight.elements for weight in self.weights if weight.name in self.names)


def read_shape(spec: ModelSpec, labels: int | None = None) -> ModelShape:
    """The shape of the model that `spec` names: a directory, or a hub id whose files are in the local cache or within
    reach. `labels` is the number of classes, None for what the configuration says.

    Raises:
        SpecError: there is no such configuration, or its architecture is not among those worked out here.
    """
    found = _file(spec, CONFIG)
    if found is None:
        hint = (
            "name a directory with a config.json"
            if not HUB_ID.match(spec.name_or_path)
            else "is the id right? Fetch it with `hf download`, unset HF_HUB_OFFLINE, or name a directory with a "
            "config.json"
        )
        raise _refused(f"no configuration of the model {spec.name_or_path} is to be had", "no-model-config", hint)
    try:
        config = json.loads(found.read_bytes())
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise _refused(
            f"{found} is not a model's configuration", "no-model-config", "it needs a model_type"
        ) from problem
    shape = shape_of_config(config, spec.task, labels, name=spec.name_or_path)
    if shape is None:
        raise _refused(
            f"memory of the architecture `{model_type}` is not worked out",
            "unknown-architecture",
            f"known are: {', '.join(sorted(FAMILIES))}; with --trace the model is traced instead",
        )
    there = _stored(spec)
    return shape if there is None else replace(shape, new=_new(shape, FAMILIES[model_type], there))


def _refused(message: str, code: str, hint: str) -> SpecError:
    return SpecError(message, code=code, field="model.name_or_path", hint=hint)


def shape_of_config(
    config: Mapping[str, Any], task: Task, labels: int | None = None, *, name: str = "model"
) -> ModelShape | None:
    """The shape by a configuration's content, its head new; None for an architecture that is not known.

    Raises:
        SpecError: a size that the architecture needs is missing or no number.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        return None
    whole = {**DEFAULTS[model_type], **config}
    try:
        traits = family.traits(whole)
        if task == "causal-lm" and traits.post_norm:
            raise SpecError(
                f"`{model_type}` is an encoder: it does not predict the next token",
                code="not-a-language-model",
                field="model.task",
                hint="take `task: sequence-classification`, or a decoder such as GPT-2 or Llama",
            )
        labels = labels or len(whole.get("id2label") or ()) or whole.get("num_labels") or LABELS
        head = _head(family, traits, task, labels)
        weights = (*family.body(traits), *head)
    except (KeyError, TypeError, ZeroDivisionError, ValueError) as problem:
        raise SpecError(
            f"the configuration of {name} lacks a size, or has one that is no number: {problem}",
            code="no-model-config",
            field="model.name_or_path",
            hint="is it the config.json that save_pretrained wrote?",
        ) from problem
    new = frozenset() if task == "causal-lm" else frozenset(weight.name for weight in head)
    attention = whole.get("_attn_implementation") or whole.get("attn_implementation")
    return ModelShape(name, model_type, task, traits, weights, new, attention)


def _head(family: Family, traits: Traits, task: Task, labels: int) -> tuple[Weight, ...]:
    if task == "sequence-classification":
        return tuple(family.classifier(traits, labels))
    return () if traits.tied else tuple(linear("lm_head", traits.vocabulary, traits.hidden, False))


def trained(shape: ModelShape, spec: TrainSpec) -> Trained:
    """What of `shape` the job trains: all, all but what it freezes, or an adapter.

    Raises:
        SpecError: a pattern or a name that fits nothing, as the ranks would find out.
    """
    if spec.adapter is not None:
        return _with_adapter(shape, spec.adapter)
    frozen = set()
    for pattern in spec.train.freeze:
        matched = {weight.name for weight in shape.weights if fnmatchcase(weight.name, pattern)}
        if not matched:
            raise SpecError(
                f"no parameter's name matches {pattern!r}",
                code="no-such-parameter",
                field="train.freeze",
                hint=f"the first names: {', '.join(weight.name for weight in shape.weights[:3])}",
            )
        frozen |= matched
    return Trained(shape.weights, frozenset(weight.name for weight in shape.weights) - frozen)


def _with_adapter(shape: ModelShape, adapter: AdapterSpec) -> Trained:
    """Hu et al. 2021: a product (out, in) gets A (r, in) and B (out, r); DoRA (Liu et al. 2024) one length for each
    output, too. What is new, and `modules_to_save`, is trained whole, in a copy beside the model's own."""
    new = {weight.module for weight in shape.weights if weight.name in shape.new} | set(adapter.modules_to_save)
    head = {"lm_head", "score", "classifier"}  # what peft leaves out of `all-linear`, by these names
    saved = new | ({"score", "classifier"} if shape.task == "sequence-classification" else set())  # peft's own addition
    kept = [weight for weight in shape.weights if _within(weight.module, saved)]

    def wanted(weight: Weight) -> bool:
        if weight.kind not in ("linear", "embedding") or weight.name.endswith(".bias") or weight in kept:
            return False
        if isinstance(adapter.target_modules, str):
            return weight.kind == "linear" and weight.module not in head
        return _within(weight.module, adapter.target_modules, exact=True)

    adapted = tuple(weight for weight in shape.weights if wanted(weight))
    if not adapted:
        raise SpecError(
            "the adapter does not fit the model: none of target_modules is in it",
            code="bad-adapter",
            field="adapter.target_modules",
            hint="name linear layers of the model, or write `auto`",
        )
    conv = shape.model_type == "gpt2"
    added = []
    for weight in adapted:
        into, out = weight.shape if conv or weight.kind == "embedding" else weight.shape[::-1]
        added.append(Weight(f"{weight.module}.lora_A.default.weight", (adapter.r, into), "linear", weight.layer))
        added.append(Weight(f"{weight.module}.lora_B.default.weight", (out, adapter.r), "linear", weight.layer))
        if adapter.use_dora:
            name = f"{weight.module}.lora_magnitude_vector.default.weight"
            added.append(Weight(name, (out,), "bias", weight.layer))
    copies = [replace(one, name=f"{one.module}.modules_to_save.default.{one.name.split('.')[-1]}") for one in kept]
    names = frozenset(weight.name for weight in (*added, *copies))
    # A head of several new modules is copied as a whole and module by module.
    twice = [one for one in kept if one.module not in saved - new and _within(one.module, saved - new)]
    spare = [replace(one, name=f"{one.name}.spare") for one in twice if _within(one.module, new)]
    return Trained((*shape.weights, *added, *copies, *spare), names, adapted)


def _within(module: str, wanted: Iterable[str], *, exact: bool = False) -> bool:
    """Whether `module` is one of `wanted`, by its full name or the end of it; or inside one, unless `exact`."""
    parts = module.split(".")
    ends = range(len(parts), 0, -1)
    names = [".".join(parts[:end]) for end in (ends if not exact else (len(parts),))]
    return any(name == one or name.endswith(f".{one}") for name in names for one in wanted)


# What is stored of the model.


def _file(spec: ModelSpec, name: str) -> Path | None:
    """That file of the model: in its directory, or of a hub id in the cache, or fetched if the hub may be asked."""
    folder = Path(spec.name_or_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if folder.is_absolute() or not HUB_ID.match(spec.name_or_path):
        return None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # only for hub ids
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(spec.name_or_path, name, revision=spec.revision)
        if isinstance(cached, str):
            return Path(cached)
        if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            return None
        if name != CONFIG:  # weights are large, and are not fetched for a plan
            return None
        return Path(hf_hub_download(spec.name_or_path, name, revision=spec.revision, etag_timeout=5))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _stored(spec: ModelSpec) -> dict[str, Sequence[int] | None] | None:
    """Name and shape (None if only an index tells) of every tensor in the model's files; None where there are none."""
    index = _file(spec, INDEX)
    if index is not None:
        return dict.fromkeys(json.loads(index.read_bytes())["weight_map"])
    single = _file(spec, WEIGHTS)
    return None if single is None else {name: told["shape"] for name, told in header_of(single).items()}


def header_of(path: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and offsets of each tensor of a safetensors file: eight bytes of length, then JSON.

    Raises:
        SpecError: it is none.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as problem:
        raise SpecError(
            f"{path} is not a safetensors file: {problem}",
            code="not-a-model",
            field="model.name_or_path",
            hint="copy the file again",
        ) from problem
    header.pop("__metadata__", None)
    return header


def _new(shape: ModelShape, family: Family, there: Mapping[str, Sequence[int] | None]) -> frozenset[str]:
    """The parameters that are not stored, or in another shape: a head for other classes is replaced."""

    def stored(weight: Weight) -> bool:
        bare = weight.name.removeprefix(f"{family.prefix}.")
        old = (name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
               for name in (weight.name, bare))  # fmt: skip
        for name in (weight.name, bare, *old):
            if name in there:
                found = there[name]
                return found is None or tuple(found) == weight.shape
        return False

    missing = frozenset(weight.name for weight in shape.weights if not stored(weight))
    # A tied output layer may be all that is stored of the two.
    return missing - {"model.embed_tokens.weight", "transformer.wte.weight"} if "lm_head.weight" in there else missing
