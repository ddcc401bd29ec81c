"""What a transformer keeps between its forward and its backward pass, tensor by tensor. Pure.

The way of counting is Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section
4), done again for what transformers' modules do under torch, where it differs: see docs/memory.md. All sizes are bytes
a token and layer unless a name says otherwise; t tokens are rows x length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.contract import Device
from launch.families import Traits

Attention = Literal["eager", "sdpa", "flash"]
SHORT = 32
"""Scores a row, below which launch.dropout takes the softmax in fp32."""
MASK = 1
"""Bytes of an element that dropout has drawn."""
FP32 = 4
BF16 = 2


@dataclass(frozen=True)
class Numbers:
    """Bytes of an element, by what it is part of."""

    compute: int
    """Of products, and of what goes into them."""
    hidden: int
    """Of hidden states between the layers."""
    read: int = 0
    """Of what is kept of what goes into products; 0: as it is."""
    autocast: bool = False
    """fp32 weights, cast for each product: what goes in is cast for each product, too, if it is not of that type."""

    @property
    def weight(self) -> int:
        return FP32 if self.autocast else self.compute

    @property
    def kept(self) -> int:
        """Of what goes into a product, until its weight's gradient is made."""
        return self.read or self.compute

    @property
    def casts_inputs(self) -> bool:
        return self.autocast and self.hidden != self.compute


WHOLE = Numbers(FP32, FP32)
BYTES = Numbers(FP32, FP32, read=1)
"""Products of bytes (launch.int8)."""
AUTOCAST = Numbers(BF16, FP32, autocast=True)
CARRIED = Numbers(BF16, BF16, autocast=True)
"""Autocast on a CPU, in encoders without an adapter (launch.hidden)."""
HALF = Numbers(BF16, BF16)
"""bf16 weights: DeepSpeed's bf16 and fp16."""


@dataclass(frozen=True)
class Setting:
    """How the layers are run."""

    numbers: Numbers
    length: int
    """Tokens a row."""
    attention: Attention
    device: Device
    padded: bool = True
    """Whether rows are filled up, so that attention is told by a mask which tokens there are."""
    lora: float = 0.0
    """With an adapter, numbers a token and layer between its two halves: rank x adapted products. The model's own norms
    and products are then not trained."""
    dropout: bool = True
    fused: bool = False
    """Norms, rotation and gate are one kernel each (Liger Kernel, Hsu et al. 2024) that keeps what goes in alone."""


def kept(of: Traits, at: Setting) -> dict[str, float]:
    """What one layer keeps for its backward pass."""
    return {
        "norms": _norms(of, at),
        "products": _inputs(of, at),
        "attention": _attention(of, at),
        "feed-forward": _feed_forward(of, at),
        "adapter": at.lora * at.numbers.compute,
        "dropout": 2 * MASK * of.hidden * (at.dropout and of.dropout > 0),
    }


def kept_of_last(of: Traits, at: Setting) -> dict[str, float]:
    """What the last layer keeps where it is computed for the first token alone (launch.first_token): of every token
    what its keys and values are made of, they themselves, and a score a head; of the first one all of `kept`."""
    numbers, e = at.numbers, at.numbers.compute
    read = 2 * of.hidden * e if numbers.casts_inputs else of.hidden * numbers.hidden
    written = scores_are_written(of, at)
    masked = at.attention == "sdpa" and (written or at.padded)
    return {
        # In bytes for keys and values; whole for the query of few rows (launch.int8), whose token is a part of it.
        "products": numbers.read * of.hidden + read,
        "attention": e * 2 * of.kv_heads * of.head_dim + of.heads * scores(of, at) * written + MASK * masked,
        "adapter": at.lora * e,  # as if all that is adapted were keys and values: on the safe side
        "first token": sum(kept(of, at).values()) / at.length,
    }


def boundary(of: Traits, at: Setting) -> float:
    """The hidden state that goes into a layer: all of it that checkpointing keeps (Chen et al. 2016)."""
    return of.hidden * at.numbers.hidden


def _norms(of: Traits, at: Setting) -> float:
    """Of the hidden states, and of queries and keys."""
    hidden = of.norms * norm(of, at, of.hidden)
    if not of.qk_norm:
        return hidden
    # Queries and keys are in the compute type; the upcast copy and the normalised one are kept for each.
    width = (of.heads + of.kv_heads) * of.head_dim
    copy = FP32 if at.numbers.compute < FP32 else at.numbers.compute
    return hidden + width * (copy + at.numbers.compute * (not at.lora)) + FP32 * (of.heads + of.kv_heads)


def norm(of: Traits, at: Setting, width: int, *, first: bool = False) -> float:
    """One norm, or the embeddings' own (`first`): its input, and for RMSNorm, which is written out in fp32, the
    normalised values that the gradient of its weight needs. What it gives is counted with the products that it goes
    into."""
    here = at.numbers.weight if first else at.numbers.hidden  # the tables' type
    if of.norm == "layer" or at.fused:
        return here * width + 2 * FP32
    normalised = FP32 if of.softcap or of.activation == "gelu_pytorch_tanh" else here
    return FP32 * width + normalised * width * (not at.lora) + FP32


def _inputs(of: Traits, at: Setting) -> float:
    """What goes into the products that norms stand before. Under autocast each product may cast a copy of its own."""
    numbers = at.numbers
    readers = (1 if of.fused_qkv else 3, 2 if of.gated else 1)
    if numbers.casts_inputs:
        return sum(readers) * of.hidden * numbers.compute
    return len(readers) * of.hidden * (numbers.read or numbers.hidden)


def _attention(of: Traits, at: Setting) -> float:
    """Queries, keys, values, the result, and what the kernel keeps of the scores.

    Dao 2023 (FlashAttention-2): one logsumexp a query and head in place of the scores.
    """
    e = at.numbers.compute
    query, keys = of.heads * of.head_dim, 2 * of.kv_heads * of.head_dim
    written = scores_are_written(of, at)
    # With a mask, keys and values are repeated for the queries that share them; of a single head that is a view.
    repeats = at.attention == "eager" or (at.attention == "sdpa" and at.padded and of.kv_heads > 1)
    # The result goes into a product, and a kernel that keeps no scores keeps it, too.
    result = query * (at.numbers.kept if written or not at.numbers.read else at.numbers.read + e)
    states = result + e * (query + (2 * query if repeats or of.kv_heads == of.heads else keys))
    if written:
        mask = MASK * at.length if at.attention == "sdpa" else 0
        return states + of.heads * at.length * scores(of, at) + mask
    if at.lora and at.numbers.autocast:
        states += e * query  # the adapter's own copy of what goes into the output product
    mask = e * at.length if at.padded and at.attention == "sdpa" else 0
    return states + FP32 * of.heads + mask


def scores_are_written(of: Traits, at: Setting) -> bool:
    """Whether there is a number for each pair of tokens: no kernel of torch's for a CPU knows dropout."""
    dropped = at.dropout and of.attention_dropout > 0
    return at.attention == "eager" or (at.attention == "sdpa" and dropped and at.device == "cpu")


def scores(of: Traits, at: Setting) -> float:
    """Bytes of a score that is written out: the softmax, and after dropout the mask and the result."""
    e, eager = at.numbers.compute, at.attention == "eager"
    # Decoders take the softmax in fp32; encoders where a mask of fp32 (of the hidden states' type), or autocast on a
    # GPU, brings that about; and launch.dropout where rows are short.
    upcast = at.numbers.autocast and at.device == "cuda"
    short = at.length < SHORT and not eager
    softmax = FP32 if upcast or short or (eager and (of.causal or at.numbers.casts_inputs)) else e
    capped = e if of.softcap else 0
    if not (at.dropout and of.attention_dropout > 0):
        return capped + softmax + (e if softmax != e else 0)
    noise = (softmax if of.post_norm else e) if eager and at.device == "cpu" else MASK
    return capped + softmax + noise + e


def _feed_forward(of: Traits, at: Setting) -> float:
    e = at.numbers.compute
    if of.gated:
        # Gate, its activation (Shazeer 2020), the other half, their product; in one kernel not the activation.
        return ((2 if at.fused else 3) * e + at.numbers.kept) * of.ffn
    if of.activation == "gelu_new":  # written out in five operations
        if at.numbers.autocast and at.device == "cuda":  # whose power is taken in fp32
            return (3 * FP32 + 2 * e) * of.ffn
        return (4 * e + at.numbers.kept) * of.ffn
    return (e + at.numbers.kept) * of.ffn


def backward(of: Traits, at: Setting) -> float:
    """Gradients that are alive at once while one layer is gone back through: of the hidden state, and in the
    feed-forward part of the activation and what it is made of, less what has been freed by then."""
    e = at.numbers.compute
    if of.activation == "gelu_new" and at.numbers.autocast and at.device == "cuda":
        e = FP32
    wide = 2 if of.gated or of.activation == "gelu_new" else 1
    return at.numbers.hidden * of.hidden + wide * e * of.ffn


def backward_of_last(of: Traits, at: Setting) -> float:
    """As `backward`, in a last layer for the first token alone: of the hidden state, and of its keys and values."""
    return at.numbers.hidden * of.hidden + at.numbers.compute * 2 * of.kv_heads * of.head_dim


def ends(of: Traits, at: Setting, *, first_token: bool = False) -> float:
    """What is kept before and after the layers: the embeddings' norm, or the last one and its input."""
    here = at.numbers.hidden
    if of.post_norm:
        # The pooler looks at the first token, and keeps all that it is given where it does not cast it.
        last = 0 if at.numbers.casts_inputs or first_token else here * of.hidden
        return norm(of, at, of.embedding, first=True) + last + MASK * of.embedding * (at.dropout and of.dropout > 0)
    return norm(of, at, of.hidden) + MASK * of.hidden * (at.dropout and of.dropout > 0)


def ends_backward(of: Traits, at: Setting) -> float:
    """Gradients while the last norm is gone back through: RMSNorm, written out in fp32, has three at once."""
    if of.norm == "layer" or at.fused:
        return 2 * at.numbers.hidden * of.hidden
    return 3 * FP32 * of.hidden + (2 * at.numbers.compute * of.hidden if at.numbers.compute < FP32 else 0)
