"""Tiny random models of each supported class, saved as ordinary Hugging Face directories."""

from pathlib import Path

import torch

CONFIGS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama_tied": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 6,
        },
    ),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "falcon": ("FalconConfig", {"multi_query": True, "alibi": False}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
}


def tiny_model_dir(
    path: Path, architecture: str = "llama", *, vocab_size: int = 512, seed: int = 0, **overrides
) -> Path:
    """Save a random model of about 40,000 parameters, dropout off, weights large enough for clear differences."""
    import transformers

    name, extra = CONFIGS[architecture]
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if architecture in {"gpt2", "distilbert"}:
        common = {k: v for k, v in common.items() if k in {"vocab_size", "bos_token_id", "eos_token_id"}}
    if architecture == "falcon":
        common.pop("intermediate_size")
    config = getattr(transformers, name)(**{**common, **extra, **overrides})
    for field in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    torch.manual_seed(seed)
    cls = transformers.AutoModelForMaskedLM if architecture == "distilbert" else transformers.AutoModelForCausalLM
    model = cls.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(path)
    return path
