"""The model's settings. (The architecture and its weights are built further down.)"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Attention(StrEnum):
    """Attention kernel. `auto` takes FlashAttention where it is installed and usable, else the built-in varlen kernel."""

    auto = "auto"
    varlen = "varlen"
    flash_attention_2 = "flash_attention_2"
    sdpa = "sdpa"
    eager = "eager"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which pretrained model is tuned."""

    path: str | None = None
    """Directory of a Hugging Face model, or a hub id that is in the local cache (or downloaded with `model.download=true`)."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; default: `model.path`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    download: bool = False
    """Allow fetching the model from the hub; off by default, so that a run never reaches for the network unasked."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for sources you trust."""
    attention: Attention = Attention.auto
    """Attention kernel: `auto`, `varlen`, `flash_attention_2`, `sdpa` or `eager`."""
    add_tokens: list[str] = field(default_factory=list)
    """New vocabulary entries; their embeddings start at the mean of the existing ones."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""
    dropout: float = 0.0
    """Dropout probability set on the model's own dropout layers, 0 to 1."""
