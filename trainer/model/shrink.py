"""Makes a small copy of a model's configuration with every kind of layer; what is proven of it holds for the model.

Widths, counts and windows shrink by the names that configurations give them; factors of one product are kept
consistent. If the names do not suffice, widths and heads are divided by one number. `kept_layers.py` says which
layers stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from trainer.model.kept_layers import KeptLayers, choices, depth_of, layer_kinds

VOCABULARY = 128
WINDOW = 8
"""Tokens that a sliding window or a chunk of attention is shrunk to."""
SOFTCAP_SUFFIXES, MAX_SOFTCAP = ("softcapping", "softcap", "soft_cap"), 0.1
"""How settings end that bound scores and logits, and a bound that small random weights come near."""
PATCHING_THRESHOLD = 0.97 * math.log(VOCABULARY)
"""An entropy that what small random weights predict has in about half of all places: patches of bytes begin there."""
MAX_LAYER_CHOICES = 3
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
IMAGE_TOKENS_SETTING = "vocabulary_map"
"""The setting of tokens for images, by name: of those that differ in their number alone one is kept."""
HEADS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
HEAD_SIZES = ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
EXPANSIONS = ("mamba_expand", "expand")
"""What multiplies to the inner width of a state-space layer: heads and their sizes, or the width and this."""
WIDTHS = re.compile(r"hidden_size$|(embedding|state)_(size|dim)|(^|_)heads$|^n_heads?$|^(n_embd|d_model|dim)$")
"""Names of what is divided where heads keep their size."""


COUNTS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"),
    *("decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"),
    *("num_decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "top_k"),
    *("n_group", "topk_group", "num_expert_groups", "num_expert_group"),
)
"""Numbers of heads and of experts, by which ranks may divide a layer's work: a copy can keep them."""
MODEL_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "dim_model")
"""Names of a model's own width."""
LENGTHS_OF_HEADS = ("head_dim", "attention_head_dim", "d_kv", "v_head_dim", "kv_channels", "d_head")
"""Names of the size of a head; where a configuration has none, it is the width over the number of heads."""


class NotShrinkable(Exception):
    """A configuration of which no small copy could be made; says why."""


def small_copies(config: Any, plain: nn.Module, *, keep_counts: bool = False) -> Iterator[Any]:
    """Small copies of `config`, of which `plain` is the model on meta, the likeliest first; none is tried out.

    `keep_counts`: the first ones keep the numbers of heads and of experts (`COUNTS`). Raises NotShrinkable if not one of them
    is a configuration of its class.
    """
    # How sizes are chosen. Each is tried with several choices of layers.
    ways: list[Callable[..., Any]] = [_sizes_by_name, _sizes_in_proportion]
    if keep_counts:
        ways = [partial(_sizes_with_counts, widened=False), partial(_sizes_with_counts, widened=True), *ways]
    settings = _settings(config)
    cls = type(config)
    copies = 0
    reason = ""
    for shrink_sizes in ways:
        for choice in range(MAX_LAYER_CHOICES):
            try:
                small_config = cls.from_dict(_small_settings(settings, cls, plain, shrink_sizes, choice))
            except Exception as error:  # noqa: BLE001 - whatever a configuration class finds wrong with itself
                if not reason:
                    message = (str(error) or "no message").splitlines()[-1]
                    reason = f"{cls.__name__} takes no small sizes: {message[:120]}"
                continue
            copies += 1
            yield small_config
    if not copies:
        raise NotShrinkable(reason)


def changed_sizes(config: Any, small_config: Any) -> dict[str, tuple[Any, Any]]:
    """(full, small) value of each setting that a small copy changes, by name; without ids of tokens, and lists by layer."""
    changed: dict[str, tuple[Any, Any]] = {}
    for full, small in _nested_settings(_settings(config), _settings(small_config), type(config)):
        for name, value in full.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and small.get(name) != value and not name.endswith(("_token_id", "_token_index")):
                changed.setdefault(name, (value, small.get(name)))
    return changed


def kept_counts(config: Any, small_config: Any) -> dict[str, int]:
    """The numbers of heads and of experts that a small copy shares with `config`, by name."""
    kept: dict[str, int] = {}
    for full, small in _nested_settings(_settings(config), _settings(small_config), type(config)):
        for name in COUNTS:
            if isinstance(full.get(name), int) and full[name] == small.get(name):
                kept.setdefault(name, full[name])
    return kept


def lost_kinds(config: Any, plain: nn.Module, small_config: Any, small: nn.Module) -> int:
    """How many kinds of layers `plain` has that `small`, built of the small copy, lacks."""
    lost = 0
    for full_settings, small_settings in _nested_settings(_settings(config), _settings(small_config), type(config)):
        kinds = set(layer_kinds(plain, depth_of(full_settings)))
        small_kinds = set(layer_kinds(small, depth_of(small_settings)))
        if len(kinds) > 1 and small_kinds:
            lost += len(kinds - small_kinds)
    return lost


def _settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration object, as in `to_dict()`, but with the values of its attributes where these differ."""
    settings = config.to_dict()
    sub_configs = getattr(config, "sub_configs", None) or {}
    for name, written in settings.items():
        attribute = vars(config).get(name)  # a property may refuse to be read, as of what varies by layer
        if isinstance(written, dict) and name in sub_configs and hasattr(attribute, "to_dict"):
            settings[name] = _settings(attribute)
        elif isinstance(attribute, int | list) and type(attribute) is type(written):
            settings[name] = attribute
    return settings


def _nested_settings(
    full: dict[str, Any], small: dict[str, Any], cls: Any
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(full, small) settings of a configuration, and of each configuration in it."""
    yield full, small
    for name, inner_cls in (getattr(cls, "sub_configs", None) or {}).items():
        if isinstance(full.get(name), dict) and isinstance(small.get(name), dict):
            yield from _nested_settings(full[name], small[name], inner_cls)


def _small_settings(
    settings: dict[str, Any], cls: Any, plain: nn.Module, shrink_sizes: Callable[..., Any], choice: int
) -> dict[str, Any]:
    """The settings of a small copy of a model: fewer layers, sizes by `shrink_sizes`, and bounds and ids that fit these.

    `choice`: number of the choice of layers that is tried. Configurations within (of a text model, say) are shrunk as well.
    """
    kept_layers = _kept_layers(settings, plain, choice)
    small = dict(settings) | kept_layers.by_layer(settings)
    small |= shrink_sizes(small, settings)
    sub_configs = getattr(cls, "sub_configs", None) or {}
    for name, value in small.items():
        if isinstance(value, dict) and name in sub_configs:
            small[name] = _small_settings(settings[name], sub_configs[name], plain, shrink_sizes, choice)
        elif name.endswith(SOFTCAP_SUFFIXES) and isinstance(value, float) and value:
            small[name] = min(MAX_SOFTCAP, value)
        elif name == "patching_threshold" and isinstance(value, float):
            small[name] = PATCHING_THRESHOLD
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = min(value, 3)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, list):
            small[name] = [min(token_id, 3) for token_id in value]
        elif name == "per_layer_config":
            small[name] = {index: _layer_settings(own, settings, small) for index, own in value.items()}
        elif name == IMAGE_TOKENS_SETTING and value:
            small[name] = _few_image_tokens(value)
    small.pop("quantization_config", None)  # the copy has drawn weights, which are not quantised
    return small


def _kept_layers(settings: dict[str, Any], plain: nn.Module, choice: int) -> KeptLayers:
    candidates = list(islice(choices(plain, settings), choice + 1))
    return candidates[-1]


def _sizes_by_name(settings: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """The small size of each setting that `SIZES` names; sizes that depend on each other are adapted.

    That is: keys and values without groups keep as many heads as queries; heads times their size stays the width of attention,
    and of the inner layer of a state-space model, where it was. `settings`: to be shrunk; `full`: the model's own.
    """
    small: dict[str, Any] = {}
    heads_name = _first_set(full, ("num_attention_heads", "n_head", "n_heads"))
    heads = None if heads_name is None else full[heads_name]
    for name, value in settings.items():
        if name in ("num_key_value_heads", "num_kv_heads") and value == heads:
            small[name] = SIZES["num_attention_heads"]  # no groups
        elif name in SIZES:
            small[name] = _at_most(SIZES[name], value)
    rope = full.get("qk_rope_head_dim")
    if rope and full.get("head_dim"):  # both are the same size, or one is a share of the other
        small["head_dim"] = max(1, small["qk_rope_head_dim"] * full["head_dim"] // rope)
    return small | _attention_width(small, full) | _inner_width(settings | small, full)


def _sizes_with_counts(settings: dict[str, Any], full: dict[str, Any], *, widened: bool) -> dict[str, Any]:
    """Sizes as `_sizes_by_name` has them, with the model's own numbers of heads and of experts.

    The width becomes a whole number of heads if the size of a head follows from it, or if `widened`.
    """
    small = _sizes_by_name(settings, full)
    for name in COUNTS:
        if name in settings:
            small[name] = settings[name]
    heads_name = _first_set(full, ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"))
    width_name = _first_set(full, MODEL_WIDTHS)
    has_head_size = _first_set(full, LENGTHS_OF_HEADS) is not None
    if heads_name is None or width_name is None or (has_head_size and not widened):
        return small
    width = full[width_name]
    for name, value in settings.items():
        if SIZES.get(name) == SIZES["hidden_size"] and value == width:
            small[name] = full[heads_name] * SIZES["head_dim"]
    return small


def _first_set(settings: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of these names under which settings have something."""
    return next((name for name in names if settings.get(name)), None)


def _attention_width(small: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """The width of attention if it is not the model's: the same share of the model's width as in the full model."""
    attention_width = full.get("attention_hidden_size")
    if not attention_width or not full.get("hidden_size"):
        return {}
    width = small["hidden_size"] * attention_width // full["hidden_size"]
    sizes = {"attention_hidden_size": width}
    head_size = full.get("attention_head_dim")
    if head_size and head_size * full["num_attention_heads"] == attention_width:
        sizes["attention_head_dim"] = width // small["num_attention_heads"]
    return sizes


def _at_most(limit: int, value: Any) -> Any:
    """`value`, or each number of a list, bounded by `limit`; what is no number stays."""
    if isinstance(value, list):
        return [_at_most(limit, element) for element in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return min(limit, value)
    return value


def _inner_width(small: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a state-space layer that keep heads times their size equal to the inner width, if it was so in `full`.

    The inner width is `mamba_d_ssm`, or the hidden size times an expansion factor. Empty if neither is that product.
    """
    heads = _first_set(full, HEADS)
    head_size = _first_set(full, HEAD_SIZES)
    expansion = _first_set(full, EXPANSIONS)
    if heads is None or head_size is None:
        return {}
    inner_width = full[heads] * full[head_size]
    if "mamba_d_ssm" in full and full["mamba_d_ssm"] == inner_width:
        return {"mamba_d_ssm": small[heads] * small[head_size]}
    if expansion is not None and inner_width == full[expansion] * full["hidden_size"]:
        small_heads = SIZES["mamba_n_heads"]
        small_inner_width = int(small[expansion] * small["hidden_size"])
        return {heads: small_heads, head_size: small_inner_width // small_heads}
    return {}


def _sizes_in_proportion(settings: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Widths and numbers of heads divided by one number; the size of a head stays as it is.

    The divisor is the largest power of two up to 32 that divides all numbers of heads in `full`: 32 and 8 heads give 8.
    """
    head_counts = []
    for name, value in full.items():
        if name.endswith(("heads", "n_head")) and isinstance(value, int) and value > 1:
            head_counts.append(value)
    divisor = 1
    for candidate in (2, 4, 8, 16, 32):
        if all(heads % candidate == 0 for heads in head_counts):
            divisor = candidate
    small: dict[str, Any] = {}
    divided = {}
    for name, value in settings.items():
        is_width = WIDTHS.search(name)
        if name in SIZES and not is_width and "dim" not in name:
            small[name] = _at_most(SIZES[name], value)
        if is_width and isinstance(value, int) and value % divisor == 0:
            divided[name] = value // divisor
    return small | divided


def _layer_settings(own_settings: dict[str, Any], full: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Small settings of one layer that has its own: a size keeps its share of the common size.

    With 512 for this layer where the full model has 1024 and the small one 64, it gets 32.
    """
    shrunk = {}
    for name, value in own_settings.items():
        full_value = full.get(name)
        small_value = small.get(name)
        both_known = isinstance(full_value, int) and isinstance(small_value, int)
        if isinstance(value, int) and both_known and name in SIZES and full_value:
            shrunk[name] = max(1, small_value * value // full_value)  # type: ignore[operator]
        else:
            shrunk[name] = _at_most(SIZES.get(name, 2**62), value)
    return shrunk


def _few_image_tokens(tokens: dict[str, int]) -> dict[str, int]:
    """Tokens with names in brackets, at the first places; of those that differ in a six-digit number alone, one is kept."""
    special = [name for name in tokens if name.startswith("<") and name.endswith(">")]
    # Reversed, so that the first of each stays.
    one_of_each = {re.sub(r"\d{6}", "#", name): name for name in reversed(special)}
    return {name: 3 + place % (VOCABULARY - 3) for place, name in enumerate(sorted(one_of_each.values()))}
