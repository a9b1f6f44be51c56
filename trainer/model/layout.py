"""How documents lie in memory for a model, and with which attention kernel."""

from __future__ import annotations

from importlib.util import find_spec

from strategies.errors import ConfigError
from trainer.data.config import Layout
from trainer.model.attention import NAME, PADDING_FREE
from trainer.model.config import Attention, ModelConfig


def resolve_layout(
    model: ModelConfig, layout: Layout, model_type: str, *, needs_padding: bool, half_on_gpu: bool
) -> tuple[Layout, str, dict[str, str]]:
    """(layout, transformers attention name, substitutions made).

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
    has_flash = half_on_gpu and find_spec("flash_attn") is not None
    if model.attention is Attention.flash_attention_2 and not has_flash:
        raise ConfigError(
            "model.attention=flash_attention_2: needs a CUDA device, precision=bf16 or fp16, and the package flash-attn "
            "(pip install 'shardtune[gpu]'); use model.attention=auto"
        )
    if has_flash and model.attention in (Attention.auto, Attention.flash_attention_2):
        return layout, "flash_attention_2", notes
    if model.attention is Attention.auto:
        notes["model.attention"] = "varlen (built in; FlashAttention needs a GPU, half precision and flash-attn)"
    return layout, NAME, notes
