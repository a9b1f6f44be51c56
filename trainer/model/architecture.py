"""The plain architecture before anything is tuned: its class, dropout, head, vocabulary and names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from strategies.compat.modules import own_parameters
from strategies.errors import ConfigError
from trainer.model import experts
from trainer.model.compat import ignore_in_checkpoints
from trainer.model.config import Attention, ModelConfig, ModelKind
from trainer.tuning.compat.transformers import block_class_names

DROPOUT = re.compile(r"dropout|_pdrop$")
"""What the names of dropout probabilities have in common, whatever an architecture calls them."""
NOISE = re.compile(r"layerdrop|input_jitter")
"""Of settings that leave out whole layers, or disturb them, at random: ranks would draw different ones, and sharding
strategies would hang or part."""

CHOOSERS = frozenset({"Qwen4ExpTextQSAIndexer"})
"""Classes of modules that choose keys, so that no gradient reaches them, and call their parts as often as a document's tokens
ask: gathered for each such call, ranks would wait for each other for ever."""
UNFIT = {"reformer": "trains only on rows of a fixed length, a multiple of its chunks"}
"""Why models of a `model_type` are not trained, where nothing else finds it out before the first step."""
TEXT_ALONE = frozenset({"llama4"})
"""Models that see, of which only the text model can be built: in transformers 5.24 the whole one fails on texts."""


def architecture(
    kind: ModelKind, model_config: Any, config: ModelConfig, attention: str, objective: str
) -> tuple[Any, str]:
    """The plain model of a kind, with the run's dropout, and its attention: eager where it has no SDPA.

    Raises ConfigError, for the objective named, where there is none.
    """
    if (said := UNFIT.get(model_config.model_type)) is not None:
        raise ConfigError(
            f"model.path={config.path}: a {model_config.model_type} {said}, and cannot be trained here; take a model of another "
            "architecture (docs/models.md lists those that train)"
        )
    before = set_dropout(model_config, config.dropout)
    try:
        model, attention = _built(kind, model_config, config, attention)
    # A class fails in its own way over a configuration that it does not know: a rope type, an activation, a missing part.
    except (ValueError, ImportError, AttributeError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        reason = str(error).partition("\nModel type should be one of")[0]  # hundreds of names follow
        if isinstance(error, LookupError):
            reason = f"its config.json names {reason}, which this transformers does not know"
        raise ConfigError(
            f"model.path={config.path}: a {model_config.model_type} model cannot be built for objective="
            f"{objective} with attention {attention}: {' '.join(reason.split())[:300]}"
        ) from error
    for owner, name, value in before:  # layers have read theirs; an export keeps the base's values
        setattr(owner, name, value)
    return model, attention


def auto_class(kind: ModelKind, model_config: Any) -> Any:
    """The class of transformers that picks the architecture. A model that also sees or hears is built whole."""
    import transformers

    names = {
        ModelKind.causal: "AutoModelForCausalLM",
        ModelKind.classifier: "AutoModelForSequenceClassification",
        ModelKind.encoder_decoder: "AutoModelForSeq2SeqLM",
    }
    whole = (
        type(model_config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING and model_config.model_type not in TEXT_ALONE
    )
    if kind is ModelKind.causal and whole:
        return transformers.AutoModelForMultimodalLM
    return getattr(transformers, names[kind])


def beside_text(model: Any) -> tuple[str, ...]:
    """Names of the modules that a causal model has beside its text model and head: towers for images and sound, projectors."""
    if text_settings(model.config) is model.config:
        return ()
    kept = {id(m) for m in (model.get_decoder(), model.get_output_embeddings()) if m is not None}

    def outside(module: Any, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if id(child) in kept:
                continue
            if kept & {id(m) for m in child.modules()}:
                yield from outside(child, f"{prefix}{name}.")
            elif next(child.parameters(), None) is not None:
                yield f"{prefix}{name}"

    return tuple(outside(model, ""))


def build_options(config: ModelConfig) -> dict[str, Any]:
    """What transformers is told whenever it builds a model, beside its attention."""
    options = {"trust_remote_code": config.trust_remote_code, "dtype": "float32"}
    if not config.trust_remote_code:  # code of its own need not know the word
        options["experts_implementation"] = experts.NAME
    return options


def _built(kind: ModelKind, model_config: Any, config: ModelConfig, attention: str) -> tuple[Any, str]:
    options, auto = build_options(config), auto_class(kind, model_config)
    try:
        model = auto.from_config(model_config, attn_implementation=attention, **options)
    except ValueError as error:
        if attention != "sdpa" or config.attention is not Attention.auto or "scaled_dot_product" not in str(error):
            raise
        attention = "eager"
        model = auto.from_config(model_config, attn_implementation=attention, **options)
    if model_config.model_type in TEXT_ALONE:  # what it has no place for goes into the export as it is
        ignore_in_checkpoints(model, {"."})
    return model, attention


def describe_head(model_config: Any, outputs: int | None, pad_token_id: int, *, several: bool) -> None:
    """What the architecture, and later the export, must know of its classification head.

    `outputs` is their number; `several`: any number of them may be true of one document.
    """
    model_config.num_labels = outputs
    if several:
        model_config.problem_type = "multi_label_classification"
    model_config.pad_token_id = pad_token_id


def grow_vocabulary(config: ModelConfig, model_config: Any, size: int, num_new: int) -> None:
    """Make room for added tokens: built at its final size, the model needs no resizing after sharding."""
    text = text_settings(model_config)
    rows = text.vocab_size
    if size - num_new > rows:
        raise ConfigError(
            f"model.path={config.path}: its tokenizer has {size - num_new} entries, its embeddings {rows} rows: they do "
            "not belong together. Use the tokenizer of this model and list further tokens in model.add_tokens"
        )
    text.vocab_size = max(rows, size)


def text_settings(model_config: Any) -> Any:
    """The part of a configuration that speaks of text: itself, but for models that also see or hear."""
    return model_config if hasattr(model_config, "vocab_size") else model_config.get_text_config()


def width_and_blocks(plain: Any) -> tuple[int, int]:
    """How wide a model's hidden states are, and how many blocks it has.

    Its configuration says it, but for models of several parts of their own sizes (BLT): there the largest width, and the
    blocks of all.
    """
    text, modules = text_settings(plain.config), list(plain.modules())
    width, blocks = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if width is None:
        width = max(module.embedding_dim for module in modules if isinstance(module, nn.Embedding))
    if blocks is None:
        kinds = block_class_names(plain)
        blocks = sum(type(module).__name__ in kinds for module in modules)
    return width, blocks


def set_dropout(model_config: Any, probability: float) -> list[tuple[Any, str, float]]:
    """Set every dropout the architecture has, and still what is drawn otherwise; returns (owner, name, value before)."""
    before = []
    parts = [getattr(model_config, name, None) for name in (getattr(model_config, "sub_configs", None) or {})]
    for owner in (model_config, *(part for part in parts if part is not None)):
        for name, value in list(vars(owner).items()):
            if not isinstance(value, float | int) or isinstance(value, bool):
                continue
            noise = NOISE.search(name)
            if noise or DROPOUT.search(name):
                before.append((owner, name, value))
                chosen = 0.0 if noise else probability
                setattr(owner, name, int(chosen) if isinstance(value, int) and chosen in (0, 1) else chosen)
    return before


def freeze_choosers(model: nn.Module) -> list[str]:
    """Keep the parts of `CHOOSERS` from training, adapters on them too; the classes that were found."""
    found = [module for module in model.modules() if type(module).__name__ in CHOOSERS]
    for module in found:
        module.requires_grad_(False)
    return sorted({type(module).__name__ for module in found})


def head_names(model: Any) -> tuple[str, ...]:
    """What the architecture has at its top beside its base model."""
    children = model.named_children()
    return tuple(n for n, m in children if n != model.base_model_prefix and any(True for _ in m.parameters()))


def vocabulary_names(model: Any) -> frozenset[str]:
    """Full names of the token embeddings' and the output head's parameters."""
    wanted = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return frozenset(
        f"{name}.{key}"
        for name, module in model.named_modules()
        if id(module) in wanted
        for key in own_parameters(module)
    )
