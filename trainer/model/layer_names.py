"""What an architecture calls its heads and the parameters that have a row for each token."""

from __future__ import annotations

from typing import Any


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
