"""The plain architecture before anything is tuned: its class, dropout, head, vocabulary and names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from strategies.compat.modules import own_parameters
from strategies.errors import ConfigError
from trainer.model import experts
from trainer.model.compat import (
    ignore_in_checkpoints,
    language_model_types_of_architecture,
    register_causal_class_of_text_config,
)
from trainer.model.config import Attention, ModelConfig, ModelKind
from trainer.model.rope import require_rotary_parameters_in_use
from trainer.tuning.compat.transformers import block_class_names

DROPOUT_NAME_REGEX = re.compile(r"dropout|_pdrop$")
"""What the names of dropout probabilities have in common, such as `attention_dropout` and `attn_pdrop`."""
RANDOM_SETTING_NAME_REGEX = re.compile(r"layerdrop|input_jitter")
"""Names of settings that leave out whole layers, or disturb them, at random. Ranks would draw different layers: sharding
strategies would hang, or their results differ."""

KEY_SELECTOR_CLASSES = frozenset({"Qwen4ExpTextQSAIndexer"})
"""Classes of modules that choose keys, so that no gradient reaches them, and call their parts as often as a document's tokens
ask: gathered for each such call, ranks would wait for each other for ever."""
REASON_BY_UNTRAINABLE_TYPE = {"reformer": "trains only on rows of a fixed length, a multiple of its chunks"}
"""Why models of a `model_type` are not trained, where nothing else finds it out before the first step."""
TEXT_ONLY_MODEL_TYPES = frozenset({"llama4"})
"""Models that see, of which only the text model can be built: in transformers 5.24 the whole one fails on texts."""


WIDTH_OF_8B = 4096
"""Width of a usual model of 8B, taken for a model whose configuration names none: the crossover is an estimate anyway."""


class EarlierSetting(NamedTuple):
    """The value that a setting of a transformers configuration had before it was changed."""

    owner: Any
    """The configuration that has it: a model's, or that of a part of it."""
    name: str
    value: float


class PlainModel(NamedTuple):
    """A model as transformers builds it, not tuned."""

    model: Any
    attention: str
    """transformers' name of the attention that it got: the one that was asked for, or `eager` if its class has no SDPA."""


def build_plain_model(
    kind: ModelKind, hf_config: Any, config: ModelConfig, attention: str, objective: str
) -> PlainModel:
    """Build a model as transformers builds it, with the run's dropout; adapters and the like come later.

    `kind`: causal model, classifier or encoder-decoder. `hf_config`: transformers' configuration; its dropout settings have the
    base's own values again afterwards. `config`: the settings `model.*`. `attention`: transformers' name of the kernel to use.
    `objective`: its name, for messages.

    Raises ConfigError if the model cannot be trained here, has no class of this kind, or cannot be built.
    """
    reason_unfit = REASON_BY_UNTRAINABLE_TYPE.get(hf_config.model_type)
    if reason_unfit is not None:
        raise ConfigError(
            f"model.path={config.path}: a {hf_config.model_type} {reason_unfit}, and cannot be trained here; take a "
            "model of another architecture (docs/models.md lists those that train)"
        )
    _raise_if_no_model_class(kind, hf_config, config, objective)
    try:
        with _dropout_while_building(hf_config, config.dropout):
            plain_model = _build_with_attention(kind, hf_config, config, attention)
    # A class fails in its own way over a configuration that it does not know: a rope type, an activation, a missing part.
    except (ValueError, ImportError, AttributeError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        reason = str(error).partition("\nModel type should be one of")[0]  # hundreds of names follow
        if isinstance(error, LookupError):
            reason = f"its config.json names {reason}, which this transformers does not know"
        raise ConfigError(
            f"model.path={config.path}: a {hf_config.model_type} model cannot be built for objective="
            f"{objective} with attention {attention}: {' '.join(reason.split())[:300]}"
        ) from error
    require_rotary_parameters_in_use(plain_model.model, config)
    return plain_model


@contextmanager
def _dropout_while_building(hf_config: Any, probability: float) -> Iterator[None]:
    """Within it, every dropout probability in `hf_config` is `probability`; then the base's values are back, also after an error.

    Layers read the settings when they are built, and an export keeps the base's values.
    """
    earlier_settings = set_dropout(hf_config, probability)
    try:
        yield
    finally:
        for setting in earlier_settings:
            setattr(setting.owner, setting.name, setting.value)


def transformers_class(kind: ModelKind, hf_config: Any) -> Any:
    """Choose transformers' auto class (AutoModelForCausalLM, say) that builds a model of this kind for a configuration.

    A model that also reads images or sound is built whole, since its checkpoint is of the whole.
    """
    import transformers

    class_name_by_kind = {
        ModelKind.causal: "AutoModelForCausalLM",
        ModelKind.classifier: "AutoModelForSequenceClassification",
        ModelKind.encoder_decoder: "AutoModelForSeq2SeqLM",
    }
    is_multimodal = (
        type(hf_config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
        and hf_config.model_type not in TEXT_ONLY_MODEL_TYPES
    )
    if kind is ModelKind.causal and is_multimodal:
        return transformers.AutoModelForMultimodalLM
    if kind is ModelKind.causal:  # it may be the text part of a model that also sees, saved by itself
        register_causal_class_of_text_config(type(hf_config))
    return getattr(transformers, class_name_by_kind[kind])


def _raise_if_no_model_class(kind: ModelKind, hf_config: Any, config: ModelConfig, objective: str) -> None:
    """Raise ConfigError, with what does work, if transformers has no class of this kind for a model's configuration."""
    import transformers

    if config.trust_remote_code:  # the model may bring its own class
        return
    model_class = transformers_class(kind, hf_config)
    mappings: dict[str, Any] = {
        "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForMultimodalLM": transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
        "AutoModelForSequenceClassification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "AutoModelForSeq2SeqLM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    if type(hf_config) in mappings[model_class.__name__]:
        return
    containing_types = language_model_types_of_architecture(type(hf_config))
    if kind is ModelKind.causal and containing_types:
        remedy = f"it is a part of {' or '.join(containing_types)}: give the whole model, whose language model is then trained"
    elif kind is not ModelKind.classifier and type(hf_config) in mappings["AutoModelForSequenceClassification"]:
        remedy = "it is an encoder, which objective=classification trains"
    else:
        remedy = "take a model of another architecture (docs/models.md lists those that train)"
    raise ConfigError(
        f"model.path={config.path}: transformers has no class for objective={objective} of a {hf_config.model_type} "
        f"({model_class.__name__} does not know it); {remedy}"
    )


def modules_beside_text(model: Any) -> tuple[str, ...]:
    """Names of the modules that a causal model has beside its text model and head: towers for images and sound, projectors.

    Such as `("model.vision_tower", "model.multi_modal_projector")`; empty for a model of text alone. Texts train none of them.
    """
    if text_model_config(model.config) is model.config:
        return ()
    text_parts = {id(part) for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None}

    def outside(module: Any, prefix: str) -> Iterator[str]:
        """Names of the largest modules below `module` that have parameters and hold no text part."""
        for name, child in module.named_children():
            if id(child) in text_parts:
                continue
            if text_parts & {id(module) for module in child.modules()}:
                yield from outside(child, f"{prefix}{name}.")
            elif next(child.parameters(), None) is not None:
                yield f"{prefix}{name}"

    return tuple(outside(model, ""))


def from_config_options(config: ModelConfig) -> dict[str, Any]:
    """Arguments for every `from_config` of transformers but the attention: remote code, data type, function for experts."""
    options = {"trust_remote_code": config.trust_remote_code, "dtype": "float32"}
    if not config.trust_remote_code:  # a model's own code need not know this argument
        options["experts_implementation"] = experts.EXPERTS_FUNCTION
    return options


def _build_with_attention(kind: ModelKind, hf_config: Any, config: ModelConfig, attention: str) -> PlainModel:
    """Build the model with the attention `attention` (transformers' name), or with `eager` if its class does not have that.

    Eager replaces SDPA if the setting is `auto` and the model's class has no SDPA. Raises ValueError if the class does not have
    an attention that the user chose.
    """
    options = from_config_options(config)
    model_class = transformers_class(kind, hf_config)
    try:
        model = model_class.from_config(hf_config, attn_implementation=attention, **options)
    except ValueError as error:
        if attention != "sdpa" or config.attention is not Attention.auto or "scaled_dot_product" not in str(error):
            raise
        attention = "eager"
        model = model_class.from_config(hf_config, attn_implementation=attention, **options)
    if hf_config.model_type in TEXT_ONLY_MODEL_TYPES:
        # Tensors that it has no place for are ignored (all names match), and go into the export as they are.
        ignore_in_checkpoints(model, {"."})
    return PlainModel(model, attention)


def set_head_settings(hf_config: Any, num_outputs: int | None, pad_token_id: int, *, multi_label: bool) -> None:
    """Set in `hf_config` what the architecture, and later the export, must know of its classification head.

    `num_outputs`: of the head, one for each label. `multi_label`: any number of labels may be true of one document, so that
    each is a yes or no.
    """
    hf_config.num_labels = num_outputs
    if multi_label:
        hf_config.problem_type = "multi_label_classification"
    hf_config.pad_token_id = pad_token_id


def grow_vocabulary(config: ModelConfig, hf_config: Any, num_tokens: int, num_added_tokens: int) -> None:
    """Make room for added tokens in `hf_config`, before the model is built from it: at least `num_tokens` in the vocabulary.

    Of these, `num_added_tokens` are those of `model.add_tokens`. The vocabulary never shrinks: a model may have more rows than
    its tokenizer has tokens. Built at its final size, the model needs no resizing after sharding.

    Raises ConfigError if the tokenizer without the new tokens has more entries than the model has rows.
    """
    text_config = text_model_config(hf_config)
    num_rows = text_config.vocab_size
    num_own_tokens = num_tokens - num_added_tokens
    if num_own_tokens > num_rows:
        raise ConfigError(
            f"model.path={config.path}: its tokenizer has {num_own_tokens} entries, its embeddings {num_rows} rows: they do "
            "not belong together. Use the tokenizer of this model and list further tokens in model.add_tokens"
        )
    text_config.vocab_size = max(num_rows, num_tokens)


def text_model_config(hf_config: Any) -> Any:
    """The part of a configuration that speaks of text: itself, but for models that also see or hear."""
    return hf_config if hasattr(hf_config, "vocab_size") else hf_config.get_text_config()


def experts_per_token(hf_config: Any) -> int:
    """How many experts compute each token; 2 if no setting of the configuration says it."""
    text = text_model_config(hf_config)
    names = ("num_experts_per_tok", "numexperts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")
    return next((getattr(text, name) for name in names if isinstance(getattr(text, name, None), int)), 2)


def width_and_num_blocks(model: Any) -> tuple[int, int]:
    """The width of a model's hidden states and the number of its blocks, as in (4096, 32), for estimates of memory.

    By its configuration, or for a model of several parts of their own sizes (BLT): the largest width, and the blocks of all.
    """
    text = text_model_config(model.config)
    modules = list(model.modules())
    width = getattr(text, "hidden_size", None)
    if width is None:
        width = max(module.embedding_dim for module in modules if isinstance(module, nn.Embedding))
    blocks = getattr(text, "num_hidden_layers", None)
    if blocks is None:
        block_classes = block_class_names(model)
        blocks = sum(type(module).__name__ in block_classes for module in modules)
    return width, blocks


def attention_crossover_tokens(hf_config: Any) -> int:
    """The length in tokens at which a document's attention costs as much as its products with the weights.

    A document of n tokens costs about n + n^2 / crossover, in units of one token's products with the weights.

    A block of width w has about 12 w^2 weights, and multiplies each token by them once. Causal attention multiplies about w n^2
    times for a document of n tokens. So the crossover is 12 w: 49,152 for a model of 8B. Layers whose attention has a window
    count as layers without attention, so the crossover grows by the ratio of all layers to those of full attention.
    """
    text = text_model_config(hf_config)
    width = getattr(text, "hidden_size", None) or WIDTH_OF_8B
    layer_types = getattr(text, "layer_types", None) or ["full_attention"]
    num_full_layers = sum(layer_type == "full_attention" for layer_type in layer_types)
    return 12 * int(width) * len(layer_types) // max(1, num_full_layers)


def set_dropout(hf_config: Any, probability: float) -> list[EarlierSetting]:
    """Set every dropout probability in `hf_config`, and switch off whatever else the model draws at random (`layerdrop`).

    Configurations within it (of a text model, say) are changed too. Returns what each setting that was found had before, such
    as `(hf_config, "attention_dropout", 0.1)`.
    """
    earlier_values = []
    owners = [hf_config]
    for name in getattr(hf_config, "sub_configs", None) or {}:
        sub_config = getattr(hf_config, name, None)
        if sub_config is not None:
            owners.append(sub_config)
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if not isinstance(value, float | int) or isinstance(value, bool):
                continue
            if RANDOM_SETTING_NAME_REGEX.search(name):
                new_value = 0.0
            elif DROPOUT_NAME_REGEX.search(name):
                new_value = probability
            else:
                continue
            earlier_values.append(EarlierSetting(owner, name, value))
            # A setting that is a whole number stays one, if it can.
            setattr(owner, name, int(new_value) if isinstance(value, int) and new_value in (0, 1) else new_value)
    return earlier_values


def freeze_key_selectors(model: nn.Module) -> list[str]:
    """Keep the parts in `KEY_SELECTOR_CLASSES` from training, adapters on them too.

    Returns the names of the classes that were found. No gradient reaches these modules, which choose the keys that a query
    attends to.
    """
    selectors = [module for module in model.modules() if type(module).__name__ in KEY_SELECTOR_CLASSES]
    for module in selectors:
        module.requires_grad_(False)
    return sorted({type(module).__name__ for module in selectors})


def head_names(model: Any) -> tuple[str, ...]:
    """Names of the modules with parameters at the top of a model, beside its base model: `("lm_head",)`, `("score",)`."""
    names = []
    for name, module in model.named_children():
        has_parameters = next(module.parameters(), None) is not None
        if name != model.base_model_prefix and has_parameters:
            names.append(name)
    return tuple(names)


def vocabulary_parameter_names(model: Any) -> frozenset[str]:
    """Full names of the parameters with a row for each token: those of the input embeddings and of the output head."""
    vocabulary_modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names: set[str] = set()
    for name, module in model.named_modules():
        if any(module is vocabulary_module for vocabulary_module in vocabulary_modules):
            names.update(f"{name}.{key}" for key in own_parameters(module))
    return frozenset(names)
