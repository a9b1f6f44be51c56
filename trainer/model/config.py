"""Settings of the model, and the kinds of models there are."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class ModelKind(StrEnum):
    """What a model computes, and so which class of transformers it is."""

    causal = "causal"
    classifier = "classifier"
    encoder_decoder = "encoder_decoder"


class Attention(StrEnum):
    """Attention kernel. `auto` takes FlashAttention where it is installed and usable, flex for sinks and soft caps, else
    the built-in varlen kernel."""

    auto = "auto"
    varlen = "varlen"
    flash_attention_2 = "flash_attention_2"
    flex = "flex"
    sdpa = "sdpa"
    eager = "eager"


class Quantisation(StrEnum):
    """How a frozen base is stored."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


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
    """Attention kernel: `auto`, `varlen`, `flash_attention_2`, `flex`, `sdpa` or `eager`."""
    add_tokens: list[str] = field(default_factory=list)
    """New vocabulary entries; their embeddings start at the mean of the existing ones."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""
    router_aux_loss: float | None = None
    """Weight of the loss that balances experts; null: as the model's config says (`output_router_logits`), 0: none."""
    router_z_loss: float = 0.0
    """Weight of the z-loss, which keeps the routers' logits small; 0 leaves it out."""
    dropout: float = 0.0
    """Dropout probability set on the model's own dropout layers, 0 to 1."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings in training, up to this over the root of (tokens x width) (arXiv:2310.05914); 0 is off, 5 usual."""
    quantisation: Quantisation = Quantisation.none
    """Storage of the frozen base under adapters: `none`, `nf4` or `fp4` (4 bits, QLoRA) or `int8`; needs bitsandbytes."""
    double_quantisation: bool = True
    """Quantise the scales of `nf4` and `fp4` too: 4.13 instead of 4.5 bits an element."""
    keep_packed: bool = True
    """Keep a quantised base packed on this host (`SHARDTUNE_CACHE`), where its ranks pack each weight once, for later runs."""
    adapters: list[str] = field(default_factory=list)
    """Directories of adapters folded into the base, in this order, as it is loaded; a new adapter then trains on top."""


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def may_be_hub_id(value: str) -> bool:
    """org/name, or a bare name; not what can only be a path. A parent directory that exists makes it a path."""
    return bool(HUB_ID.fullmatch(value)) and not ("/" in value and Path(value).parent.is_dir())
