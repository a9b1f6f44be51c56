"""A tiny model of every causal architecture that transformers knows, out of the architecture's own configuration.

Widths, depths and counts are shrunk by the names that configurations give them; what cannot be had by such rules stands in
`own.py`. Every kind of layer that the configuration tells apart is kept, windows are shorter than `WINDOW` + 1 tokens, nothing
is dropped at random, and every parameter is drawn so that no part is without effect.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models.own import EXCLUDED, MINIMAL, OWN, VARIANTS
from trainer.model.architecture import KEY_SELECTOR_CLASSES

VOCABULARY = 352
"""Room for the tokenizer of `tests/helpers`."""
LAYERS = 2
WINDOW = 8
EXPERTS, CHOSEN = 4, 2
SPREAD = 0.1
"""Standard deviation of matrices: attention is far from uniform, so that a wrong mask is seen."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "embedding_size", "dim_model", "emb_dim"), 64
    ),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "block_hidden_size", "embedding_dim"), 64),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "word_embed_proj_dim", "out_hidden_size"), 64),
    **dict.fromkeys(("hidden_size_global", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(
        ("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "d_inner"), 96
    ),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "feed_forward_size", "mlp_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp", "mlp_hidden_size"), 32),
    **dict.fromkeys(("dense_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "num_blocks", "num_global_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "linear_num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("linear_head_dim", "dim_head", "d_head", "attention_head_size", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank", "loop_gate_rank", "laurel_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), CHOSEN),
    **dict.fromkeys(("top_k_experts", "zero_expert_num"), CHOSEN),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "seq_length"), 256),
    **dict.fromkeys(("context_length", "max_seq_len", "model_max_length", "max_source_positions"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("window_size", "keep_window_size", "local_attention_window_len", "index_topk"), WINDOW),
    **dict.fromkeys(("downsample_hidden_size", "index_n_heads"), 16),
    "index_topk_blocks": 2,
    "num_position_embeddings": 64,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "rel_extent", "index_block_size"), WINDOW),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "router_hidden_size", "adapter_rank", "d_rel"), 16),
    **dict.fromkeys(("query_pre_attn_scalar",), 16),
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), WINDOW),
    **dict.fromkeys(("image_size", "crop_size", "base_channels", "codebook_size"), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("initializer_range", "init_std"), SPREAD),
}
"""What a size becomes, by the name of its setting, where it was larger."""
DEPTHS = tuple(name for name, value in SIZES.items() if value == LAYERS and "layer" in name)
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""How many of the first layers are dense ones."""
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
"""Those of the tokenizer."""
RANDOM = ("dropout", "pdrop", "layerdrop", "drop_rate", "dropout_p", "dropout_prob", "jitter_noise")
"""How settings end that have something drawn at random in training."""
FACTORS, FACTOR = ("multiplier", "scaling", "scaling_factor", "logit_scale", "route_scale"), 1.5
"""How settings end that multiply something, by default by 1, and a factor that is felt."""
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers")
"""Lists of what each layer is."""
CAPS, CAP = ("softcapping", "softcap", "soft_cap"), 3.0
"""How settings end that bound logits, and a bound that is felt."""


def causal_types() -> list[str]:
    """Every `model_type` that has a causal language model, but for the excluded ones."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(EXCLUDED))


def tiny_config(name: str) -> Any:
    """The default configuration of an architecture, tiny; or that of one of `VARIANTS`."""
    model_type, own = VARIANTS.get(name, (name, None))
    cls = CONFIG_MAPPING[model_type]
    return cls(**shrunk(cls(**MINIMAL.get(model_type, {})).to_dict(), cls, own))


def shrunk(defaults: dict[str, Any], cls: Any, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a configuration that differ from `defaults` in a tiny one. `own`: in place of its entry in `OWN`."""
    settings: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in (getattr(cls, "sub_configs", None) or {}) and isinstance(value, dict):
            settings[name] = shrunk(value, sub_class(cls, name, value)) | {"model_type": value.get("model_type", "")}
        elif name in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            settings[name] = SIZES[name] if value > SIZES[name] or isinstance(value, float) else value
        elif name.endswith(RANDOM) and isinstance(value, int | float):
            settings[name] = type(value)(0)
        elif name.endswith(FACTORS) and isinstance(value, float) and value == 1.0:
            settings[name] = FACTOR
        elif name.endswith(CAPS) and isinstance(value, float) and value:
            settings[name] = CAP
        elif name == "is_decoder":
            settings[name] = True
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            settings[name] = SPECIAL.get(name, 3)
    if "head_dim" in defaults and "qk_rope_head_dim" in defaults:
        if defaults["head_dim"] == defaults["qk_rope_head_dim"]:
            settings["head_dim"] = SIZES["qk_rope_head_dim"]
        if defaults.get("num_key_value_heads") == defaults.get("num_attention_heads"):
            settings["num_key_value_heads"] = settings["num_attention_heads"]
    elif defaults.get("head_dim", 0) is None:
        settings["head_dim"] = SIZES["head_dim"]
    needed = OWN.get(getattr(cls, "model_type", ""), {}) if own is None else own
    return settings | _kept_layers(defaults) | copy.deepcopy(needed)


def sub_class(cls: Any, name: str, value: dict[str, Any]) -> Any:
    """The class of a configuration inside another."""
    stated = cls.sub_configs[name]
    return CONFIG_MAPPING.get(value.get("model_type", ""), stated) if not hasattr(stated, "sub_configs") else stated


def _kept_layers(defaults: dict[str, Any]) -> dict[str, Any]:
    """The depth and the lists by layer, cut to the first layer of each kind and at least `LAYERS`."""
    depth = next((name for name in DEPTHS if isinstance(defaults.get(name), int)), None)
    if depth is None or defaults[depth] < LAYERS:
        return {}
    count = defaults[depth]
    by_layer = {
        name: value
        for name, value in defaults.items()
        if isinstance(value, list) and len(value) == count and value != list(range(count))
    }
    leading = [name for name in LEADING if isinstance(defaults.get(name), int)]
    dense = max([defaults[name] or 1 for name in leading], default=0) if "mlp_layer_types" not in by_layer else 0
    own = {int(index): str(value) for index, value in (defaults.get("per_layer_config") or {}).items()}
    kinds = [(index < dense, own.get(index), *(str(v[index]) for v in by_layer.values())) for index in range(count)]
    kept = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    kept = sorted([*kept, *[index for index in range(count) if index not in kept][: max(0, LAYERS - len(kept))]])
    found: dict[str, Any] = {depth: len(kept)}
    for name, value in by_layer.items():
        limit = SIZES.get(name)
        found[name] = [value[index] if limit is None else min(limit, value[index]) for index in kept]
    if own:
        found["per_layer_config"] = {
            str(place): {k: SIZES.get(k, v) for k, v in defaults["per_layer_config"][key].items()}
            for place, index in enumerate(kept)
            for key in defaults["per_layer_config"]
            if int(key) == index
        }
    types = by_layer.get("mlp_layer_types")
    lead = [types[index] for index in kept].count("dense") if types else sum(index < dense for index in kept)
    return found | dict.fromkeys(leading, lead)


def tiny_model(model_type: str, *, seed: int = 0) -> Any:
    """A model of random weights in eval mode: constant parameters are moved, and routers told to decide clearly.

    Where the causal class is the language model of a larger one, it is that, as such models are published.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    auto: Any = transformers.AutoModelForMultimodalLM if is_part(model_type) else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * SPREAD)
            if is_router(name, parameter):
                parameter.normal_(0, 4 * SPREAD)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] += SPREAD  # a loader that leaves it zero is seen
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer) * SPREAD)
    return model.eval()


def is_part(model_type: str) -> bool:
    """Whether the causal class is the language model of a larger one, whose configuration it does not take.

    Not so for `VARIANTS`, which are saved as they are.
    """
    if model_type in VARIANTS:
        return False
    config = CONFIG_MAPPING[model_type]
    whole = config in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    return whole and transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config].config_class is not config


def is_router(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the matrix `[experts, width]` by which experts are chosen."""
    words = name.split(".")
    named = any(word in ("gate", "router", "wg", "router_gate") for word in words[-4:])
    return named and parameter.dim() == 2 and parameter.shape[0] in (EXPERTS, EXPERTS + CHOSEN)


def kinds(model: Any) -> list[str]:
    """What sets the architecture apart: kinds of layers, experts, tied or fused or shared weights."""
    config = model.config.get_text_config()
    settings = config.to_dict()
    parameters = dict(model.named_parameters())
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    embeddings = {id(model.get_input_embeddings().weight)}
    found = {str(kind) for name in KINDS for kind in settings.get(name) or ()}
    told = {
        "experts": any(is_router(name, parameter) for name, parameter in parameters.items()),
        "tied head": settings.get("tie_word_embeddings"),
        "latent attention": settings.get("kv_lora_rank"),
        "Conv1D": any(type(module).__name__ == "Conv1D" for module in model.modules()),
        "part of a larger model": config is not model.config,
        "an encoder's class": settings.get("is_decoder"),
        "shared weights": any(n > 1 and key not in embeddings for key, n in places.items()),
        "state space": any(name.endswith("A_log") for name in parameters),
        "capped logits": any(value for name, value in settings.items() if name.endswith(CAPS)),
        "uneven calls": any(type(module).__name__ in KEY_SELECTOR_CLASSES for module in model.modules()),
        "factors": any(value == FACTOR for name, value in settings.items() if name.endswith(FACTORS)),
    }
    return sorted(found | {word for word, yes in told.items() if yes})
