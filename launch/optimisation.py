"""OptimSpec: the `train` section of a job file. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from launch.errors import Refused
from launch.section import Names, Section

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Half = Literal["bf16", "fp16"]
LossMode = Literal["whole", "chunked"]
Metric = Literal["loss", "accuracy", "f1_macro", "mcc", "perplexity"]
Optimizer = Literal["adamw", "adafactor", "lion", "adamw-8bit", "lion-8bit"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]

WHOLE_WEIGHTS: dict[str, str] = {
    "adafactor": "keeps a number a row and column",
    "adamw-8bit": "rounds its state in blocks of a weight's elements",
    "lion-8bit": "rounds its state in blocks of a weight's elements",
}
"""Optimizers for which a weight is more than its elements, and why: on ZeRO's flat pieces of weights, cut by the number
of ranks, each would run and be another optimizer."""
DECAY_SHARE = 0.1  # of the steps, for `wsd` where the file does not say


def half_of(precision: Precision) -> Half | None:
    """The type of two bytes that `precision` computes in, if it does; int8 computes in fp32 all but its products."""
    return precision if precision in ("bf16", "fp16") else None


class EarlyStopping(Section):
    """Stop when an evaluation metric no longer gets better."""

    metric: Metric = "loss"
    patience: int = Field(3, ge=1)
    """How many evaluations in a row may bring no improvement."""
    min_delta: float = Field(0.0, ge=0)
    """A smaller change than this is no improvement."""


class Divergence(Section):
    """When a loss counts as exploded, and what is done then."""

    factor: float = Field(5.0, gt=1)
    """A loss is bad if it is over so many times the median of the last good ones, or not finite."""
    window: int = Field(50, ge=1)
    """Of how many good losses the median is."""
    steps: int = Field(5, ge=1)
    """So many bad losses in a row are an explosion."""
    then: Literal["stop", "rollback"] = "stop"
    """Fail; or load the last checkpoint from before them, leave their batches out, and go on."""
    max_rollbacks: int = Field(3, ge=1)
    """After so many the next one fails the job."""


class OptimSpec(Section):
    """The optimisation itself. Nothing here depends on how many processes run it."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; or give `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; the last, smaller batch of a pass counts as a step."""
    global_batch_size: int = Field(16, ge=1)
    """Rows per optimizer step over all processes: the same for any number of them."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass of one process; null lets the planner choose. Changes speed and memory only."""
    eval_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass at evaluation; null takes twice the micro-batch."""
    optimizer: Optimizer = "adamw"
    """adafactor keeps one number a row and column of a matrix instead of two a weight; lion one a weight, and wants
    about a tenth of AdamW's learning rate; adamw-8bit and lion-8bit (bitsandbytes) keep theirs in a byte each.
    adafactor and the 8-bit ones run on single and ddp alone."""
    learning_rate: float = Field(5e-5, gt=0)
    """The peak, after the warm-up."""
    schedule: Schedule = "linear"
    """How the learning rate goes down to zero after the warm-up: linear, cosine, not at all (constant), or wsd: it
    stays (stable), and goes down linearly in the last `decay_steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly from zero."""
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    """The same as a share of all steps, rounded up; instead of `warmup_steps`."""
    decay_steps: int | None = Field(None, ge=1)
    """wsd: steps of the last part."""
    decay_ratio: float | None = Field(None, gt=0, le=1)
    """wsd: the same as a share of all steps, rounded up; with neither, a tenth."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each layer's learning rate is this factor of the one above: the head's is full, the embeddings' the lowest."""
    freeze: Names = ()
    """Parameters that stay as they are: patterns such as `*.embeddings.*` (`*`, `?`, `[a-c]`) for their names."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """This share of each target is spread evenly over all classes or tokens. In training alone: held-out loss and
    perplexity stay plain."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """sequence-classification: how much a row of each label counts in the training loss. `balanced` is rows / (classes
    x rows of the class); in a mapping of label to weight, a label left out counts 1."""
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases and normalisation weights, as is customary."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    lion_beta1: float = Field(0.9, ge=0, lt=1)
    lion_beta2: float = Field(0.99, ge=0, lt=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm; null does not clip."""
    precision: Precision | Literal["auto"] = "fp32"
    """auto: bf16 where the hardware multiplies it, on every node that the job may run on; else fp32. int8: products of
    linear layers in bytes, on CPUs with VNNI; all else in fp32."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more compute. null lets the planner
    choose: only where it would not fit otherwise."""
    loss_mode: LossMode | None = None
    """causal-lm: `chunked` makes logits a piece at a time, so that all of them never exist at once; `whole` makes all;
    null lets the planner choose."""
    seed: int = Field(0, ge=0, lt=2**32)
    deterministic: bool = False
    """Ask torch for deterministic kernels: slower on a GPU, and refused where an operation has none. A CPU needs none:
    its kernels are."""
    group_by_length: bool = True
    """Batches of rows of like length: less padding, so faster. The order stays a function of the seed."""
    eval_every: int | None = Field(None, ge=1)
    """Evaluate every so many steps; null evaluates at the end alone."""
    samples: int = Field(0, ge=0)
    """causal-lm: how many held-out prompts the finished model continues, greedily, for the model card."""
    sample_max_new_tokens: int = Field(64, ge=1)
    """The longest continuation of a sample."""
    log_every: int = Field(1, ge=1)
    log_samples: bool = False
    """For debugging: each rank writes down which rows it trained on, step by step, in `samples.jsonl`."""
    early_stopping: EarlyStopping | None = None
    keep_best: bool = False
    """Hand back the weights of the best evaluation instead of the last step's: by `early_stopping.metric`, or by the
    loss. A copy of the weights is kept in host memory."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a step's loss is infinite or not a number: fail, or leave the step out (and fail after ten in a row)."""
    divergence: Divergence | None = None
    """Watch for a loss that explodes; null does not."""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What a plan may choose from."""
        return ("fp32", "bf16") if self.precision == "auto" else (self.precision,)

    def precision_on(self, *, bf16: bool) -> Precision:
        """What the training computes in, where all hardware multiplies `bf16`, or not all of it."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if bf16 else "fp32"

    @model_validator(mode="after")
    def _length_is_given_once(self) -> OptimSpec:
        if (self.max_steps is None) == (self.epochs is None):
            raise Refused(
                "`max_steps` and `epochs` are both missing: how long is the training?"
                if self.epochs is None
                else "`max_steps` and `epochs` are both given",
                at=() if self.epochs is None else ("epochs",),
                hint="add one of them, such as `epochs: 3`" if self.epochs is None else "keep one of the two",
            )
        for wish in ("early_stopping", "keep_best"):
            if getattr(self, wish) and self.eval_every is None:
                raise Refused(
                    f"`{wish}` looks at evaluations, and `eval_every` is missing",
                    at=(wish,),
                    hint="add `eval_every:`, the steps between two evaluations",
                )
        return self

    @model_validator(mode="after")
    def _schedule_is_told_once(self) -> OptimSpec:
        if self.warmup_ratio is not None and self.warmup_steps:
            raise Refused(
                "`warmup_steps` and `warmup_ratio` are both given", at=("warmup_ratio",), hint="keep one of the two"
            )
        if self.decay_steps is not None and self.decay_ratio is not None:
            raise Refused(
                "`decay_steps` and `decay_ratio` are both given", at=("decay_ratio",), hint="keep one of the two"
            )
        for name in ("decay_steps", "decay_ratio"):
            if getattr(self, name) is not None and self.schedule != "wsd":
                raise Refused(
                    f"`{name}` is for `schedule: wsd`; {self.schedule} has no such part",
                    at=(name,),
                    hint=f"take `schedule: wsd`, or remove `{name}`",
                )
        return self
