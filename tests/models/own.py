"""What a tiny configuration needs beside the rules of `tiny.py`, by `model_type`, and the types that cannot be made."""

from __future__ import annotations

from typing import Any

from trainer.model.architecture import REASON_BY_UNTRAINABLE_TYPE

EXCLUDED: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm, with which it trains in padded rows, on two ranks too (gemma3n_text is "
    "its language model)",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "musicgen": "speaks codes of sound in several codebooks, not text",
    "musicgen_melody": "speaks codes of sound in several codebooks, not text",
    **REASON_BY_UNTRAINABLE_TYPE,
}
"""`model_type`s that have no causal language model of text to be trained, and why."""

ONE_AT_A_TIME = frozenset({"prophetnet", "xlnet"})
"""`model_type`s that are right for one document a batch only."""

MINIMAL: dict[str, dict[str, Any]] = {}
"""What a configuration needs in order to be made at all."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2}
QWEN4: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "eos_token_id": 1,
}
ZAMBA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "num_key_value_heads": 4,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
DOTS3: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_key_value_heads": 4,
    "head_dim": 24,
    "per_layer_config": {
        "2": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 24, "qk_nope_head_dim": 16}
    },
    "rope_parameters": {
        "indexed_attention": {**ROPE, "partial_rotary_factor": 1 / 3},
        "sliding_attention": {**ROPE, "partial_rotary_factor": 1 / 3},
    },
}

OWN: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1], "z_loss_coefficient": 0.02},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "use_cache": False, "vocab_size": 352, "patching_threshold": 5.4},
    **{part: {"vocab_size": 352} for part in ("blt_patcher", "blt_local_encoder", "blt_local_decoder")},
    "cohere2_moe": {"num_shared_experts": 1},
    "cohere_compass_text": {
        **SLIDING,
        "logit_scale": 0.5,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "o_groups": 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "doge": {"keep_window_size": 64},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {
        **SLIDING,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "max_window_layers": 1,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64, "num_key_value_heads": 4},
    "dots3_note_text": DOTS3,
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "per_layer_config": {"1": {"num_local_experts": 4, "num_experts_per_tok": 2}},
    },
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5}},
    "emu3_vqgan": {"channel_multiplier": [1, 1], "num_res_blocks": 1},
    "ernie4_5_moe": {"moe_layer_end_index": 1},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "lm_head_multiplier": 0.7,
        "mlp_multipliers": [1.3, 0.8],
        "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.3],
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "glm4_moe_lite": {"num_key_value_heads": 4, "head_dim": 8},
    "got_ocr2_vision": {"output_channels": 16},
    "granitemoe_swa": {"shared_intermediate_size": 32},
    "granitemoehybrid": {
        **MAMBA2,
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "laguna": SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1], "block_multiple_of": 32},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mellum": SLIDING,
    "minicpm3": {"num_key_value_heads": 4, "dim_model_base": 32},
    "mixtral": {"sliding_window": 8},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mpt": {"logit_scale": 0.5},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "phi3": {"sliding_window": 8},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 64,
        "left_chunk": 4,
        "nemo_final_size": 10,
    },
    "prophetnet": {"disable_ngram_loss": True},
    "qwen2": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {
        "pronunciation_vocab_size": 32,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": 32,
        "shape_embed_dim": 16,
    },
    "starcoder2": {"sliding_window": 8},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"chunk_size": 16, "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": 2},
    "zamba": {**ZAMBA, "mamba_dt_rank": 8},
    "zamba2": {**ZAMBA, "n_mamba_heads": 8, "mamba_headdim": 16, "kv_channels": 16, "mamba_ngroups": 2},
}
"""What an architecture needs beside the rules, and what its own default leaves out that published models have."""

VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "dory, all layers called twice": (
        "dory",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "n_input_layers": 8,
            "n_recurrent_layers": -14,
            "n_output_layers": 8,
        },
    ),
    "emu3_text_model": ("emu3", None),
    "granitemoehybrid without attention": (
        "granitemoehybrid",
        {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "layer_types": ["linear_attention"] * 2},
    ),
    "jamba without attention": ("jamba", {}),
    "mllama_text_model": ("mllama", None),
    "qwen4_exp_text without attention": ("qwen4_exp_text", {**QWEN4, "layer_types": ["linear_attention"] * 2}),
}
"""Further models with a row of their own: (`model_type`, what they need in place of its entry in `OWN`, None: that entry).

A name that is itself a `model_type` is that of the language model that was saved out of a larger one.
"""
