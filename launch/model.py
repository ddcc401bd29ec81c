"""The model and its tokenizer: the same weights at step 0 on every engine and world size."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from launch.config import AdapterSpec, ModelSpec, TrainSpec
from launch.errors import SpecError
from launch.first_token import narrow_last_layer
from launch.hidden import carry_narrow
from launch.layers import freeze
from launch.packing import check_packable

AUTO_CLASSES = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}


def load_tokenizer(spec: ModelSpec, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token; `chat_template` is a file whose template replaces its own.

    Raises:
        SpecError: there is none under that name, or no such file.
    """
    with _as_spec_error(spec, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(spec.name_or_path, revision=spec.revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SpecError(
                f"the tokenizer of {spec.name_or_path} has neither a padding nor an end token",
                code="no-pad-token",
                field="model.name_or_path",
                hint="set pad_token in its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise SpecError(
                f"the chat template {chat_template} cannot be read: {problem}",
                code="file-unreadable",
                field="data.chat_template",
                hint="name a text file with a Jinja template, relative to the job file",
            ) from problem
    return tokenizer


def build_model(
    spec: TrainSpec,
    labels: tuple[str, ...],
    pad_token_id: int,
    *,
    checkpointing: bool,
    traced: bool = False,
    layers: int | None = None,
) -> PreTrainedModel:
    """The model in fp32 on the CPU, or sharded as it loads where ZeRO-3 has been configured before.

    `traced`: under FakeTensorMode. Weights are not read, so config.json is all that there needs to be; and it may have
    fewer `layers`.

    Raises:
        SpecError: it cannot be loaded, or the adapter or what is to be frozen does not fit it.
    """
    if traced:
        model, missing = shape_model(spec.model, labels, pad_token_id, layers)
    else:
        model, missing = load_model(spec.model, labels, pad_token_id)
        initialise(model, missing, spec.train.seed)
    narrow_last_layer(model)
    if spec.data.packing:
        check_packable(model, spec.data.max_length)
    if spec.adapter is not None:
        model = add_adapter(model, spec.adapter, spec.model.task, missing, spec.train.seed)
    else:
        carry_narrow(model)
    freeze(model, spec.train.freeze)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.model.task == "causal-lm":
        model.config.use_cache = False
    return model


def load_model(spec: ModelSpec, labels: tuple[str, ...], pad_token_id: int) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the parameters that its checkpoint lacks (a new head)."""
    with _as_spec_error(spec, "model"):
        model, report = AUTO_CLASSES[spec.task].from_pretrained(
            spec.name_or_path,
            revision=spec.revision,
            config=configured(spec, labels, pad_token_id),
            dtype=torch.float32,
            attn_implementation=spec.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(labels),  # a head for other classes is replaced
        )
    if is_deepspeed_zero3_enabled():
        # Loading for ZeRO-3 notes every renaming it knows of as if the checkpoint had used it, and saving would
        # undo them: LayerNorm.weight would become LayerNorm.gamma. Without the note, saving keeps the usual names.
        model._weight_conversions = None
    missing = set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}
    return model, sorted(missing)


def shape_model(
    spec: ModelSpec, labels: tuple[str, ...], pad_token_id: int, layers: int | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """What load_model gives, from the configuration alone; a classification head is taken to be new."""
    with _as_spec_error(spec, "model"):
        config = configured(spec, labels, pad_token_id)
        if layers is not None:
            config.get_text_config().num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        model = AUTO_CLASSES[spec.task].from_config(
            config, dtype=torch.float32, attn_implementation=spec.attn_implementation
        )
    base = f"{model.base_model_prefix}."
    missing = [name for name, _ in model.named_parameters() if labels and not name.startswith(base)]
    return model, missing


def configured(spec: ModelSpec, labels: tuple[str, ...], pad_token_id: int) -> PreTrainedConfig:
    """The model's configuration as the job changes it. Raises what transformers raises."""
    overrides: dict[str, Any] = {}
    if labels:
        overrides = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }
    config: PreTrainedConfig = AutoConfig.from_pretrained(spec.name_or_path, revision=spec.revision, **overrides)
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad_token_id
    if spec.dropout is not None:
        override_dropout(config, spec.dropout)
    return config


def override_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every dropout probability that the configuration has."""
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or name.endswith("_pdrop")):
            setattr(config, name, probability)


def initialise(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Draw the named parameters as a pure function of (seed, name, shape), the same on every rank.

    Matrices are normal with the model's initializer_range, vectors are 1 where they scale and 0 where they shift.
    """
    parameters = dict(model.named_parameters())
    std = getattr(model.config, "initializer_range", None) or 0.02
    for name in names:
        if name in parameters:  # a tied weight or a buffer is not a parameter of its own
            with whole([parameters[name]], writable=True), torch.no_grad():
                parameters[name].copy_(drawn(parameters[name].shape, name, seed, std))


def drawn(shape: torch.Size, name: str, seed: int, std: float) -> torch.Tensor:
    """fp32 values of one new parameter."""
    if len(shape) > 1:
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:7], "little")
        )
        return torch.randn(shape, generator=generator) * std
    return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)


@contextlib.contextmanager
def whole(parameters: list[nn.Parameter], *, writable: bool = False) -> Iterator[None]:
    """Inside, `parameters` are whole on every rank; ZeRO-3 keeps a part of each otherwise. What a writer puts
    there is taken from rank 0. All ranks must come here together."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if writable else None):
        yield


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape; ZeRO-3 leaves an empty tensor behind."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def add_adapter(
    model: PreTrainedModel, adapter: AdapterSpec, task: str, missing: list[str], seed: int
) -> PreTrainedModel:
    """`model` with a LoRA adapter; new weights of the base (the head) are trained and saved with it.

    Raises:
        SpecError: target_modules or modules_to_save name nothing in the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    names = {name for name, _ in model.named_modules()}
    for wanted in adapter.modules_to_save:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise SpecError(
                f"the model has no module `{wanted}`",
                code="bad-adapter",
                field="adapter.modules_to_save",
                hint="name modules of the model, such as its output layer",
            )
    new_modules = sorted({name.rpartition(".")[0] for name in missing} | set(adapter.modules_to_save))
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if task == "sequence-classification" else TaskType.CAUSAL_LM,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # declared int; only its quotient by r is used
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules="all-linear" if isinstance(adapter.target_modules, str) else list(adapter.target_modules),
        exclude_modules=new_modules or None,
        modules_to_save=new_modules or None,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as problem:
        raise SpecError(
            f"the adapter does not fit the model: {problem}",
            code="bad-adapter",
            field="adapter.target_modules",
            hint="name linear layers of the model, or write `auto`",
        ) from problem
    if adapter.use_dora and is_deepspeed_zero3_enabled():
        _gather_for_dora(adapted)
    first = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    initialise(adapted, first, seed)  # lora_B stays 0: the adapted model starts as the base model
    return adapted  # type: ignore[return-value]  # a PeftModel passes everything on to the model it wraps


def _gather_for_dora(model: nn.Module) -> None:
    """Have ZeRO-3 gather what DoRA's modules read of other modules: the base weight, and the shape of lora_A's."""
    import deepspeed
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, module in layer.lora_magnitude_vector.items():
                deepspeed.zero.register_external_parameter(module, layer.get_base_layer().weight)
                deepspeed.zero.register_external_parameter(module, layer.lora_A[name].weight)


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; biases and norm weights, all vectors, do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(shape_of(p)) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if len(shape_of(p)) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def _as_spec_error(spec: ModelSpec, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and isinstance(problem, torch.OutOfMemoryError):
            raise
        local = Path(spec.name_or_path).is_absolute()
        raise SpecError(
            f"the {what} {spec.name_or_path} cannot be loaded: {str(problem).splitlines()[0]}",
            code="model-not-loaded",
            field="model.name_or_path",
            hint="the directory needs config.json, the weights and the tokenizer's files"
            if local
            else "check the hub id and the connection, or put the model's directory beside the job file",
        ) from problem
