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

from trainer.model.kept_layers import KeptLayers, layer_choices, layer_kinds, num_layers_of

SMALL_VOCABULARY_SIZE = 128
SMALL_WINDOW_TOKENS = 8
"""Tokens that a sliding window or a chunk of attention is shrunk to."""
SOFTCAP_SUFFIXES = ("softcapping", "softcap", "soft_cap")
"""How the names of settings end that bound scores and logits."""
MAX_SOFTCAP = 0.1
"""A bound that the scores of small random weights come near, so that its effect is seen."""
MAX_SPECIAL_TOKEN_ID = 3
"""Ids of special tokens (padding, begin, end) are at most this in a small copy, whose vocabulary has `SMALL_VOCABULARY_SIZE`
entries."""
PATCHING_THRESHOLD = 0.97 * math.log(SMALL_VOCABULARY_SIZE)
"""For models of patches of bytes (BLT), where a patch begins if the predicted entropy is above this: about half of all positions
with small random weights."""
MAX_LAYER_CHOICES = 3
"""How many choices of layers are tried at most (`kept_layers.py`)."""

MAX_SIZE_BY_SETTING: dict[str, int] = {
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
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), SMALL_VOCABULARY_SIZE
    ),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "ngram_vocab_size_base"), SMALL_VOCABULARY_SIZE),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), SMALL_VOCABULARY_SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "seq_length"), 256),
    **dict.fromkeys(("context_length", "max_seq_len", "model_max_length", "max_source_positions"), 256),
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "sliding_window_size", "attention_chunk_size"), SMALL_WINDOW_TOKENS
    ),
    **dict.fromkeys(
        ("window_size", "local_attention", "local_attention_window_len", "index_topk"), SMALL_WINDOW_TOKENS
    ),
    **dict.fromkeys(
        ("chunk_size", "mamba_chunk_size", "rel_extent", "index_block_size", "indexer_budget"), SMALL_WINDOW_TOKENS
    ),
    **dict.fromkeys(("indexer_compress_ratio", "split_ngram_parts"), 2),
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), SMALL_WINDOW_TOKENS),
    **dict.fromkeys(("base_channels", "codebook_size"), 32),
}
"""What a size becomes at most, by the name of its setting; positions and windows too where what begins with them would be
longer than the documents."""
IMAGE_TOKENS_SETTING = "vocabulary_map"
"""The setting of tokens for images, by name: of those that differ in their number alone one is kept."""
STATE_SPACE_HEAD_COUNT_SETTINGS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
STATE_SPACE_HEAD_SIZE_SETTINGS = ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
STATE_SPACE_EXPANSION_SETTINGS = ("mamba_expand", "expand")
"""The inner width of a state-space layer is the number of its heads times their size, or the model's width times this factor."""
QUERY_HEAD_COUNT_SETTINGS = ("num_attention_heads", "n_head", "n_heads")
WIDTH_OR_HEADS_REGEX = re.compile(
    r"hidden_size$|(embedding|state)_(size|dim)|(^|_)heads$|^n_heads?$|^(n_embd|d_model|dim)$"
)
"""Names of widths and of numbers of heads, all divided by one number where heads keep their size: `hidden_size`, `n_heads`."""


HEAD_AND_EXPERT_COUNT_SETTINGS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"),
    *("decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"),
    *("num_decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "top_k"),
    *("n_group", "topk_group", "num_expert_groups", "num_expert_group"),
)
"""Numbers of heads and of experts, by which ranks may divide a layer's work: a copy can keep them."""
MODEL_WIDTH_SETTINGS = ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "dim_model")
"""Names of a model's own width."""
HEAD_SIZE_SETTINGS = ("head_dim", "attention_head_dim", "d_kv", "v_head_dim", "kv_channels", "d_head")
"""Names of the size of a head; where a configuration has none, it is the width over the number of heads."""


class NotShrinkable(Exception):
    """A configuration of which no small copy could be made; says why."""


def small_copies(hf_config: Any, full_model: nn.Module, *, keep_counts: bool = False) -> Iterator[Any]:
    """Yield configurations of small copies of a model, on which it can be tested in a moment; the likeliest to work first.

    A copy keeps every kind of layer of the model. There is one for each way to shrink sizes and each choice of layers, without
    those that the configuration's class refuses. None is tried out here: callers build one after the other until one runs.

    `full_model`: the model of `hf_config`, on meta. `keep_counts`: try first to keep the numbers of heads and experts, by which
    ranks divide a layer's work. Raises NotShrinkable, with the first refusal, if the class refuses all of them.
    """
    # Each takes (settings to shrink, settings of the full model), and returns the small sizes by setting.
    shrink_functions: list[Callable[..., Any]] = [_sizes_by_name, _sizes_in_proportion]
    if keep_counts:
        with_counts = [
            partial(_sizes_with_counts, scales_width=False),
            partial(_sizes_with_counts, scales_width=True),
        ]
        shrink_functions = [*with_counts, *shrink_functions]
    settings = _settings_of(hf_config)
    config_class = type(hf_config)
    num_copies = 0
    first_refusal = ""
    for shrink_sizes in shrink_functions:
        for layer_choice in range(MAX_LAYER_CHOICES):
            try:
                small_settings = _small_settings(settings, config_class, full_model, shrink_sizes, layer_choice)
                small_config = config_class.from_dict(small_settings)
            except Exception as error:  # noqa: BLE001 - whatever a configuration class finds wrong with itself
                if not first_refusal:
                    message = (str(error) or "no message").splitlines()[-1]
                    first_refusal = f"{config_class.__name__} takes no small sizes: {message[:120]}"
                continue
            num_copies += 1
            yield small_config
    if num_copies == 0:
        raise NotShrinkable(first_refusal)


def changed_sizes(hf_config: Any, small_config: Any) -> dict[str, tuple[Any, Any]]:
    """Which sizes a small copy changes, for a report: {"hidden_size": (4096, 64)}, the model's value and the copy's.

    Ids of special tokens, and values that are no numbers, are left out. Settings of configurations within this one are
    included; of equal names the outer counts.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for full_settings, small_settings in _nested_settings(
        _settings_of(hf_config), _settings_of(small_config), type(hf_config)
    ):
        for name, value in full_settings.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and small_settings.get(name) != value and not name.endswith(("_token_id", "_token_index")):
                changed.setdefault(name, (value, small_settings.get(name)))
    return changed


def kept_counts(hf_config: Any, small_config: Any) -> dict[str, int]:
    """Which numbers of heads and experts a small copy keeps, for a report: {"num_attention_heads": 32}."""
    kept: dict[str, int] = {}
    for full_settings, small_settings in _nested_settings(
        _settings_of(hf_config), _settings_of(small_config), type(hf_config)
    ):
        for name in HEAD_AND_EXPERT_COUNT_SETTINGS:
            if isinstance(full_settings.get(name), int) and full_settings[name] == small_settings.get(name):
                kept.setdefault(name, full_settings[name])
    return kept


def refuse_unfit_copy(
    hf_config: Any, full_model: nn.Module, small_config: Any, small_model: nn.Module, *, max_parameters: int
) -> None:
    """Raise NotShrinkable if a small copy would prove nothing: too large to run, or without a kind of layer that the model has.

    Layers of one kind consist of the same modules. `full_model` (of `hf_config`) and `small_model` (of `small_config`) are on
    meta. `max_parameters`: elements that the copy may have.
    """
    num_parameters = sum(parameter.numel() for parameter in small_model.parameters())
    if num_parameters > max_parameters:
        raise NotShrinkable(f"a small copy would have {num_parameters:,} elements")
    num_lost = 0
    all_settings = _nested_settings(_settings_of(hf_config), _settings_of(small_config), type(hf_config))
    for full_settings, small_settings in all_settings:
        kinds = set(layer_kinds(full_model, num_layers_of(full_settings)))
        small_kinds = set(layer_kinds(small_model, num_layers_of(small_settings)))
        # A model with one kind of layer cannot lose it; `small_kinds` is empty where no list of layers was recognised.
        if len(kinds) > 1 and small_kinds:
            num_lost += len(kinds - small_kinds)
    if num_lost:
        raise NotShrinkable(f"a small copy lacks {num_lost} of its kinds of layers")


def _settings_of(hf_config: Any) -> dict[str, Any]:
    """The settings of a configuration object by name: those of `to_dict()`, with numbers and lists as its attributes have them.

    `to_dict()` of some classes writes other values. Configurations within it (a text model's, say) become dictionaries in the
    same way.
    """
    settings = hf_config.to_dict()
    sub_configs = getattr(hf_config, "sub_configs", None) or {}
    for name, dict_value in settings.items():
        attribute = vars(hf_config).get(name)  # not getattr: a property may raise, as for a value that varies by layer
        if isinstance(dict_value, dict) and name in sub_configs and hasattr(attribute, "to_dict"):
            settings[name] = _settings_of(attribute)
        elif isinstance(attribute, int | list) and type(attribute) is type(dict_value):
            settings[name] = attribute
    return settings


def _nested_settings(
    full_settings: dict[str, Any], small_settings: dict[str, Any], config_class: Any
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (full, small) settings of a configuration, and then of each configuration within it, at any depth."""
    yield full_settings, small_settings
    sub_configs = getattr(config_class, "sub_configs", None) or {}
    for name, inner_class in sub_configs.items():
        if isinstance(full_settings.get(name), dict) and isinstance(small_settings.get(name), dict):
            yield from _nested_settings(full_settings[name], small_settings[name], inner_class)


def _small_settings(
    settings: dict[str, Any],
    config_class: Any,
    full_model: nn.Module,
    shrink_sizes: Callable[..., Any],
    layer_choice: int,
) -> dict[str, Any]:
    """The settings of a small copy of a model, made from `settings` (those of the full one) in three steps:

    1. Fewer layers: the choice number `layer_choice` of those that keep every kind of layer of `full_model` (on meta).
    2. Smaller sizes, by `shrink_sizes(settings to shrink, full settings)`, which returns the sizes that change.
    3. Settings that must fit these, such as ids of special tokens in a small vocabulary.

    Configurations within this one (of a text model, say; `config_class.sub_configs`) are shrunk in the same way.
    """
    kept_layers = _kept_layers(settings, full_model, layer_choice)
    small_settings = dict(settings) | kept_layers.settings_of_kept_layers(settings)
    small_settings |= shrink_sizes(small_settings, settings)
    sub_configs = getattr(config_class, "sub_configs", None) or {}
    for name, value in small_settings.items():
        if isinstance(value, dict) and name in sub_configs:
            small_settings[name] = _small_settings(
                settings[name], sub_configs[name], full_model, shrink_sizes, layer_choice
            )
        else:
            small_settings[name] = _fitted_setting(name, value, full_settings=settings, small_settings=small_settings)
    small_settings.pop("quantization_config", None)  # the copy has drawn weights, which are not quantised
    return small_settings


def _fitted_setting(name: str, value: Any, *, full_settings: dict[str, Any], small_settings: dict[str, Any]) -> Any:
    """Adapt one setting of a small copy, whose weights are random and whose vocabulary is small; most are returned as they are.

    `full_settings`, `small_settings`: of the full and of the small model, the latter already shrunk.
    """
    # Scores and entropies of small random weights would not reach the bounds of a trained model, nor show their effect.
    if name.endswith(SOFTCAP_SUFFIXES) and isinstance(value, float) and value:
        return min(MAX_SOFTCAP, value)
    if name == "patching_threshold" and isinstance(value, float):
        return PATCHING_THRESHOLD
    # The vocabulary is small.
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
        return min(value, MAX_SPECIAL_TOKEN_ID)
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, list):
        return [min(token_id, MAX_SPECIAL_TOKEN_ID) for token_id in value]
    if name == IMAGE_TOKENS_SETTING and value:
        return _small_ids_of_special_tokens(value)
    if name == "per_layer_config":
        small_by_layer = {}
        for index, layer_settings in value.items():
            small_by_layer[index] = _small_layer_settings(layer_settings, full_settings, small_settings)
        return small_by_layer
    return value


def _kept_layers(settings: dict[str, Any], full_model: nn.Module, layer_choice: int) -> KeptLayers:
    """The choice number `layer_choice` of layers to keep, counted from 0; the last one if there are fewer choices."""
    candidates = list(islice(layer_choices(full_model, settings), layer_choice + 1))
    return candidates[-1]


def _sizes_by_name(settings: dict[str, Any], full_settings: dict[str, Any]) -> dict[str, Any]:
    """The small size of each setting that `MAX_SIZE_BY_SETTING` names, such as {"hidden_size": 64, "num_attention_heads": 4}.

    Sizes that depend on each other stay consistent:

    - without grouped-query attention, keys and values still have as many heads as queries.
    - the size of a head keeps its ratio to the part of it that is rotated by position.
    - if the width of attention or of a state-space layer is heads times their size in `full_settings`, it is so in the copy.

    `settings`: to be shrunk, already with fewer layers. `full_settings`: the model's own.
    """
    small_settings: dict[str, Any] = {}
    heads_name = _first_set(full_settings, QUERY_HEAD_COUNT_SETTINGS)
    num_query_heads = None if heads_name is None else full_settings[heads_name]
    for name, value in settings.items():
        if name in ("num_key_value_heads", "num_kv_heads") and value == num_query_heads:
            small_settings[name] = MAX_SIZE_BY_SETTING["num_attention_heads"]
        elif name in MAX_SIZE_BY_SETTING:
            small_settings[name] = _at_most(MAX_SIZE_BY_SETTING[name], value)
    rotated_size = full_settings.get("qk_rope_head_dim")
    if rotated_size and full_settings.get("head_dim"):  # both are the same size, or one is a share of the other
        small_settings["head_dim"] = max(
            1, small_settings["qk_rope_head_dim"] * full_settings["head_dim"] // rotated_size
        )
    return (
        small_settings
        | _attention_width_sizes(small_settings, full_settings)
        | _inner_width_sizes(settings | small_settings, full_settings)
    )


def _sizes_with_counts(
    settings: dict[str, Any], full_settings: dict[str, Any], *, scales_width: bool
) -> dict[str, Any]:
    """Small sizes by setting with the model's own numbers of heads and experts, so that ranks divide the copy like the model.

    Where the size of a head is not a setting, it is the model's width over its heads. Then the width, and every setting equal
    to it, becomes heads times 16. `scales_width`: do so in any case.

    `settings`: to be shrunk, already with fewer layers. `full_settings`: the model's own.
    """
    small_settings = _sizes_by_name(settings, full_settings)
    for name in HEAD_AND_EXPERT_COUNT_SETTINGS:
        if name in settings:
            small_settings[name] = settings[name]
    heads_name = _first_set(full_settings, (*QUERY_HEAD_COUNT_SETTINGS, "decoder_attention_heads", "num_heads"))
    width_name = _first_set(full_settings, MODEL_WIDTH_SETTINGS)
    has_head_size = _first_set(full_settings, HEAD_SIZE_SETTINGS) is not None
    if heads_name is None or width_name is None or (has_head_size and not scales_width):
        return small_settings
    width = full_settings[width_name]
    small_width = full_settings[heads_name] * MAX_SIZE_BY_SETTING["head_dim"]
    for name, value in settings.items():
        # Settings of widths are those that shrink to what `hidden_size` shrinks to.
        is_width = MAX_SIZE_BY_SETTING.get(name) == MAX_SIZE_BY_SETTING["hidden_size"]
        if is_width and value == width:
            small_settings[name] = small_width
    return small_settings


def _first_set(settings: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of these names whose value in `settings` is set and not 0; None if there is no such name."""
    return next((name for name in names if settings.get(name)), None)


def _attention_width_sizes(small_settings: dict[str, Any], full_settings: dict[str, Any]) -> dict[str, Any]:
    """Small sizes for an attention with a width of its own (RWKV, Zamba), which keeps its ratio to the model's width.

    The size of a head follows, if in `full_settings` heads times their size is this width. Empty if `full_settings`, the
    settings of the model, has no such width. `small_settings`: the settings that are already shrunk.
    """
    attention_width = full_settings.get("attention_hidden_size")
    if not attention_width or not full_settings.get("hidden_size"):
        return {}
    width = small_settings["hidden_size"] * attention_width // full_settings["hidden_size"]
    sizes = {"attention_hidden_size": width}
    head_size = full_settings.get("attention_head_dim")
    if head_size and head_size * full_settings["num_attention_heads"] == attention_width:
        sizes["attention_head_dim"] = width // small_settings["num_attention_heads"]
    return sizes


def _at_most(limit: int, value: Any) -> Any:
    """`value`, or each number of a list, or of lists within it, bounded by `limit`. Other values (texts, flags, floats) stay."""
    if isinstance(value, list):
        return [_at_most(limit, element) for element in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return min(limit, value)
    return value


def _inner_width_sizes(small_settings: dict[str, Any], full_settings: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a state-space (Mamba) layer whose heads times head size stay equal to the layer's inner width.

    The inner width is the setting `mamba_d_ssm`, which then follows heads and size. Or it is the hidden size times an expansion
    factor: then heads are set to 8, and their size follows. Empty if the model has no such layer, or the product is neither.

    `full_settings`: settings of the model. `small_settings`: those of its copy, each shrunk by itself.
    """
    heads_name = _first_set(full_settings, STATE_SPACE_HEAD_COUNT_SETTINGS)
    head_size_name = _first_set(full_settings, STATE_SPACE_HEAD_SIZE_SETTINGS)
    expansion_name = _first_set(full_settings, STATE_SPACE_EXPANSION_SETTINGS)
    if heads_name is None or head_size_name is None:
        return {}
    inner_width = full_settings[heads_name] * full_settings[head_size_name]
    if "mamba_d_ssm" in full_settings and full_settings["mamba_d_ssm"] == inner_width:
        return {"mamba_d_ssm": small_settings[heads_name] * small_settings[head_size_name]}
    if expansion_name is not None and inner_width == full_settings[expansion_name] * full_settings["hidden_size"]:
        num_small_heads = MAX_SIZE_BY_SETTING["mamba_n_heads"]
        small_inner_width = int(small_settings[expansion_name] * small_settings["hidden_size"])
        return {heads_name: num_small_heads, head_size_name: small_inner_width // num_small_heads}
    return {}


def _sizes_in_proportion(settings: dict[str, Any], full_settings: dict[str, Any]) -> dict[str, Any]:
    """Small sizes by dividing widths and numbers of heads by one number, for models whose setting names do not suffice.

    The size of a head then stays as it is. The divisor is the largest power of two up to 32 that divides all numbers of heads
    in `full_settings`, the settings of the model: for 32 and 8 heads 8.

    `settings`: to be shrunk, already with fewer layers.
    """
    head_counts = []
    for name, value in full_settings.items():
        if name.endswith(("heads", "n_head")) and isinstance(value, int) and value > 1:
            head_counts.append(value)
    divisor = 1
    for candidate in (2, 4, 8, 16, 32):
        if all(heads % candidate == 0 for heads in head_counts):
            divisor = candidate
    small_settings: dict[str, Any] = {}
    divided = {}
    for name, value in settings.items():
        is_width_or_heads = WIDTH_OR_HEADS_REGEX.search(name)
        may_be_head_size = "dim" in name  # such as `head_dim`, which stays as it is
        if name in MAX_SIZE_BY_SETTING and not is_width_or_heads and not may_be_head_size:
            small_settings[name] = _at_most(MAX_SIZE_BY_SETTING[name], value)
        if is_width_or_heads and isinstance(value, int) and value % divisor == 0:
            divided[name] = value // divisor
    return small_settings | divided


def _small_layer_settings(
    layer_settings: dict[str, Any], full_settings: dict[str, Any], small_settings: dict[str, Any]
) -> dict[str, Any]:
    """Shrink the settings that one layer has of its own (an entry of `per_layer_config`):

    - a size that the whole model has too: keeps its ratio to it. A layer's 512 in a model of 1024 that shrinks to 64 becomes
      32.
    - another value: at most what `MAX_SIZE_BY_SETTING` has for its name, or unchanged.

    `full_settings`, `small_settings`: of the full and of the small model.
    """
    small_layer_settings = {}
    for name, value in layer_settings.items():
        full_size = full_settings.get(name)
        small_size = small_settings.get(name)
        is_size_of_both = name in MAX_SIZE_BY_SETTING and isinstance(full_size, int) and isinstance(small_size, int)
        if isinstance(value, int) and is_size_of_both and full_size:
            small_layer_settings[name] = max(1, small_size * value // full_size)  # type: ignore[operator]
        elif name in MAX_SIZE_BY_SETTING:
            small_layer_settings[name] = _at_most(MAX_SIZE_BY_SETTING[name], value)
        else:
            small_layer_settings[name] = value
    return small_layer_settings


def _small_ids_of_special_tokens(token_ids: dict[str, int]) -> dict[str, int]:
    """New ids in the small vocabulary for the special tokens among `token_ids` ({token: id}).

    Such as {"<image 000000>": 3, "<image>": 4}. Special tokens stand in angle brackets; the others are dropped. Of those that
    differ only in a six-digit number, as the codes of an image do, the first is kept.
    """
    special_tokens = [token for token in token_ids if token.startswith("<") and token.endswith(">")]
    # Reversed, so that the first of each pattern overwrites the others.
    token_by_pattern = {re.sub(r"\d{6}", "#", token): token for token in reversed(special_tokens)}
    kept_tokens = sorted(token_by_pattern.values())
    # From the largest id of the other special tokens on. Should there be more tokens than ids, some share one.
    num_ids = SMALL_VOCABULARY_SIZE - MAX_SPECIAL_TOKEN_ID
    return {token: MAX_SPECIAL_TOKEN_ID + position % num_ids for position, token in enumerate(kept_tokens)}
