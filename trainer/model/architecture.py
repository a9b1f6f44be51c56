"""The plain architecture before anything is tuned: its class, dropout, head, vocabulary and names."""

from __future__ import annotations

from typing import Any

from strategies.errors import ConfigError
from trainer.model.config import Kind, ModelConfig
from trainer.model.encoder_decoder import DROPOUTS, LAYER_DROP

FIELDS = (
    "attention_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "seq_classif_dropout",
)
"""Names that architectures give to their dropouts."""


def architecture(kind: Kind, model_config: Any, config: ModelConfig, attention: str, objective: str) -> Any:
    """The plain model of a kind, with the run's dropout; raises ConfigError, for the objective named, where there is none."""
    original_dropout = set_dropout(model_config, config.dropout)
    options = {"trust_remote_code": config.trust_remote_code, "dtype": "float32"}
    try:
        model = kind.auto_class().from_config(model_config, attn_implementation=attention, **options)
    except ValueError as error:
        reason = str(error).partition("\nModel type should be one of")[0]  # hundreds of names follow
        raise ConfigError(
            f"model.path={config.path}: a {model_config.model_type} model cannot be built for objective="
            f"{objective} with attention {attention}: {reason[:300]}"
        ) from error
    for name, value in original_dropout.items():  # layers have read theirs; an export keeps the base's values
        setattr(model_config, name, value)
    return model


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
    rows = model_config.vocab_size
    if size - num_new > rows:
        raise ConfigError(
            f"model.path={config.path}: its tokenizer has {size - num_new} entries, its embeddings {rows} rows: they do "
            "not belong together. Use the tokenizer of this model and list further tokens in model.add_tokens"
        )
    model_config.vocab_size = max(rows, size)


def set_dropout(model_config: Any, probability: float) -> dict[str, float]:
    """Set every dropout the architecture has, whatever its fields are called; returns the values that were there."""
    before = {name: getattr(model_config, name, None) for name in (*FIELDS, *DROPOUTS)}
    found = {name: value for name, value in before.items() if isinstance(value, float | int)}
    for name in found:
        setattr(model_config, name, 0.0 if name in LAYER_DROP else probability)
    return found


def head_names(model: Any) -> tuple[str, ...]:
    """What the architecture has at its top beside its base model."""
    children = model.named_children()
    return tuple(n for n, m in children if n != model.base_model_prefix and any(True for _ in m.parameters()))


def vocabulary_names(model: Any) -> frozenset[str]:
    """Full names of the token embeddings' and the output head's parameters."""
    wanted = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return frozenset(
        f"{name}.{key}" for name, module in model.named_modules() if id(module) in wanted for key in module._parameters
    )
