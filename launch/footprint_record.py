"""What a model needs of memory, as it was traced or worked out: independent of how many ranks share it. Torch-free."""

from __future__ import annotations

import bisect
from typing import Annotated, Literal

from pydantic import Field, model_validator

from launch.config import LossMode, Precision
from launch.contract import ExecutionPlan, Record

Source = Literal["traced", "analytic"]

# A footprint may come from a peer. With numbers in these bounds, whatever is worked out from it is a number, too.
Count = Annotated[int, Field(ge=0, le=1 << 60)]
Finite = Annotated[float, Field(ge=-1e21, le=1e21, allow_inf_nan=False)]


class Line(Record):
    """Bytes as a line over the rows of a micro-batch."""

    base: Finite
    per_row: Finite

    def at(self, rows: int) -> float:
        return self.base + self.per_row * rows


class Curve(Record):
    """Bytes at some micro-batches, by rows in ascending order; linear between them and after the last two."""

    rows: tuple[Count, ...] = Field(min_length=2)
    bytes: tuple[Finite, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _is_a_curve(self) -> Curve:
        if len(self.bytes) != len(self.rows) or list(self.rows) != sorted(set(self.rows)):
            raise ValueError("a curve has as many bytes as rows, and the rows ascend")
        return self

    def at(self, rows: int) -> float:
        after = min(max(bisect.bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        first, second = self.rows[after - 1], self.rows[after]
        share = (rows - first) / (second - first)
        return self.bytes[after - 1] + share * (self.bytes[after] - self.bytes[after - 1])


class Passes(Record):
    """What a forward and backward pass needs beside weights, moments and gradients that are there before it.

    Each is the largest sum over the time of the passes, of what is alive at once.
    """

    precision: Precision
    native: bool
    """Whether the weights themselves have that precision (ZeRO), or are cast for every use (autocast)."""
    activation_checkpointing: bool
    loss: LossMode
    """`whole` also where `chunked` was asked for and the model's output layer does not allow it."""
    beside_gradients: Line | Curve
    """Activations, logits, casts of weights, temporary tensors: everything but gradients of weights."""
    with_gradients: Line | Curve
    """The same with the gradients that appear meanwhile, where there are none before (one process, its first
    micro-batch). At least the gradients."""
    while_reducing: Line | Curve | None = None
    """beside_gradients with a bucket (engine_config.BUCKET_ELEMENTS) that gradients are copied into as they appear."""
    while_halving: Line | Curve | None = None
    """The same with half of each gradient, which a rank of two keeps."""
    at_loss: Line | Curve
    """Of beside_gradients, what is alive when the backward pass begins: for the breakdown."""


class Footprint(Record):
    """A model with its task head, adapter and frozen parts, at one length of rows."""

    source: Source
    reason: str | None = None
    """Why it is not traced, where that failed."""
    length: Count
    """Tokens a row: the longest that can come."""
    parameters: Count
    """Elements, each shared weight once."""
    trainable: Count
    buffers_bytes: Count = 0
    step_bytes: Count = 0
    """Temporary tensors of the optimizer's step, where one process takes it."""
    moments_bytes: Count
    """What the optimizer remembers of all trainable weights: AdamW 8 bytes an element (Kingma & Ba 2015)."""
    small: Count = 0
    """Elements of the parameters that ZeRO-3 keeps whole on every rank."""
    largest: Count = 0
    """Elements of the module that ZeRO-3 gathers the most for at once: one that has parameters of its own."""
    runtime_bytes: Count | None = None
    """cpu: resident set of a process that has imported all that training does, in bytes; null if not measured."""
    code_bytes: Count = 0
    """cpu: of runtime_bytes, pages of files, of libraries above all, which processes share and the kernel can drop."""
    vocabulary: Count = 0
    passes: tuple[Passes, ...] = Field(min_length=1)

    def of(self, plan: ExecutionPlan) -> Passes | None:
        """The passes that run under `plan`; `whole` stands in where chunks were not to be had. None if not known."""
        native = plan.zero_stage > 0 and plan.half is not None
        wanted = [
            one
            for one in self.passes
            if (one.precision, one.native, one.activation_checkpointing)
            == (plan.precision, native, plan.activation_checkpointing)
        ]
        exact = [one for one in wanted if one.loss == plan.loss]
        return exact[0] if exact else (wanted[0] if plan.loss == "chunked" and wanted else None)
