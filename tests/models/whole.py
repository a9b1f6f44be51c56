"""Configurations of published sizes: what an architecture's own default leaves out, and some of the largest models."""

from __future__ import annotations

from typing import Any

from tests.models.own import ROPE

QWEN4: dict[str, Any] = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [2, 21],
    "eos_token_id": 248044,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
}
LEFT_OUT: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 10,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 6144, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "emu3": {
        "vocabulary_map": {
            "<image>": 151851,
            "<|image start|>": 151852,
            **{f"<|extra_{n}|>": 151643 + n for n in range(205)},
            **{f"<|visual token {n:06d}|>": 151854 + n for n in range(32768)},
        }
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16},
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "num_dense_layers": 2,
        "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
    },
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 21, "sliding_window": 4096},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
}
"""What a configuration needs beside its default, by `model_type`, to be that of a model that can be run."""

LARGEST: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-405B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "eos_token_id": [128001, 128008, 128009],
        },
    ),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "Gemma-3-27B": (
        "gemma3",
        {
            "text_config": {
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "num_hidden_layers": 62,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "head_dim": 128,
                "query_pre_attn_scalar": 168,
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
        },
    ),
    "Gemma-4, keys shared by the last layers": (
        "gemma4_text",
        {"num_hidden_layers": 35, "num_kv_shared_layers": 20, "use_double_wide_mlp": True},
    ),
    "gpt-oss-120b": ("gpt_oss", {"num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok": 4}),
    "Granite-4.0-H-Small": (
        "granitemoehybrid",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "mamba_n_heads": 128,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_expand": 2,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "shared_intermediate_size": 1536,
            "intermediate_size": 768,
            "layer_types": ["full_attention" if n in (5, 15, 25, 35) else "linear_attention" for n in range(40)],
        },
    ),
    "Falcon-H1-34B": (
        "falcon_h1",
        {
            "hidden_size": 5120,
            "intermediate_size": 21504,
            "num_hidden_layers": 72,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "mamba_d_ssm": 4096,
            "mamba_n_heads": 32,
            "mamba_d_head": 128,
            "mamba_n_groups": 2,
            "lm_head_multiplier": 0.0195,
            "embedding_multiplier": 5.65,
        },
    ),
    "Mixtral-8x22B": (
        "mixtral",
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
        },
    ),
    "Llama-4-Maverick": ("llama4", {"text_config": {"num_local_experts": 128, "interleave_moe_layer_step": 2}}),
    "GLM-4.5": (
        "glm4_moe",
        {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "num_hidden_layers": 92,
            "num_attention_heads": 96,
            "n_routed_experts": 160,
            "first_k_dense_replace": 3,
        },
    ),
    "Jamba-1.5-Large": (
        "jamba",
        {
            "hidden_size": 8192,
            "intermediate_size": 24576,
            "num_hidden_layers": 72,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    "OLMo-3-32B": (
        "olmo3",
        {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    ),
}
"""Sizes like those of models that are published, by name: (`model_type`, what differs from its default)."""
