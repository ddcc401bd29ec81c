"""What transformers takes where a configuration does not say. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ENCODER = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_GPT = {
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "tie_word_embeddings": True,
}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "intermediate_size": 11008,
    "tie_word_embeddings": False,
}
_GEMMA = {"vocab_size": 256000, "head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "vocab_size": 50265},
    "xlm-roberta": _ENCODER,
    "electra": {
        **_ENCODER,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "embedding_size": 128,
    },
    "distilbert": {
        "vocab_size": 30522,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "max_position_embeddings": 512,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation": "gelu",
    },
    "gpt2": {**_GPT, "activation_function": "gelu_new"},
    "gpt_bigcode": {**_GPT, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336},
    "qwen2": {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": {
        **_LLAMA,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "gemma": {
        **_LLAMA,
        **_GEMMA,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 24576,
    },
    "gemma2": {
        **_LLAMA,
        **_GEMMA,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
    },
    "granite": _LLAMA,
    "smollm3": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
}
