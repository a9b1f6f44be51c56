"""Embedding rows that cannot be trained, because transformers sets them to zero whenever it loads the model."""

from __future__ import annotations

from typing import Any

from trainer.model.compat import zeroes_loaded_embedding
from trainer.model.layout import AttentionLayout


def zeroed_row(model: Any) -> int | None:
    """The row of the token embeddings that transformers sets to zero whenever it loads the model; None: there is none.

    That of padding, in architectures whose initialisation takes loaded weights for new ones.
    """
    row = getattr(model.get_input_embeddings(), "padding_idx", None)
    return row if row is not None and zeroes_loaded_embedding(model, row) else None


def always_zero_rows(model: Any, attention_layout: AttentionLayout) -> dict[str, int]:
    """Rows of embeddings that are always zero (that of padding), by parameter name: {"model.embed_tokens.weight": 0}.

    {} without any. Such a row is neither read nor trained, since transformers would set it to zero whenever it loads the
    trained model. Also adds a note on it to `attention_layout.notes`.
    """
    if (row := zeroed_row(model)) is None:
        return {}
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    attention_layout.notes["model.embeddings"] = (
        f"row {row} of {name} (padding) stays zero: transformers makes it so whenever it loads a {model.config.model_type}"
    )
    return {f"{name}.weight": row}
