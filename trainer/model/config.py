"""Settings of the model, and the kinds of models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from strategies.settings import DESCRIBES, FREE, Reach, group, number, setting


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


class RopeScaling(StrEnum):
    """How rotary positions are stretched over more of them."""

    yarn = "yarn"
    linear = "linear"


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """How positions are rotated. Null keeps what the model's config.json says."""

    type: RopeScaling | None = setting(None, reach=DESCRIBES)
    """Stretches the positions that the base was trained with: `yarn` (arXiv:2309.00071) or `linear`; null: as its config says."""
    factor: float | None = number(None, least=1, advice="null takes model.positions over the base's own")
    """By how much `type` stretches; null: `model.positions` divided by the positions that the base was trained with."""
    theta: float | None = number(None, above=0, advice="null keeps the model's; 10,000 to 10,000,000 as a rule")
    """Base of the wavelengths; null: as the model's config says. A larger one rotates more slowly."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which pretrained model is tuned."""

    path: str | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Directory of a Hugging Face model, or a hub id that is in the local cache (or downloaded with `model.download=true`)."""
    tokenizer: str | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Directory or hub id of the tokenizer; default: `model.path`."""
    revision: str | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Branch, tag or commit of a hub model."""
    download: bool = setting(False, reach=Reach.network, resume=FREE)
    """Allow fetching the model from the hub; off by default, so that a run never reaches for the network unasked."""
    trust_remote_code: bool = setting(False, reach=Reach.code, resume=FREE)
    """Run Python code that comes with the model; only for sources you trust."""
    attention: Attention = setting(Attention.auto, reach=DESCRIBES, resume=FREE)
    """Attention kernel: `auto`, `varlen`, `flash_attention_2`, `flex`, `sdpa` or `eager`."""
    add_tokens: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """New vocabulary entries; their embeddings start at the mean of the existing ones."""
    chat_template: str | None = setting(None, reach=Reach.file, resume=FREE)
    """File with a Jinja chat template that replaces the tokenizer's own."""
    positions: int | None = number(
        None, least=1, advice="null keeps the model's; the longest document's tokens, or more"
    )
    """Positions that the model has room for, in tokens (`max_position_embeddings`); null: as the model's config says."""
    rope: RopeConfig = group(RopeConfig)
    """How positions are rotated, for documents longer than the base was made for (docs/long-context.md)."""
    router_aux_loss: float | None = number(
        None, least=0, advice="null follows the model's config; 0.001 to 0.01 as a rule"
    )
    """Weight of the loss that balances experts; null: as the model's config says (`output_router_logits`), 0: none."""
    router_z_loss: float = number(0.0, least=0, advice="0 leaves it out; 0.001 as a rule")
    """Weight of the z-loss, which keeps the routers' logits small; 0 leaves it out."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Dropout probability set on the model's own dropout layers, 0 to 1."""
    neftune_alpha: float = number(0.0, least=0, advice="0 is off; 5 to 15 as a rule")
    """Noise on the embeddings in training, up to this over the root of (tokens x width) (arXiv:2310.05914); 0 is off, 5 usual."""
    quantisation: Quantisation = setting(Quantisation.none, reach=DESCRIBES)
    """Storage of the frozen base under adapters: `none`, `nf4` or `fp4` (4 bits, QLoRA) or `int8`; needs bitsandbytes."""
    double_quantisation: bool = setting(True, reach=DESCRIBES)
    """Quantise the scales of `nf4` and `fp4` too: 4.13 instead of 4.5 bits an element."""
    keep_packed: bool = setting(True, reach=DESCRIBES)
    """Keep a quantised base packed on this host (`SHARDTUNE_CACHE`), where its ranks pack each weight once, for later runs."""
    adapters: list[str] = setting(default_factory=list, reach=DESCRIBES, resume=FREE)
    """Directories of adapters folded into the base, in this order, as it is loaded; a new adapter then trains on top."""


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def may_be_hub_id(value: str) -> bool:
    """org/name, or a bare name; not what can only be a path. A parent directory that exists makes it a path."""
    return bool(HUB_ID.fullmatch(value)) and not ("/" in value and Path(value).parent.is_dir())
