"""Rows of token embeddings that cannot be trained, since transformers sets them to zero whenever it loads the model."""

from __future__ import annotations

from typing import Any

import torch

from trainer.model.layout import Arrangement


def zeroed_row(model: Any) -> int | None:
    """The row of the token embeddings that transformers sets to zero whenever it loads the model; None: there is none.

    That of padding, in architectures whose initialisation takes loaded weights for new ones.
    """
    row = getattr(model.get_input_embeddings(), "padding_idx", None)
    if row is None:
        return None
    with torch.device("cpu"), torch.no_grad():
        probe = torch.nn.Embedding(row + 1, 1, padding_idx=row)
        probe.weight.fill_(1.0)
        probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(probe)
    return row if float(probe.weight.detach()[row]) == 0.0 else None


def still_rows(plain: Any, arranged: Arrangement) -> dict[str, int]:
    """That row by its parameter's name; noted, where there is one."""
    if (row := zeroed_row(plain)) is None:
        return {}
    embeddings = plain.get_input_embeddings()
    name = next(name for name, module in plain.named_modules() if module is embeddings)
    arranged.notes["model.embeddings"] = (
        f"row {row} of {name} (padding) stays zero: transformers makes it so whenever it loads a {plain.config.model_type}"
    )
    return {f"{name}.weight": row}
