"""Small random models of many families: configs that keep each family's quirks, and weights that tell mistakes apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 160
MAX_LEN = 128
WINDOW = 8
"""Short prompts are longer than that."""

Config = dict[str, Any]

_TOKENS: Config = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DENSE: Config = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LEN,
}
_GQA: Config = {**_DENSE, "num_key_value_heads": 2}
_GPT: Config = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": MAX_LEN}
_HEAD: Config = {"head_dim": 24}  # not hidden_size / num_attention_heads
_LOCAL_GLOBAL: Config = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED: Config = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Multi-head latent attention: key and value heads of different size.
_LATENT: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_PARTIAL: Config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}

# Families that must work, each with what its real checkpoints have that others do not.
FAMILIES: dict[str, Config] = {
    "llama": _GQA,
    "qwen2": _GQA,  # biases on q, k, v
    "qwen3": {**_GQA, **_HEAD},  # norms on q and k
    "mistral": {**_GQA, "sliding_window": WINDOW},
    "gemma": {**_GQA, **_HEAD, "num_key_value_heads": 1},  # norm weights are 1 + w, tied, scaled embeddings
    "gemma2": {  # two soft caps, a scale of its own, norms after the blocks
        **_GQA,
        **_HEAD,
        **_LOCAL_GLOBAL,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_GQA, **_HEAD, **_LOCAL_GLOBAL, "query_pre_attn_scalar": 20},  # a RoPE for each kind of layer
    "phi": {**_DENSE, **_PARTIAL},  # parallel residual, biases everywhere, also on the logits
    "phi3": {**_GQA, **_PARTIAL, "sliding_window": WINDOW},  # fused projections
    "gpt2": _GPT,  # learned positions, Conv1D, tied
    "gpt_neox": {**_DENSE, **_PARTIAL},  # parallel residual
    "opt": {  # positions start at 2, projections around a narrower embedding
        **_TOKENS,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LEN,
        "word_embed_proj_dim": 32,
    },
    "mixtral": {**_GQA, "num_local_experts": 4, "sliding_window": WINDOW},
    "qwen3_moe": {**_GQA, **_HEAD, **_EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "olmo2": _GQA,  # norms after the blocks, norms over all heads together
    "granite": {  # multipliers in four places
        **_GQA,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 0.5,
    },
    "gpt_oss": {  # sinks, biases on the experts, interleaved gate and up, yarn
        **_GQA,
        **_HEAD,
        **_LOCAL_GLOBAL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "starcoder2": {**_GQA, "sliding_window": WINDOW, "use_bias": True},
    "stablelm": {**_GQA, **_PARTIAL, "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    "cohere": {**_GQA, "logit_scale": 1.5, "use_qk_norm": True},  # parallel residual, interleaved RoPE, tied
    "exaone4": {**_GQA, **_LOCAL_GLOBAL},  # no RoPE in full-attention layers
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},
    "glm4": {**_GQA, **_HEAD, "attention_bias": True},  # norms around the blocks, interleaved partial RoPE
    "falcon": {  # parallel residual with one norm, one key-value head
        **_TOKENS,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": MAX_LEN,
    },
}

# More families that go through transformers' attention interface.
MORE_FAMILIES: dict[str, Config] = {
    "afmoe": {**_GQA, **_EXPERTS, **_LOCAL_GLOBAL, "num_dense_layers": 1},
    "apertus": _GQA,
    "arcee": _GQA,
    "axk1": {**_DENSE, **_LATENT, **_ROUTED},
    "bert": {**_DENSE, "is_decoder": True},
    "biogpt": {**_DENSE, "scale_embedding": True},
    "bitnet": _GQA,
    "cohere2": {**_GQA, **_LOCAL_GLOBAL, "logit_scale": 1.5},
    "ctrl": {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96, "n_positions": MAX_LEN},
    "cwm": {**_GQA, **_LOCAL_GLOBAL},
    "deepseek_v2": {**_DENSE, **_LATENT, **_ROUTED, "moe_layer_freq": 1},
    "deepseek_v3": {**_DENSE, **_LATENT, **_ROUTED},
    "diffllama": _GQA,
    "dots1": {**_GQA, **_ROUTED, "n_group": 1},
    "ernie4_5": _GQA,
    "ernie4_5_moe": {**_GQA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    "flex_olmo": {**_GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        **_GQA,
        **_HEAD,
        "num_hidden_layers": 4,
        "intermediate_size": [96] * 4,
        "num_kv_shared_layers": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        **_GQA,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "glm": {**_GQA, **_HEAD},
    "glm4_moe": {**_GQA, **_ROUTED},
    "glm4_moe_lite": {**_DENSE, **_LATENT, **_ROUTED},
    "gpt_bigcode": {**_GPT, "multi_query": True},
    "granitemoe": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 0.5},
    "helium": {**_GQA, "head_dim": 16},
    "hunyuan_v1_dense": {**_GQA, "head_dim": 16},
    "jais2": _GQA,
    "mimo_v2_flash": {
        **_GQA,
        **_ROUTED,
        **_LOCAL_GLOBAL,
        "n_group": 1,
        "head_dim": 24,
        "v_head_dim": 16,
    },
    "minicpm3": {**_DENSE, **_LATENT},
    "minimax_m2": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "ministral": {**_GQA, **_LOCAL_GLOBAL, "head_dim": 16},
    "nanochat": _GQA,
    "nemotron": _GQA,
    "olmo": {**_GQA, "clip_qkv": 0.5},
    "olmo3": {**_GQA, **_LOCAL_GLOBAL},
    "olmoe": {**_GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": _DENSE,
    "phimoe": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True, "attention_bias": True},
    "qwen2_moe": {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "seed_oss": {**_GQA, "head_dim": 16},
    "vaultgemma": {**_GQA, **_HEAD, **_LOCAL_GLOBAL, "query_pre_attn_scalar": 20},
}


def make_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The small config of a family, or of any model type when `changes` say all it needs."""
    known = FAMILIES.get(name) or MORE_FAMILIES.get(name) or {}
    config: PreTrainedConfig = CONFIG_MAPPING[name](**{**known, **changes})
    return config


def save_model(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random fp32 model of the family `name` to `folder`, with `changes` to its config."""
    return save_config(make_config(name, **changes), folder, seed=seed)


def save_config(config: PreTrainedConfig, folder: Path, *, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights under which every part of a model shows in the logits, and the logits lie far apart.

    As transformers makes them, norms are 1, biases and sinks 0, and attention is nearly uniform, so that leaving any of
    them out would hardly be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for value in model.parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() < 2:
            value.add_(0.3 * noise)
        elif id(value) in embeddings:
            value.copy_(0.2 * noise)  # small, so that the layers decide and not the last token
        else:
            value.copy_(1.2 * noise / min(value.shape[-2:]) ** 0.5)
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))


def load_reference(folder: Path) -> PreTrainedModel:
    """The model as transformers runs it: eager attention, which knows soft caps and sinks, and eager experts."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model
