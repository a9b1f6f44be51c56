"""How documents lie in memory for a model, and with which attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from strategies.errors import ConfigError
from trainer.data.config import Layout
from trainer.model.attention import NAME
from trainer.model.config import Attention, ModelConfig


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How documents lie in a row, and what computes attention over them."""

    layout: Layout
    attention: str
    """transformers' name of the kernel."""
    notes: dict[str, str]
    """Substitutions made, and why."""


def resolve_layout(
    model: ModelConfig,
    layout: Layout,
    model_type: str,
    *,
    unproven: Callable[[str], str],
    needs_padding: bool,
    no_flash: str | None,
) -> Arrangement:
    """The arrangement of a run. `unproven(attention)`: why documents cannot lie in one row there; empty where they can.
    `no_flash`: why FlashAttention cannot be used, if so.

    Raises ConfigError for a combination that would silently mix documents.
    """
    if layout is Layout.padding_free and needs_padding:
        raise ConfigError(
            "data.layout=padding_free: this objective or tuning needs a row for each document; use data.layout=padded"
        )
    if model.attention is Attention.flash_attention_2 and no_flash is not None:
        raise ConfigError(f"model.attention=flash_attention_2: {no_flash}; use model.attention=auto")
    stock = model.attention in (Attention.sdpa, Attention.eager)
    if layout is Layout.padding_free and stock:
        raise ConfigError(
            f"model.attention={model.attention} with data.layout=padding_free: would let documents see each other; use "
            "model.attention=varlen or data.layout=padded"
        )
    if layout is Layout.padded or needs_padding or stock:
        noted = layout is Layout.auto and not needs_padding
        return _padded(model, {"data.layout": f"padded (attention={model.attention})"} if noted else {})
    flash = no_flash is None and model.attention is not Attention.varlen
    attention = "flash_attention_2" if flash else NAME
    reason = unproven(attention)
    if reason and attention != NAME and model.attention is Attention.auto:
        attention = NAME
        reason = unproven(attention)
    if reason:
        if layout is Layout.padding_free or model.attention is Attention.varlen:
            word = "data.layout=padding_free" if layout is Layout.padding_free else f"model.attention={model.attention}"
            raise ConfigError(
                f"{word}: {model_type} is not proven to keep documents of one row apart ({reason}); use "
                "data.layout=padded and model.attention=auto"
            )
        return _padded(model, {"data.layout": f"padded ({model_type} is not proven padding-free: {reason})"})
    notes = {}
    if model.attention is Attention.auto and attention == NAME:
        notes["model.attention"] = f"varlen (built in; not FlashAttention: {no_flash or 'not proven right here'})"
    return Arrangement(Layout.padding_free, attention, notes)


def _padded(model: ModelConfig, notes: dict[str, str]) -> Arrangement:
    if model.attention is Attention.varlen:
        raise ConfigError("model.attention=varlen: is for padding-free rows; use sdpa, eager or auto with padded ones")
    stock = "sdpa" if model.attention is Attention.auto else str(model.attention)
    return Arrangement(Layout.padded, stock, notes)
