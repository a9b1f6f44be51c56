"""What models need of transformers beside its public interface. Read in transformers 5.24.

tests/compat/test_transformers.py calls each of these functions, and fails for a name that moved. transformers' public interface
is what its documentation describes: the names of `transformers` itself, and methods without an underscore. What adapters need
too stands in `trainer/tuning/compat/transformers.py`; the server's part stands beside the gateway. transformers is imported
when a function is called, since composing a run must not import it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

# -- imports --------------------------------------------------------------------------------------------------------


def load_models_without_scipy() -> None:
    """Import the part of transformers that all models share, but without scipy, which makes each start of a process faster.

    `transformers.modeling_utils` imports the losses of all architectures, and those of object detection import
    `scipy.optimize`: 320 modules, 0.4 CPU seconds. They get a function that imports scipy when it is called. transformers has
    no setting for it, so `transformers.utils.is_scipy_available` is replaced during the import. Nothing changes if the part is
    loaded already.
    """
    from transformers import utils

    from strategies.imports import importing_without_gc

    if "transformers.loss.loss_utils" in sys.modules:
        return
    is_scipy_available = utils.is_scipy_available

    def say_scipy_is_missing() -> bool:
        return False

    utils.is_scipy_available = say_scipy_is_missing
    try:
        with importing_without_gc("transformers.modeling_utils", freeze=False):
            import_module("transformers.modeling_utils")
    finally:
        utils.is_scipy_available = is_scipy_available
    for module in [*sys.modules.values()]:
        # Not every entry is a module: None keeps a library from being imported.
        if getattr(module, "__dict__", {}).get("is_scipy_available") is say_scipy_is_missing:
            module.is_scipy_available = is_scipy_available  # type: ignore[attr-defined]
            # The only name that these modules import from scipy.
            module.linear_sum_assignment = _linear_sum_assignment  # type: ignore[attr-defined]


def _linear_sum_assignment(costs: Any, *args: Any, **kwargs: Any) -> Any:
    """`scipy.optimize.linear_sum_assignment`, imported at its first call."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(costs, *args, **kwargs)


# -- classes ------------------------------------------------------------------------------------------------------


def register_causal_class_of_text_config(config_class: type) -> None:
    """Let AutoModelForCausalLM know the class of a language model that was saved out of a larger one, such as Mllama's.

    transformers lists such a class under the larger model's configuration alone, so it does not find it for the saved
    directory. Nothing changes if the configuration is known, or if the architecture has no such class. May be called again.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config_class in mapping:
        return
    for model_type in _types_of_same_package(config_class, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model_class: Any = getattr(transformers, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]), None)
        if getattr(model_class, "config_class", None) is config_class:
            # Without `exist_ok`, transformers leaves out its own configurations silently.
            transformers.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)  # type: ignore[arg-type]
            return


def needs_own_class(config_class: type) -> bool:
    """Whether AutoModelForCausalLM finds a configuration's model only in this process, because it was registered here.

    Other programs then need the model's own class to load it. `config_class`: of the model's configuration.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    is_of_transformers = config_class.__module__.startswith("transformers.")
    model_type = getattr(config_class, "model_type", "")
    return is_of_transformers and config_class in mapping and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def language_model_types_of_architecture(config_class: type) -> list[str]:
    """Find larger models that contain a model as their text part, by `model_type`, so that a message can name them.

    For `Qwen3VLTextConfig`, the text part of a vision-language model: ["qwen3_vl"]. They are the other language models in the
    configuration's package of transformers.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    own_type = getattr(config_class, "model_type", "")
    return [model_type for model_type in _types_of_same_package(config_class, names) if model_type != own_type]


def _types_of_same_package(config_class: type, model_types: Iterable[str]) -> list[str]:
    """Those of the `model_type`s whose classes are in the same package of transformers as a configuration, such as `mllama`."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    package = config_class.__module__.split(".")[-2:-1]
    return [model_type for model_type in model_types if [model_type_to_module_name(model_type)] == package]


# -- writing ----------------------------------------------------------------------------------------------------


def can_generate_with_cache(causal_model: Any) -> bool:
    """Whether `generate` of a model can keep keys and states of earlier tokens, in place of reading the text for each token.

    transformers 5.24 takes the number of tokens in a cache from an attention layer. A model that asks for that number without
    an attention layer, such as Jamba with linear layers alone, ends in a ValueError. Mamba does not ask.
    """
    from transformers.cache_utils import CacheLayerMixin, DynamicCache

    if not _asks_for_length(causal_model.get_decoder().__class__):
        return True
    # What the model's cache would consist of, by its configuration; those of state-space layers are no CacheLayerMixin.
    layers = DynamicCache(config=causal_model.config.get_text_config(decoder=True)).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


@cache
def _asks_for_length(decoder_class: type) -> bool:
    """Whether a class asks its cache for the number of tokens, as its source code shows."""
    try:
        return "get_seq_length" in inspect.getsource(decoder_class)
    except (OSError, TypeError):  # code without a file
        return False


# -- attention ---------------------------------------------------------------------------------------------------


def patch_masks_of_packed_rows(
    document_of: Callable[[Tensor], Tensor | None], positions_of: Callable[[Tensor], Tensor]
) -> None:
    """Have transformers' attention masks ask `document_of` which document each position of a packed row belongs to. Idempotent.

    `document_of` takes positions `[B, T]` and returns int64 `[B, T]`, or None where nobody knows: then transformers looks for
    documents by itself. `positions_of` returns the positions of whole rows. If a model is given a slice of a row, both answer
    for the whole row, since the mask is that of the whole row. Replaces two functions of `transformers.masking_utils` for the
    life of the process.

    Why: `find_packed_sequence_indices` compares positions and reads on the host whether there are several documents. So every
    forward pass would wait for the GPU, and a model on the meta device would fail. A mask cannot be handed over instead: it
    would reach one kind of layer at most, and chunks of Llama 4 would not be counted from where a document begins.
    """
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    if getattr(find, "asks_document_of", None) is document_of:  # patched already
        return

    @wraps(find)
    def known_documents(position_ids: Tensor) -> Tensor | None:
        documents = document_of(position_ids)
        return find(position_ids) if documents is None else documents

    remap = masking_utils.remap_positions_for_packed_sequence

    @wraps(remap)
    def remap_row_positions(mask_function: Callable[..., Any], position_ids: Tensor) -> Callable[..., Any]:
        """`remap`, which counts distances by positions in a document, with the positions of the whole row."""
        return remap(mask_function, positions_of(position_ids))

    known_documents.asks_document_of = document_of  # type: ignore[attr-defined]
    masking_utils.find_packed_sequence_indices = known_documents
    masking_utils.remap_positions_for_packed_sequence = remap_row_positions


def attention_of(hf_config: Any) -> str:
    """The name of the attention that a model computes with, by its configuration's `_attn_implementation`.

    transformers has a public method that sets the name, and none that tells it.
    """
    return str(hf_config._attn_implementation)


@contextmanager
def temporary_attention(hf_config: Any, name: str) -> Iterator[None]:
    """Within it, the model of the configuration `hf_config` computes with the attention `name`; afterwards as before.

    Sets `_attn_implementation`. The public `set_attn_implementation` refuses SDPA for classes that do not declare it. Some of
    these train and write here, such as Mamba and xLSTM, where the name decides nothing.
    """
    before = hf_config._attn_implementation
    hf_config._attn_implementation = name
    try:
        yield
    finally:
        hf_config._attn_implementation = before


def declares_flex_attention(model: Any) -> bool:
    """Whether an architecture says that flex attention computes it, by `PreTrainedModel._supports_flex_attn`.

    The public way is to build the model with `attn_implementation="flex_attention"` and to catch what it raises.
    """
    return bool(getattr(model, "_supports_flex_attn", False))


# -- kernels and experts -----------------------------------------------------------------------------------------


@contextmanager
def without_kernel_packages() -> Iterator[None]:
    """Within it transformers computes with torch alone, as a model on a CPU needs it where kernel packages are installed.

    Replaces `transformers.integrations.hub_kernels.is_torchdynamo_exporting`. transformers chooses the kernels of a package when
    a modelling file is imported, and then takes them for tensors on CPUs too, where they fail. It leaves them out only while a
    model is being exported, which it asks at each call.
    """
    from transformers.integrations import hub_kernels

    is_exporting = hub_kernels.is_torchdynamo_exporting
    hub_kernels.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        hub_kernels.is_torchdynamo_exporting = is_exporting


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Make a function that computes experts known under `name`, the value of `experts_implementation`. Idempotent.

    Uses `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`: unlike `AttentionInterface`, the interface of experts is not
    exported.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def grouped_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the `chosen [T, k]` experts make of `hidden [T, H]`, weighted by `weights [T, k]`: `[T, H]`.

    Calls `transformers.integrations.moe.grouped_mm_experts_forward`, the function behind
    `experts_implementation="grouped_mm"`. The setting is public, the function that a setting of ours falls back on is not.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(experts, hidden, chosen, weights)  # type: ignore[no-any-return]


def output_recorders(module: nn.Module, kind: str) -> list[Any] | None:
    """The declarations (`OutputRecorder`) by which a model says which modules' outputs are of `kind`, such as "router_logits".

    [] if it declares none. None for a module that is no whole model, and so says nothing.

    Uses `PreTrainedModel._can_record_outputs` and `transformers.utils.output_capturing.OutputRecorder`. The public
    `output_router_logits=True` keeps the logits of every layer, and adds a loss of its own to the model's.
    """
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import OutputRecorder

    if not isinstance(module, PreTrainedModel):
        return None
    recorders = (module._can_record_outputs or {}).get(kind, [])
    recorders = recorders if isinstance(recorders, list) else [recorders]
    return [recorder for recorder in recorders if isinstance(recorder, OutputRecorder)]


# -- loading -----------------------------------------------------------------------------------------------------


def zeroes_loaded_embedding(model: Any, row: int) -> bool:
    """Whether an architecture, whenever it is loaded, sets `row` of its token embeddings to zero: training it would be lost.

    Calls `PreTrainedModel._init_weights` on a small embedding of ones that is marked `_is_hf_initialized`, as the loader marks
    weights that it read. The public way is to load the model from files and look.
    """
    with torch.device("cpu"), torch.no_grad():
        probe = nn.Embedding(row + 1, 1, padding_idx=row)
        probe.weight.fill_(1.0)
        probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(probe)
    return float(probe.weight.detach()[row]) == 0.0


def names_kept_in_float32(model: nn.Module) -> set[str]:
    """Parts of the names of modules that an architecture keeps in float32, by `PreTrainedModel._keep_in_fp32_modules`.

    The loader and its quantisers read this attribute, and nothing public tells it.
    """
    return {part for module in model.modules() for part in getattr(module, "_keep_in_fp32_modules", None) or ()}


def ignored_in_checkpoints(model: Any) -> list[str]:
    """Regular expressions of stored names that an architecture ignores on purpose.

    By `PreTrainedModel._keys_to_ignore_on_load_unexpected`, which the loader reads and nothing public tells.
    """
    return list(model._keys_to_ignore_on_load_unexpected or ())


def ignore_in_checkpoints(model: Any, patterns: set[str]) -> None:
    """Let a model ignore stored tensors whose names match one of `patterns`; see `ignored_in_checkpoints`."""
    model._keys_to_ignore_on_load_unexpected = patterns


# -- the rules between a checkpoint and a model ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConversionRules:
    """transformers' rules by which stored tensors become parameters, in the order in which they apply.

    The objects are transformers' own, and note when they are used. They come from
    `transformers.conversion_mapping.get_model_conversion_mapping` and are applied by the functions with which
    `from_pretrained` and `save_pretrained` apply them (`transformers.core_model_loading`). These two are the public way; they
    read and write whole models, where a rank needs the rows of a few tensors.
    """

    renamings: list[Any]
    """`WeightRenaming`s: names alone change."""
    converters: list[Any]
    """`WeightConverter`s: tensors are joined, parted or turned."""
    all: list[Any]
    """Both kinds, in the order in which they apply."""

    def converter_by_pattern(self) -> dict[str, Any]:
        """The converter that each pattern of source names belongs to."""
        return {pattern: converter for converter in self.converters for pattern in converter.source_patterns}

    def name_in_model(self, stored_name: str, state: Mapping[str, Tensor], prefix: str) -> tuple[str, str | None]:
        """The parameter that a stored tensor belongs to, and the pattern of the converter that takes it (None: only renamed).

        `state`: the model's tensors by name. `prefix` ("model", a `base_model_prefix`): checkpoints have it or not, so it is
        added or removed where that gives a name of `state`.
        """
        from transformers.core_model_loading import rename_source_key

        # Declared as a dict, and only asked which names it has.
        names = cast("dict[str, Tensor]", state)
        name, pattern = rename_source_key(stored_name, self.renamings, self.converters, prefix, names)
        return name, pattern

    def converted_name(self, name: str) -> tuple[str, str | None]:
        """The name under which a converter files the tensor `name`, and the pattern that took it (None: no converter does)."""
        from transformers.core_model_loading import apply_converters

        converted, pattern = apply_converters(name, self.converters)
        return converted, pattern

    def renamed(self, name: str) -> str:
        """The name after every renaming."""
        from transformers.core_model_loading import apply_renamings

        return str(apply_renamings(name, self.renamings))

    def reversed(self) -> ConversionRules:
        """The rules for the way from the model to the files, of those rules that were used on the way in."""
        return _by_kind([rule.reverse_transform() for rule in reversed(self.all) if rule.was_used()])


NO_RULES = ConversionRules([], [], [])
"""Names stay as they are, but for the model's prefix."""


def conversion_rules(model: Any, quantizer: Any) -> ConversionRules:
    """The rules of an architecture, and of the quantizer that reads its blocks of few bits (None: numbers are stored)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return _by_kind(get_model_conversion_mapping(model, hf_quantizer=quantizer))


def _by_kind(rules: list[Any]) -> ConversionRules:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    return ConversionRules(
        renamings=[rule for rule in rules if isinstance(rule, WeightRenaming)],
        converters=[rule for rule in rules if isinstance(rule, WeightConverter)],
        all=rules,
    )


def in_loading_order(names: Iterable[str]) -> list[str]:
    """Names as the loader sorts them, so that tensors are joined in its order: layer 2 comes before layer 10.

    Uses `transformers.core_model_loading.dot_natural_key`.
    """
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def stacking_dimension(operation: Any) -> int | None:
    """The dimension along which a converter's operation makes one tensor of a list; None for an operation that does not.

    Knows `transformers.core_model_loading.MergeModulelist`.
    """
    from transformers.core_model_loading import MergeModulelist

    return operation.dim if isinstance(operation, MergeModulelist) else None


def keeps_rows_apart(operation: Any, dimensions: int) -> bool:
    """Whether row i of what a converter's operation makes depends on row i of its sources alone: rows can be read one by one.

    `dimensions`: number of dimensions of the tensors. Knows `Concatenate`, `Interleave` and `Transpose` of
    `transformers.core_model_loading`; any other operation may mix rows.
    """
    from transformers.core_model_loading import Concatenate, Interleave, Transpose

    if isinstance(operation, Concatenate | Interleave):
        # The dimension may be negative; rows stay apart if it is not dimension 0.
        return bool(operation.dim % dimensions != 0)
    if isinstance(operation, Transpose):
        return not operation.check_dims and operation.dim0 % dimensions != 0 and operation.dim1 % dimensions != 0
    return False


def quantisation_settings(fields: dict[str, Any]) -> Any:
    """transformers' object for a checkpoint's `quantization_config`. Raises what its class raises for fields it does not take.

    Uses `transformers.quantizers.auto.AutoQuantizationConfig`, which alone knows every kind of settings.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(fields)


def dequantizing_quantizer(settings: Any) -> Any:
    """The quantizer that reads a published checkpoint in few bits, by `transformers.quantizers.auto.AutoHfQuantizer`.

    Its rules are asked for in `conversion_rules`. The public way to use it is to load the whole model.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    return AutoHfQuantizer.from_config(settings, pre_quantized=True)


def flash_attention_function() -> Callable[..., tuple[Tensor, Any]]:
    """transformers' own attention by FlashAttention 2, as its interface registers it; needs the package only when called."""
    from transformers.integrations.flash_attention import flash_attention_forward

    return flash_attention_forward
