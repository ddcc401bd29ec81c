"""A model's footprint by formulas, in milliseconds, from sizes alone. Pure; docs/memory.md has the formulas' sources.

It stands in where nothing is traced, or tracing fails, and is what a plan of a model that lies nowhere is made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from launch.config import LossMode, Precision, TrainSpec, half_of
from launch.contract import Device
from launch.engine_config import PERSISTENT_ELEMENTS
from launch.families import ENCODERS, Traits
from launch.footprint_record import Curve, Footprint, Passes
from launch.shape import ModelShape, Trained, trained
from orchestrator.memory.activations import (
    AUTOCAST,
    BF16,
    BYTES,
    CARRIED,
    FP32,
    HALF,
    WHOLE,
    Attention,
    Numbers,
    Setting,
    backward,
    backward_of_last,
    boundary,
    ends,
    ends_backward,
    kept,
    kept_of_last,
)

CHUNK_BYTES = 1 << 26
"""fp32 logits that exist at once where the loss is made in chunks: launch.head's number, which imports torch."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Micro-batches that are worked out; between them a footprint is linear."""
BATCH_BYTES = 40
"""A token's ids, masks, position and target, in 64-bit numbers."""
MOMENTS = {"adamw": 2 * FP32, "lion": FP32, "adamw-8bit": 2 + 2 * FP32 / 256, "lion-8bit": 1 + FP32 / 256}
"""What an optimizer remembers of a weight (Kingma & Ba 2015; Chen et al. 2023; in 8 bits a byte and a scale for every
256: Dettmers et al. 2022)."""


@dataclass(frozen=True)
class Parts:
    """All that the moments of a pass are made of; sizes in bytes unless they say elements."""

    setting: Setting
    traits: Traits
    per_token: bool
    """Whether each token has a loss, or each row."""
    width: int
    """Of the logits: of the vocabulary, or the classes."""
    head: int
    """Elements of a language model's output layer."""
    head_trained: bool
    tied: bool
    """Whether the output layer and the table of words are one weight that is trained."""
    layers: int
    """Those that keep anything: from the first that has something to train, or lies above such a one."""
    casts: int
    """Of all layers' weights under autocast, kept from their use to the backward pass."""
    cached: int
    """Of these, what autocast keeps until the forward pass is over, whether it is needed or not."""
    gradients: int
    """Of all trained weights."""
    table_gradients: int
    """Of what is looked up: they appear whole, at the very end."""
    flight: int
    """The largest gradient of a layer's weight, while it is made."""
    gradient: int
    """Bytes of an element of one."""
    checkpointing: bool
    loss: LossMode
    first_token: bool = False
    """Whether the last layer is computed for the first token alone."""

    @property
    def layer_casts(self) -> float:
        return self.casts / self.traits.layers


@dataclass(frozen=True)
class Peaks:
    """Bytes at one micro-batch; see Passes."""

    beside: float
    with_gradients: float
    at_loss: float


def footprint(shape: ModelShape, spec: TrainSpec, device: Device, reason: str | None = None) -> Footprint:
    """The footprint of `spec`'s model on `device`, in every way that a plan may choose. `reason` is why it is not
    traced.

    Raises:
        SpecError: what is frozen or adapted is not in the model.
    """
    parts = trained(shape, spec)
    modules: dict[str, int] = {}
    for weight in parts.weights:
        modules[weight.module] = modules.get(weight.module, 0) + weight.elements
    passes = [
        _passes(shape, parts, spec, device, precision=precision, native=native, checkpointing=checkpointing, loss=loss)
        for precision in spec.train.precisions
        for native in ((False, True) if half_of(precision) else (False,))
        for checkpointing in (False, True)
        for loss in losses_of(shape, parts)
    ]
    largest = max((weight.elements for weight in parts.weights if weight.name in parts.names), default=0)
    return Footprint(
        source="analytic",
        reason=reason,
        length=length_of(shape, spec),
        parameters=parts.parameters,
        trainable=parts.trainable,
        buffers_bytes=_buffers(shape),
        moments_bytes=moments(parts, spec.train.optimizer),
        step_bytes={"adamw": 0, "lion": FP32 * largest}.get(spec.train.optimizer, 3 * FP32 * largest),
        small=sum(weight.elements for weight in parts.weights if weight.elements <= PERSISTENT_ELEMENTS),
        largest=max(modules.values()),
        vocabulary=shape.traits.vocabulary,
        passes=tuple(passes),
    )


def length_of(shape: ModelShape, spec: TrainSpec) -> int:
    """Tokens of the longest row: what the job cuts to, or as many as the model has positions for."""
    return min(spec.data.max_length, shape.traits.positions or spec.data.max_length)


def losses_of(shape: ModelShape, parts: Trained) -> tuple[LossMode, ...]:
    """Chunks are only to be had where nothing stands between output layer and loss, and the layer is a plain one."""
    between = shape.traits.softcap or shape.traits.scaled or any(w.module == "lm_head" for w in parts.adapted)
    return ("whole",) if shape.task != "causal-lm" or between else ("whole", "chunked")


def moments(parts: Trained, optimizer: str) -> int:
    """Bytes that `optimizer` remembers of all trained weights; Adafactor (Shazeer & Stern 2018) of a matrix a number a
    row and a column."""
    ours = [weight for weight in parts.weights if weight.name in parts.names]
    if optimizer in MOMENTS:
        return round(sum(weight.elements for weight in ours) * MOMENTS[optimizer])
    return FP32 * sum(sum(w.shape) if len(w.shape) > 1 else w.elements for w in ours)


def _buffers(shape: ModelShape) -> int:
    """Positions and token types; the mask of GPT-BigCode; two tables of frequencies."""
    of = shape.traits
    if of.post_norm:
        return (2 if of.token_types else 1) * 8 * of.positions
    if of.positions:
        return of.positions**2 if shape.model_type == "gpt_bigcode" else 0
    return FP32 * of.head_dim


def numbers_of(precision: Precision, *, native: bool, carried: bool = False) -> Numbers:
    if precision == "int8":
        return BYTES
    if precision == "fp32":
        return WHOLE
    return HALF if native else CARRIED if carried else AUTOCAST


def is_encoder(shape: ModelShape) -> bool:
    """Whether launch does for it what it does for an encoder's classifier."""
    return shape.task == "sequence-classification" and shape.model_type in ENCODERS


def _passes(
    shape: ModelShape,
    parts: Trained,
    spec: TrainSpec,
    device: Device,
    *,
    precision: Precision,
    native: bool,
    checkpointing: bool,
    loss: LossMode,
) -> Passes:
    carried = device == "cpu" and is_encoder(shape) and spec.adapter is None
    setting = Setting(
        numbers=numbers_of(precision, native=native, carried=carried),
        length=length_of(shape, spec),
        attention=attention_of(shape, spec),
        device=device,
        padded=not (spec.data.packing and attention_of(shape, spec) == "flash"),
        lora=adapter_width(parts, spec.adapter.r if spec.adapter else 0),
        dropout=spec.model.dropout is None or spec.model.dropout > 0,
    )
    given = parts_of(shape, parts, setting, checkpointing=checkpointing, loss=loss)
    rows = sorted({*ROWS, spec.train.micro_batch_size or ROWS[0]})
    found = [peaks(given, count) for count in rows]

    def curve(values: Iterable[float]) -> Curve:
        return Curve(rows=tuple(rows), bytes=tuple(values))

    return Passes(
        precision=precision,
        native=native,
        activation_checkpointing=checkpointing,
        loss=loss,
        beside_gradients=curve(one.beside for one in found),
        with_gradients=curve(one.with_gradients for one in found),
        at_loss=curve(one.at_loss for one in found),
    )


def adapter_width(parts: Trained, rank: int) -> int:
    """Numbers a token and layer between the halves of its adapters."""
    return rank * sum(weight.layer == 0 for weight in parts.adapted)


def attention_of(shape: ModelShape, spec: TrainSpec) -> Attention:
    """The kernel that runs: transformers takes `sdpa` where neither job nor model says, and torch's caps no scores."""
    asked = spec.model.attn_implementation or shape.attention or ("eager" if shape.traits.softcap else "sdpa")
    return cast(Attention, {"flash_attention_2": "flash", "eager": "eager"}.get(asked, "sdpa"))


def parts_of(
    shape: ModelShape,
    parts: Trained,
    setting: Setting,
    *,
    checkpointing: bool,
    loss: LossMode,
    gradient: int | None = None,
) -> Parts:
    """What of the model counts for its passes. A gradient has its weight's type, unless its bytes are given."""
    of, numbers = shape.traits, setting.numbers
    ours = [weight for weight in parts.weights if weight.name in parts.names]
    size = gradient or numbers.weight
    language = shape.task == "causal-lm"
    products = [w for w in parts.weights if w.kind in ("linear", "bias") and w.layer is not None]
    tables = [w for w in ours if w.kind == "embedding"]
    lowest = min((w.layer for w in ours if w.layer is not None), default=of.layers)
    before = any(w.kind == "embedding" or (w.layer is None and "embed" in w.name) for w in ours)
    tied = language and of.tied and bool(tables)
    return Parts(
        setting=setting,
        traits=of,
        per_token=language,
        width=of.vocabulary if language else shape.weights[-1].shape[0],
        head=of.vocabulary * of.hidden if language else 0,
        head_trained=tied or any(w.module == "lm_head" for w in ours),
        tied=tied,
        layers=of.layers if before else of.layers - lowest,
        casts=BF16 * sum(w.elements for w in products) if numbers.autocast else 0,
        cached=BF16 * sum(w.elements for w in products if w.name in parts.names) if numbers.autocast else 0,
        gradients=size * sum(w.elements for w in ours),
        table_gradients=size * sum(w.elements for w in tables),
        flight=size * max((w.elements for w in ours if w.layer is not None), default=0),
        gradient=size,
        checkpointing=checkpointing,
        loss=loss,
        first_token=is_encoder(shape) and setting.attention != "flash",
    )


def peaks(parts: Parts, rows: int) -> Peaks:
    """The largest sums over the moments of a forward and a backward pass: the loss forward, the loss backward, the last
    norm backward, the last layer backward (with checkpointing: made again), the first layer backward, and the end."""
    of, at = parts.traits, parts.setting
    tokens = rows * at.length
    layer = tokens * sum(kept(of, at).values())
    back = tokens * backward(of, at) + parts.flight
    last, last_back = layer, back
    if parts.first_token:
        last = tokens * sum(kept_of_last(of, at).values())
        last_back = tokens * backward_of_last(of, at) + parts.flight
    some = parts.layers > 0
    if parts.checkpointing:
        body = parts.layers * tokens * boundary(of, at)
        forward, again = parts.cached, (layer + parts.layer_casts) * some
        last_again, done = (last + parts.layer_casts) * some, 0.0
        first = tokens * boundary(of, at) + again
    else:
        body = parts.layers * (layer + parts.layer_casts) - (layer - last) * some
        forward, again, last_again = 0, 0.0, 0.0
        done = last + parts.layer_casts  # freed, when the layer before the last is gone back through
        first = layer + parts.layer_casts
    batch = tokens * BATCH_BYTES
    tail = tokens * ends(of, at, first_token=parts.first_token)
    loss = _loss(parts, tokens if parts.per_token else rows)
    # A tied weight has its first gradient from the loss on, and is given the sum of its two at the end.
    head = parts.gradient * parts.head if parts.head_trained else 0
    pending, table = (head if parts.tied else 0), parts.table_gradients
    end = tokens * boundary(of, at) + batch + table + (2 * pending if parts.tied else 0)
    layers_back = batch + body + last_again + last_back
    if parts.first_token and parts.layers > 1:
        layers_back = max(layers_back, batch + body - done + again + back)
    norm_back = batch + body + tail + tokens * ends_backward(of, at) * (not parts.first_token)
    beside = max(
        batch + body + forward + tail + loss.forward,
        batch + body + tail + loss.backward,
        norm_back + pending,
        layers_back + pending,
        batch + first + back + pending,
        end,
    )
    with_gradients = max(
        beside,
        norm_back + head,
        layers_back + head,
        batch + first + back - parts.flight + parts.gradients - table + pending,
        end + parts.gradients - table,
    )
    return Peaks(beside, with_gradients, batch + body + tail + loss.kept)


@dataclass(frozen=True)
class _Loss:
    forward: float
    kept: float
    backward: float


def _loss(parts: Parts, count: int) -> _Loss:
    """The output layer and the loss over `count` tokens or rows; see launch.head. Beside what the layers keep."""
    numbers, of = parts.setting.numbers, parts.traits
    e, logits = numbers.compute, float(count * parts.width)
    chosen = count * of.hidden * (e if numbers.autocast else numbers.hidden)
    if not parts.per_token:
        return _Loss(2 * FP32 * logits + chosen, FP32 * logits + chosen, 3 * FP32 * logits + chosen)
    weight = parts.head if parts.head_trained else 0
    cast = BF16 * parts.head if numbers.autocast else 0
    of_weight = (e + (FP32 if numbers.autocast else 0)) * weight
    narrow = e if e < FP32 else 0
    if parts.loss == "whole":
        # Forward: the logits, in fp32, and the logarithms of their softmax. Backward: these, the gradient of the few
        # that are looked up in them, and that of all; then the gradient in the type of the product.
        return _Loss(
            forward=chosen + cast + max(2 * FP32, FP32 + narrow) * logits,
            kept=chosen + cast + FP32 * logits,
            backward=chosen
            + cast
            + max(3 * FP32 * logits, (FP32 + narrow) * logits, (narrow or FP32) * logits + of_weight),
        )
    chunk = float(min(count, max(1, CHUNK_BYTES // (FP32 * parts.width))) * parts.width)
    both = e * (count * of.hidden + weight)
    selected = count * of.hidden * (numbers.hidden + (e if numbers.autocast else 0))
    making = (FP32 + narrow) * chunk + narrow * weight
    return _Loss(
        forward=selected + cast + e * count * of.hidden + FP32 * weight + making,
        kept=both,
        backward=max(2 * both, both + FP32 * weight * numbers.autocast),
    )
