"""The plain architecture before anything is tuned: its class, dropout, head and vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.model.dropout import set_dropout
from trainer.objectives.base import ObjectiveConfig

if TYPE_CHECKING:
    from trainer.model.loading import ModelConfig


def architecture(auto: Any, model_config: Any, config: ModelConfig, attention: str, objective: ObjectiveConfig) -> Any:
    """The plain model of a class of transformers, with the run's dropout; raises ConfigError where there is none."""
    original_dropout = set_dropout(model_config, config.dropout)
    options = {"trust_remote_code": config.trust_remote_code, "dtype": "float32"}
    try:
        model = auto.from_config(model_config, attn_implementation=attention, **options)
    except ValueError as error:
        reason = str(error).partition("\nModel type should be one of")[0]  # hundreds of names follow
        raise ConfigError(
            f"model.path={config.path}: a {model_config.model_type} model cannot be built for objective="
            f"{objective.name} with attention {attention}: {reason[:300]}"
        ) from error
    for name, value in original_dropout.items():  # layers have read theirs; an export keeps the base's values
        setattr(model_config, name, value)
    return model


def describe_head(model_config: Any, objective: ObjectiveConfig, outputs: int | None, pad_token_id: int) -> None:
    """What the architecture, and later the export, must know of its classification head."""
    model_config.num_labels = outputs
    if getattr(objective, "multi_label", False):
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
