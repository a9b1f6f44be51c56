"""Makes a small copy of a model's configuration with every kind of layer; what is proven of it holds for the model.

Widths, counts and windows shrink by the names that configurations give them; factors of one product are kept
consistent. If the names do not suffice, widths and heads are divided by one number. `kept_layers.py` says which
layers stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import nn

from trainer.model.kept_layers import KeptLayers, choices, depth_of, layer_kinds

VOCABULARY = 128
WINDOW = 8
"""Tokens that a sliding window or a chunk of attention is shrunk to."""
CAPS, CAP = ("softcapping", "softcap", "soft_cap"), 0.1
"""How settings end that bound scores and logits, and a bound that small random weights come near."""
ENTROPY = 0.97 * math.log(VOCABULARY)
"""An entropy that what small random weights predict has in about half of all places: patches of bytes begin there."""
WAYS = 3
"""Choices of layers that are tried at most."""

SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "embedding_size", "dim_model", "emb_dim"), 64
    ),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "block_hidden_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("hidden_size_global", "out_hidden_size", "input_embedding_size", "output_embedding_size"), 64),
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim", "embedding_dim"), 64),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 64),
    **dict.fromkeys(
        ("decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "d_inner"), 96
    ),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "feed_forward_size", "mlp_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp", "mlp_hidden_size"), 32),
    **dict.fromkeys(("dense_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "num_linear_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads", "indexer_kv_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads", "mamba_n_groups", "mamba_ngroups", "n_groups", "o_groups"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("linear_head_dim", "dim_head", "d_head", "attention_head_size", "index_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_headdim", "mamba_head_dim", "indexer_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank", "loop_gate_rank", "laurel_rank"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 16),
    **dict.fromkeys(("router_hidden_size", "adapter_rank", "d_rel", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim", "ple_embed_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("top_k_experts", "top_k", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "num_expert_group"), 1),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "ngram_vocab_size_base"), VOCABULARY),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "seq_length"), 256),
    **dict.fromkeys(("context_length", "max_seq_len", "model_max_length", "max_source_positions"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("window_size", "local_attention", "local_attention_window_len", "index_topk"), WINDOW),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "rel_extent", "index_block_size", "indexer_budget"), WINDOW),
    **dict.fromkeys(("indexer_compress_ratio", "split_ngram_parts"), 2),
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), WINDOW),
    **dict.fromkeys(("base_channels", "codebook_size"), 32),
}
"""What a size becomes at most, by the name of its setting; positions and windows too where what begins with them would be
longer than the documents."""
EMBEDDED = "vocabulary_map"
"""The setting of tokens for images, by name: of those that differ in their number alone one is kept."""
HEADS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
HEAD_SIZES = ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
EXPANSIONS = ("mamba_expand", "expand")
"""What multiplies to the inner width of a state-space layer: heads and their sizes, or the width and this."""
WIDTHS = re.compile(r"hidden_size$|(embedding|state)_(size|dim)|(^|_)heads$|^n_heads?$|^(n_embd|d_model|dim)$")
"""Names of what is divided where heads keep their size."""


class NotShrinkable(Exception):
    """A configuration of which no small copy could be made; says why."""


def small_copies(config: Any, plain: nn.Module) -> Iterator[Any]:
    """Small copies of `config`, of which `plain` is the model on meta, the likeliest first; none is tried out.

    Raises NotShrinkable where not one of them is a configuration of its class.
    """
    settings, cls = _settings(config), type(config)
    found, reason = 0, ""
    for sizes in (_by_name, _in_proportion):
        for way in range(WAYS):
            try:
                small = _small(settings, cls, plain, sizes, way)
                made = cls.from_dict(small) if small is not None else None
            except Exception as error:  # noqa: BLE001 - whatever a configuration class finds wrong with itself
                reason = (
                    reason
                    or f"{cls.__name__} takes no small sizes: {(str(error) or 'no message').splitlines()[-1][:120]}"
                )
                continue
            if made is not None:
                found += 1
                yield made
    if not found:
        raise NotShrinkable(reason)


def lost_kinds(config: Any, plain: nn.Module, small_config: Any, small: nn.Module) -> int:
    """How many kinds of layers `plain` has that `small`, built of the small copy, lacks."""
    lost = 0
    for whole, part in _parts(_settings(config), _settings(small_config), type(config)):
        kinds, kept = (set(layer_kinds(m, depth_of(s))) for m, s in ((plain, whole), (small, part)))
        if len(kinds) > 1 and kept:
            lost += len(kinds - kept)
    return lost


def _settings(config: Any) -> dict[str, Any]:
    """Its settings as it has them, which need not be those that it writes."""
    settings = config.to_dict()
    for name, value in settings.items():
        own = vars(config).get(name)  # what varies by layer may not be asked for
        if isinstance(value, dict) and name in (getattr(config, "sub_configs", None) or {}) and hasattr(own, "to_dict"):
            settings[name] = _settings(own)
        elif isinstance(own, int | list) and type(own) is type(value):
            settings[name] = own
    return settings


def _parts(whole: dict[str, Any], part: dict[str, Any], cls: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    yield whole, part
    for name, inner in (getattr(cls, "sub_configs", None) or {}).items():
        if isinstance(whole.get(name), dict) and isinstance(part.get(name), dict):
            yield from _parts(whole[name], part[name], inner)


def _small(settings: dict[str, Any], cls: Any, plain: nn.Module, sizes: Callable[..., Any], way: int) -> dict[str, Any]:
    kept = _kept(settings, plain, way)
    made = dict(settings) | kept.by_layer(settings)
    made |= sizes(made, settings)
    for name, value in made.items():
        if isinstance(value, dict) and name in (getattr(cls, "sub_configs", None) or {}):
            made[name] = _small(settings[name], cls.sub_configs[name], plain, sizes, way)
        elif name.endswith(CAPS) and isinstance(value, float) and value:
            made[name] = min(CAP, value)
        elif name == "patching_threshold" and isinstance(value, float):
            made[name] = ENTROPY
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            made[name] = min(value, 3) if isinstance(value, int) else [min(v, 3) for v in value]
        elif name == "per_layer_config":
            made[name] = {place: _of_layer(own, settings, made) for place, own in value.items()}
        elif name == EMBEDDED and value:
            made[name] = _few_names(value)
    made.pop("quantization_config", None)
    return made


def _kept(settings: dict[str, Any], plain: nn.Module, way: int) -> KeptLayers:
    ways = list(islice(choices(plain, settings), way + 1))
    return ways[-1]


def _by_name(made: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    heads = next((full[n] for n in ("num_attention_heads", "n_head", "n_heads") if full.get(n)), None)
    for name, value in made.items():
        if name in ("num_key_value_heads", "num_kv_heads") and value == heads:
            small[name] = SIZES["num_attention_heads"]  # no groups
        elif name in SIZES:
            small[name] = _at_most(SIZES[name], value)
    rope = full.get("qk_rope_head_dim")
    if rope and full.get("head_dim"):  # which say the same, or the one a share of the other
        small["head_dim"] = max(1, small["qk_rope_head_dim"] * full["head_dim"] // rope)
    return small | _attention_width(small, full) | _inner_width(made | small, full)


def _attention_width(small: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """A width of attention of its own as wide beside the model's as it was, and what its heads share of it."""
    wide, size = (full.get(name) for name in ("attention_hidden_size", "attention_head_dim"))
    if not wide or not full.get("hidden_size"):
        return {}
    width = small["hidden_size"] * wide // full["hidden_size"]
    whole = size and size * full["num_attention_heads"] == wide
    return {"attention_hidden_size": width} | (
        {"attention_head_dim": width // small["num_attention_heads"]} if whole else {}
    )


def _at_most(limit: int, value: Any) -> Any:
    if isinstance(value, list):
        return [_at_most(limit, one) for one in value]
    return min(limit, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _inner_width(small: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """What makes heads times their size the inner width again, where it was."""
    heads, size, expansion = (
        next((n for n in names if full.get(n)), None) for names in (HEADS, HEAD_SIZES, EXPANSIONS)
    )
    if heads is None or size is None:
        return {}
    inner = full[heads] * full[size]
    if "mamba_d_ssm" in full and full["mamba_d_ssm"] == inner:
        return {"mamba_d_ssm": small[heads] * small[size]}
    if expansion is not None and inner == full[expansion] * full["hidden_size"]:
        return {
            heads: SIZES["mamba_n_heads"],
            size: int(small[expansion] * small["hidden_size"]) // SIZES["mamba_n_heads"],
        }
    return {}


def _in_proportion(made: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Widths and numbers of heads divided by one number, the size of a head as it is."""
    counted = [v for n, v in full.items() if n.endswith(("heads", "n_head")) and isinstance(v, int) and v > 1]
    part = max((p for p in (2, 4, 8, 16, 32) if all(v % p == 0 for v in counted)), default=1)
    small = {n: _at_most(SIZES[n], v) for n, v in made.items() if n in SIZES and not (WIDTHS.search(n) or "dim" in n)}
    divided = {n: v // part for n, v in made.items() if WIDTHS.search(n) and isinstance(v, int) and v % part == 0}
    return small | divided


def _of_layer(own: dict[str, Any], full: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """The settings of one layer that has its own, as large beside the others' as they were."""
    made = {}
    for name, value in own.items():
        whole, part = full.get(name), small.get(name)
        scaled = isinstance(value, int) and isinstance(whole, int) and isinstance(part, int) and name in SIZES and whole
        made[name] = max(1, part * value // whole) if scaled else _at_most(SIZES.get(name, 2**62), value)
    return made


def _few_names(named: dict[str, int]) -> dict[str, int]:
    """Tokens with names in brackets, one of those that a number of six digits tells apart, at the first places."""
    special = [name for name in named if name.startswith("<") and name.endswith(">")]
    kept = {re.sub(r"\d{6}", "#", name): name for name in reversed(special)}
    return {name: 3 + place % (VOCABULARY - 3) for place, name in enumerate(sorted(kept.values()))}
