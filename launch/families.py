"""Every weight of a model by its configuration: names and shapes, as transformers makes them. Torch-free.

A family is a way of naming the same few layers; what differs within one is told by its configuration. That the lists
are transformers' own is what tests/unit/launch/test_shape.py checks, on models without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["linear", "embedding", "norm", "bias"]
Norm = Literal["layer", "rms"]


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None
    """Which of the model's layers it is in, from 0; None before and after them."""

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def module(self) -> str:
        """The module that has it as its own."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Traits:
    """What a configuration says of every layer, whatever its family calls it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    positions: int
    """Rows of a table of learned positions; 0 where positions are rotary."""
    embedding: int
    """Width of the word embeddings; `hidden` unless they are projected."""
    norm: Norm
    norms: int
    """Of the hidden states, in a layer."""
    post_norm: bool
    """Whether a layer's sums are normalised (encoders), instead of what goes into it."""
    gated: bool
    """Whether the feed-forward part has a gate beside its activation (SwiGLU, GeGLU)."""
    fused_qkv: bool
    qk_norm: bool
    scaled: bool
    """Whether what a sublayer gives is multiplied by a constant before it is added (Granite)."""
    softcap: bool
    """Whether logits are capped after the output layer, so that loss and layer cannot be one (Gemma 2)."""
    activation: str
    tied: bool
    dropout: float
    """Of hidden states."""
    attention_dropout: float
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    token_types: int = 0
    norm_bias: bool = False

    @property
    def causal(self) -> bool:
        """Whether a token sees none after it."""
        return not self.post_norm


Config = Mapping[str, Any]
Weights = Iterator[Weight]


@dataclass(frozen=True)
class Family:
    """How one group of architectures is read: its traits from the configuration, its weights from the traits."""

    traits: Callable[[Config], Traits]
    body: Callable[[Traits], Weights]
    """All weights but those of a head."""
    classifier: Callable[[Traits, int], Weights]
    """The head for so many classes."""
    prefix: str
    """What the base model's names begin with; a checkpoint of the base model alone leaves it out."""


def linear(name: str, out: int, into: int, bias: bool, layer: int | None = None, *, conv: bool = False) -> Weights:
    """A product's weight, (out, into), or the other way round in GPT-2's Conv1D."""
    yield Weight(f"{name}.weight", (into, out) if conv else (out, into), "linear", layer)
    if bias:
        yield Weight(f"{name}.bias", (out,), "bias", layer)


def norm(name: str, width: int, bias: bool, layer: int | None = None) -> Weights:
    yield Weight(f"{name}.weight", (width,), "norm", layer)
    if bias:
        yield Weight(f"{name}.bias", (width,), "norm", layer)


def table(name: str, rows: int, width: int) -> Weight:
    return Weight(f"{name}.weight", (rows, width), "embedding")


# Encoders: BERT and its relatives, DistilBERT.


def _encoder_traits(config: Config, *, embedding: int | None = None) -> Traits:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Traits(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        embedding=embedding or hidden,
        norm="layer",
        norms=2,
        post_norm=True,
        gated=False,
        fused_qkv=False,
        qk_norm=False,
        scaled=False,
        softcap=False,
        activation=config.get("hidden_act", "gelu"),
        tied=True,
        dropout=config["hidden_dropout_prob"],
        attention_dropout=config["attention_probs_dropout_prob"],
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        token_types=config.get("type_vocab_size", 0),
        norm_bias=True,
    )


def _bert_body(prefix: str, pooler: bool) -> Callable[[Traits], Weights]:
    def body(of: Traits) -> Weights:
        yield table(f"{prefix}.embeddings.word_embeddings", of.vocabulary, of.embedding)
        yield table(f"{prefix}.embeddings.position_embeddings", of.positions, of.embedding)
        yield table(f"{prefix}.embeddings.token_type_embeddings", of.token_types, of.embedding)
        yield from norm(f"{prefix}.embeddings.LayerNorm", of.embedding, True)
        if of.embedding != of.hidden:
            yield from linear(f"{prefix}.embeddings_project", of.hidden, of.embedding, True)
        for k in range(of.layers):
            layer = f"{prefix}.encoder.layer.{k}"
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                yield from linear(f"{layer}.attention.{name}", of.hidden, of.hidden, True, k)
            yield from norm(f"{layer}.attention.output.LayerNorm", of.hidden, True, k)
            yield from linear(f"{layer}.intermediate.dense", of.ffn, of.hidden, True, k)
            yield from linear(f"{layer}.output.dense", of.hidden, of.ffn, True, k)
            yield from norm(f"{layer}.output.LayerNorm", of.hidden, True, k)
        if pooler:
            yield from linear(f"{prefix}.pooler.dense", of.hidden, of.hidden, True)

    return body


def _one_layer(of: Traits, labels: int) -> Weights:
    yield from linear("classifier", labels, of.hidden, True)


def _two_layers(of: Traits, labels: int) -> Weights:
    yield from linear("classifier.dense", of.hidden, of.hidden, True)
    yield from linear("classifier.out_proj", labels, of.hidden, True)


def _distilbert_traits(config: Config) -> Traits:
    names = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
    names |= {"intermediate_size": "hidden_dim", "hidden_dropout_prob": "dropout", "hidden_act": "activation"}
    names |= {"attention_probs_dropout_prob": "attention_dropout"}
    return _encoder_traits({**config, **{ours: config[theirs] for ours, theirs in names.items()}})


def _distilbert_body(of: Traits) -> Weights:
    yield table("distilbert.embeddings.word_embeddings", of.vocabulary, of.hidden)
    yield table("distilbert.embeddings.position_embeddings", of.positions, of.hidden)
    yield from norm("distilbert.embeddings.LayerNorm", of.hidden, True)
    for k in range(of.layers):
        layer = f"distilbert.transformer.layer.{k}"
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield from linear(f"{layer}.attention.{name}", of.hidden, of.hidden, True, k)
        yield from norm(f"{layer}.sa_layer_norm", of.hidden, True, k)
        yield from linear(f"{layer}.ffn.lin1", of.ffn, of.hidden, True, k)
        yield from linear(f"{layer}.ffn.lin2", of.hidden, of.ffn, True, k)
        yield from norm(f"{layer}.output_layer_norm", of.hidden, True, k)


def _distilbert_head(of: Traits, labels: int) -> Weights:
    yield from linear("pre_classifier", of.hidden, of.hidden, True)
    yield from linear("classifier", labels, of.hidden, True)


# Decoders with learned positions: GPT-2, GPT-BigCode.


def _gpt_traits(config: Config, *, multi_query: bool = False) -> Traits:
    hidden, heads = config["n_embd"], config["n_head"]
    return Traits(
        layers=config["n_layer"],
        hidden=hidden,
        heads=heads,
        kv_heads=1 if multi_query else heads,
        head_dim=hidden // heads,
        ffn=config["n_inner"] or 4 * hidden,
        vocabulary=config["vocab_size"],
        positions=config["n_positions"],
        embedding=hidden,
        norm="layer",
        norms=2,
        post_norm=False,
        gated=False,
        fused_qkv=True,
        qk_norm=False,
        scaled=False,
        softcap=False,
        activation=config["activation_function"],
        tied=config["tie_word_embeddings"],
        dropout=config["resid_pdrop"],
        attention_dropout=config["attn_pdrop"],
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm_bias=True,
    )


def _gpt_body(conv: bool) -> Callable[[Traits], Weights]:
    def body(of: Traits) -> Weights:
        yield table("transformer.wte", of.vocabulary, of.hidden)
        yield table("transformer.wpe", of.positions, of.hidden)
        for k in range(of.layers):
            layer = f"transformer.h.{k}"
            width = of.hidden + 2 * of.kv_heads * of.head_dim
            yield from norm(f"{layer}.ln_1", of.hidden, True, k)
            yield from linear(f"{layer}.attn.c_attn", width, of.hidden, True, k, conv=conv)
            yield from linear(f"{layer}.attn.c_proj", of.hidden, of.hidden, True, k, conv=conv)
            yield from norm(f"{layer}.ln_2", of.hidden, True, k)
            yield from linear(f"{layer}.mlp.c_fc", of.ffn, of.hidden, True, k, conv=conv)
            yield from linear(f"{layer}.mlp.c_proj", of.hidden, of.ffn, True, k, conv=conv)
        yield from norm("transformer.ln_f", of.hidden, True)

    return body


def _score(of: Traits, labels: int) -> Weights:
    yield from linear("score", labels, of.hidden, False)


# Decoders with rotary positions: Llama and its relatives.


def _llama_traits(config: Config, *, changes: Mapping[str, Any]) -> Traits:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    bias = config.get("attention_bias", False)
    traits: dict[str, Any] = {
        "layers": config["num_hidden_layers"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config["num_key_value_heads"] or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "ffn": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "positions": 0,
        "embedding": hidden,
        "norm": "rms",
        "norms": 2,
        "post_norm": False,
        "gated": True,
        "fused_qkv": False,
        "qk_norm": False,
        "scaled": False,
        "softcap": False,
        "activation": config.get("hidden_activation") or config.get("hidden_act") or "silu",
        "tied": config["tie_word_embeddings"],
        "dropout": 0.0,
        "attention_dropout": config.get("attention_dropout", 0.0),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": config.get("mlp_bias", False),
    }
    return Traits(**{**traits, **changes})


def _llama_body(of: Traits) -> Weights:
    yield table("model.embed_tokens", of.vocabulary, of.hidden)
    width, kv_width = of.heads * of.head_dim, of.kv_heads * of.head_dim
    for k in range(of.layers):
        layer = f"model.layers.{k}"
        yield from linear(f"{layer}.self_attn.q_proj", width, of.hidden, of.attention_bias, k)
        yield from linear(f"{layer}.self_attn.k_proj", kv_width, of.hidden, of.attention_bias, k)
        yield from linear(f"{layer}.self_attn.v_proj", kv_width, of.hidden, of.attention_bias, k)
        yield from linear(f"{layer}.self_attn.o_proj", of.hidden, width, of.output_bias, k)
        if of.qk_norm:
            yield from norm(f"{layer}.self_attn.q_norm", of.head_dim, False, k)
            yield from norm(f"{layer}.self_attn.k_norm", of.head_dim, False, k)
        yield from linear(f"{layer}.mlp.gate_proj", of.ffn, of.hidden, of.mlp_bias, k)
        yield from linear(f"{layer}.mlp.up_proj", of.ffn, of.hidden, of.mlp_bias, k)
        yield from linear(f"{layer}.mlp.down_proj", of.hidden, of.ffn, of.mlp_bias, k)
        yield from norm(f"{layer}.input_layernorm", of.hidden, False, k)
        yield from norm(f"{layer}.post_attention_layernorm", of.hidden, False, k)
        if of.norms == 4:
            yield from norm(f"{layer}.pre_feedforward_layernorm", of.hidden, False, k)
            yield from norm(f"{layer}.post_feedforward_layernorm", of.hidden, False, k)
    yield from norm("model.norm", of.hidden, False)


def _llama(**changes: Any) -> Family:
    return Family(lambda config: _llama_traits(config, changes=changes), _llama_body, _score, "model")


def _electra_traits(config: Config) -> Traits:
    return _encoder_traits(config, embedding=config["embedding_size"])


def _bigcode_traits(config: Config) -> Traits:
    return _gpt_traits(config, multi_query=config["multi_query"])


ROBERTA = Family(_encoder_traits, _bert_body("roberta", False), _two_layers, "roberta")

FAMILIES: Mapping[str, Family] = {
    "bert": Family(_encoder_traits, _bert_body("bert", True), _one_layer, "bert"),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "electra": Family(_electra_traits, _bert_body("electra", False), _two_layers, "electra"),
    "distilbert": Family(_distilbert_traits, _distilbert_body, _distilbert_head, "distilbert"),
    "gpt2": Family(_gpt_traits, _gpt_body(True), _score, "transformer"),
    "gpt_bigcode": Family(_bigcode_traits, _gpt_body(False), _score, "transformer"),
    "llama": _llama(),
    "mistral": _llama(attention_bias=False, output_bias=False, mlp_bias=False),
    "qwen2": _llama(attention_bias=True, output_bias=False, mlp_bias=False),
    "qwen3": _llama(qk_norm=True, mlp_bias=False),
    "gemma": _llama(mlp_bias=False),
    "gemma2": _llama(norms=4, softcap=True, mlp_bias=False),
    "granite": _llama(scaled=True),
    "smollm3": _llama(),
}

ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "electra", "distilbert"})
"""Families whose layers end in norms, and whose classifiers read the last one's first token alone."""
