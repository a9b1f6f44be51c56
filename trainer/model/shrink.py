"""A small copy of a model's own configuration that keeps every kind of layer: what is proven of it holds for the model.

Widths, counts and windows shrink by the names that configurations give them; the depth becomes the shortest prefix of the
layers in which each kind of them occurs. What a layer is, is read off the built modules, not off the configuration.
"""

from __future__ import annotations

from typing import Any

from torch import nn

VOCABULARY = 128
WINDOW = 8
"""Tokens that a sliding window or a chunk of attention is shrunk to."""
CAPS, CAP = ("softcapping", "softcap", "soft_cap"), 0.1
"""How settings end that bound scores and logits, and a bound that small random weights come near."""
MOST_LAYERS = 12
"""Layers of a small copy at most."""

SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "embedding_size", "dim_model", "emb_dim"), 64
    ),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "block_hidden_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff"), 96),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "feed_forward_size", "expert_ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp", "mlp_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "num_linear_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "seq_length"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("base_channels", "codebook_size"), 32),
    "hidden_size_per_layer_input": 16,
}
"""What a size becomes at most, by the name of its setting."""

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
)
"""Names of the number of layers."""


class NotShrinkable(Exception):
    """A configuration of which no small copy could be made; says why."""


def shrunk(config: Any, plain: nn.Module) -> Any:
    """A small copy of `config`, of which `plain` is the model on meta. Raises NotShrinkable."""
    layers = shortest_prefix(plain)
    try:
        return type(config).from_dict(_small(config.to_dict(), type(config), layers))
    except Exception as error:  # whatever a configuration class finds wrong with itself
        raise NotShrinkable(
            f"{type(config).__name__} takes no small sizes: {str(error).splitlines()[-1][:120]}"
        ) from error


def _small(settings: dict[str, Any], cls: Any, layers: int) -> dict[str, Any]:
    made = dict(settings)
    depth = max((settings[name] for name in DEPTHS if isinstance(settings.get(name), int)), default=0)
    heads = next((settings[n] for n in ("num_attention_heads", "n_head", "n_heads") if settings.get(n)), None)
    for name, value in settings.items():
        if isinstance(value, dict) and name in (getattr(cls, "sub_configs", None) or {}):
            made[name] = _small(value, cls.sub_configs[name], layers)
        elif name in DEPTHS and isinstance(value, int):
            made[name] = min(layers, value)
        elif isinstance(value, list) and depth and len(value) == depth:
            made[name] = value[:layers]
        elif name in ("num_key_value_heads", "num_kv_heads") and value == heads:
            made[name] = SIZES["num_attention_heads"]  # no groups
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            made[name] = min(SIZES[name], value)
        elif name.endswith(CAPS) and isinstance(value, float) and value:
            made[name] = min(CAP, value)
        elif name.endswith("_token_id") and isinstance(value, int):
            made[name] = min(value, 3)
    made.pop("quantization_config", None)
    return made


def shortest_prefix(plain: nn.Module) -> int:
    """How many of a model's first layers hold every kind of layer that it has, two at least. Raises NotShrinkable."""
    lists = [m for m in plain.modules() if isinstance(m, nn.ModuleList) and len(m) > 1 and _repeats(m)]
    if not lists:
        return 2
    kinds = [_kind(layer) for layer in max(lists, key=len)]
    every = set(kinds)
    layers = next(n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == every)
    if layers > MOST_LAYERS:
        raise NotShrinkable(f"its {len(every)} kinds of layers are spread over {layers} of them")
    return max(layers, min(2, len(kinds)))


def _repeats(modules: nn.ModuleList) -> bool:
    """Whether these are layers: modules of many parts, not experts or single projections."""
    return sum(1 for _ in modules[0].modules()) > 3


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What tells a layer from another: its parts, their classes, their switches, and whether they have a window."""
    return tuple((name, type(module).__name__, _switches(module)) for name, module in layer.named_modules())


def _switches(module: nn.Module) -> tuple[Any, ...]:
    found = []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, bool | str):
            found.append((name, value))
        elif value is None or (isinstance(value, int) and ("window" in name or "chunk" in name)):
            found.append((name, value is None))
    return tuple(found)
