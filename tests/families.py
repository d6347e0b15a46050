"""Tiny random models of every family: what the access layer is tested against.

`tiny(family)` builds a causal language model of d 32 (xLSTM: 64), 3 layers and a vocabulary of 97 on the CPU, in
float32 and evaluation mode, the same weights every time. Matrices are drawn with standard deviation 1 / sqrt(fan in),
biases and norm weights are jittered, so that every part changes the logits: at transformers' own initialisation (0.02)
a wrong state or a missing norm hides below the tolerance.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from sonde.lm.model import LanguageModel

D_MODEL = 32
N_LAYERS = 3
VOCAB = 97

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON: dict[str, Any] = {**_TOKENS, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS}
_ATTENTION: dict[str, Any] = {
    **_COMMON,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_GROUPED: dict[str, Any] = {**_ATTENTION, "num_key_value_heads": 2}
_SSD: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}

# Arguments of each family's configuration; sliding windows are shorter than the test sequences, chunked scans need
# several chunks, hybrids have both kinds of layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**_TOKENS, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128},
    "gpt_neox": _ATTENTION,
    "gptj": {**_TOKENS, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "head_dim": 8, "sliding_window": 5},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},
    "gemma3_text": {
        **_GROUPED,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": _ATTENTION,
    "opt": {**_ATTENTION, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "bloom": {**_TOKENS, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4},
    "falcon": {**_ATTENTION, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "olmo2": _GROUPED,
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "stablelm": _GROUPED,
    "granite": {**_GROUPED, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "mamba": {**_COMMON, "state_size": 8},
    "mamba2": {**_COMMON, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    "falcon_mamba": {**_COMMON, "state_size": 8},
    "rwkv": {**_COMMON, "attention_hidden_size": D_MODEL, "intermediate_size": 64, "rescale_every": 2},
    "recurrent_gemma": {
        **_COMMON,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "attention_window_size": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "jamba": {
        **_GROUPED,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "falcon_h1": {
        **_GROUPED,
        **_SSD,
        "mamba_d_ssm": 64,
        "lm_head_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "attention_out_multiplier": 0.5,
        "ssm_out_multiplier": 0.7,
    },
    "bamba": {**_GROUPED, **_SSD, "attn_layer_indices": [1]},
    "qwen3_next": {
        **_GROUPED,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "granitemoehybrid": {
        **_GROUPED,
        **_SSD,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention", "mamba"],
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    # d 64: its configuration rounds the width of queries and keys up to a multiple of 64, its state does not
    "xlstm": {
        **_COMMON,
        "hidden_size": 64,
        "num_heads": 2,
        "chunk_size": 4,
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 8,
    },
}


def tiny(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return the tiny model of a family of `FAMILIES`, with `changes` to its configuration; attention is eager."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        _randomise(model)
    return model.eval().requires_grad_(False)


@functools.cache
def model(family: str = "llama") -> LanguageModel:
    """Return the tiny model of a family, wrapped; the same object every time, so that it must be left as it is."""
    return LanguageModel(tiny(family), name=family)


def tokens(batch: int = 2, length: int = 8, *, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length) that avoid the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if parameter.dim() < 2 and leaf in ("weight", "bias"):
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif leaf.endswith(("weight", "_proj")):
            embedding = "embed" in name or "wte" in name or "wpe" in name
            parameter.normal_(std=0.7 if embedding else parameter.shape[-1] ** -0.5)
