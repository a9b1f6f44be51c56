"""How documents lie in memory for a model, and with which attention kernel."""

from __future__ import annotations

from strategies.errors import ConfigError
from trainer.data.config import Layout
from trainer.model.attention import NAME, PADDING_FREE
from trainer.model.config import Attention, ModelConfig


def resolve_layout(
    model: ModelConfig, layout: Layout, model_type: str, *, needs_padding: bool, no_flash: str | None
) -> tuple[Layout, str, dict[str, str]]:
    """(layout, transformers attention name, substitutions made). `no_flash`: why FlashAttention cannot be used, if so.

    Raises ConfigError for a combination that would silently mix documents.
    """
    known = model_type in PADDING_FREE
    notes: dict[str, str] = {}
    if layout is Layout.auto:
        wants_stock = model.attention in (Attention.sdpa, Attention.eager)
        layout = Layout.padding_free if known and not needs_padding and not wants_stock else Layout.padded
        if layout is Layout.padded and not needs_padding:
            reason = f"attention={model.attention}" if wants_stock else f"{model_type} is not proven padding-free"
            notes["data.layout"] = f"padded ({reason})"
    elif layout is Layout.padding_free and (needs_padding or not known):
        raise ConfigError(
            f"data.layout=padding_free: {model_type} with this objective and tuning is not proven to keep documents apart; "
            f"use data.layout=padded (proven: {', '.join(sorted(PADDING_FREE))})"
        )
    if model.attention is Attention.flash_attention_2 and no_flash is not None:
        raise ConfigError(f"model.attention=flash_attention_2: {no_flash}; use model.attention=auto")
    if layout is Layout.padded:
        if model.attention is Attention.varlen:
            raise ConfigError(
                "model.attention=varlen: is for padding-free rows; use sdpa, eager or auto with padded ones"
            )
        return layout, "sdpa" if model.attention is Attention.auto else str(model.attention), notes
    if model.attention in (Attention.sdpa, Attention.eager):
        raise ConfigError(
            f"model.attention={model.attention} with data.layout=padding_free: would let documents see each other; use "
            "model.attention=varlen or data.layout=padded"
        )
    if no_flash is None and model.attention in (Attention.auto, Attention.flash_attention_2):
        return layout, "flash_attention_2", notes
    if model.attention is Attention.auto:
        notes["model.attention"] = f"varlen (built in; not FlashAttention: {no_flash})"
    return layout, NAME, notes
