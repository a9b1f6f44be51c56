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
    """RoPE scaling method for positions beyond those of the base model's training: `yarn` (arXiv:2309.00071) or `linear`. null:
    as in config.json."""
    factor: float | None = number(None, least=1, advice="null takes model.positions over the base's own")
    """Scaling factor for `type`. null: `model.positions` divided by the positions of the base model's training."""
    theta: float | None = number(None, above=0, advice="null keeps the model's; 10,000 to 10,000,000 as a rule")
    """Base of the rotary wavelengths (`rope_theta`). A larger value rotates more slowly. null: as in config.json."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which pretrained model is tuned."""

    path: str | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Directory of a Hugging Face model, or a Hub id that is in the local cache (or is downloaded with
    `model.download=true`)."""
    tokenizer: str | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Directory or Hub id of the tokenizer. Default: `model.path`."""
    revision: str | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Branch, tag or commit of a Hub model."""
    download: bool = setting(False, reach=Reach.network, resume=FREE)
    """Allow downloading the model from the Hub. Off by default, so that a run accesses the network only if you say so."""
    trust_remote_code: bool = setting(False, reach=Reach.code, resume=FREE)
    """Run Python code that comes with the model. Only for sources that you trust."""
    attention: Attention = setting(Attention.auto, reach=DESCRIBES, resume=FREE)
    """Attention kernel: `auto`, `varlen`, `flash_attention_2`, `flex`, `sdpa` or `eager`."""
    add_tokens: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """New tokens of the vocabulary. Their embeddings start at the mean of the existing ones."""
    chat_template: str | None = setting(None, reach=Reach.file, resume=FREE)
    """File with a Jinja chat template that replaces the tokenizer's own."""
    positions: int | None = number(
        None, least=1, advice="null keeps the model's; the longest document's tokens, or more"
    )
    """Number of positions of the model in tokens (`max_position_embeddings`). null: as in config.json."""
    rope: RopeConfig = group(RopeConfig)
    """RoPE scaling, for documents longer than the base model was trained on (docs/long-context.md)."""
    router_aux_loss: float | None = number(
        None, least=0, advice="null follows the model's config; 0.001 to 0.01 as a rule"
    )
    """Weight of the load-balancing loss of experts. null: as in config.json (`output_router_logits`). 0: no such loss."""
    router_z_loss: float = number(0.0, least=0, advice="0 leaves it out; 0.001 as a rule")
    """Weight of the z-loss, which keeps the routers' logits small. 0: no such loss."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Dropout probability of the model's own dropout layers, 0 to 1."""
    neftune_alpha: float = number(0.0, least=0, advice="0 is off; 5 to 15 as a rule")
    """Scale of uniform noise on the embeddings during training (NEFTune, arXiv:2310.05914), divided by the root of tokens x
    width. 0: off; 5 is usual."""
    quantisation: Quantisation = setting(Quantisation.none, reach=DESCRIBES)
    """How the frozen base under adapters is stored: `none`, `nf4` or `fp4` (4 bits, QLoRA) or `int8`. Needs bitsandbytes."""
    double_quantisation: bool = setting(True, reach=DESCRIBES)
    """Also quantise the scales of `nf4` and `fp4`: 4.13 instead of 4.5 bits per parameter."""
    keep_packed: bool = setting(True, reach=DESCRIBES)
    """Cache the quantised base on this host (in `SHARDTUNE_CACHE`) for later runs. The ranks of the host share the work: each
    weight is quantised once."""
    adapters: list[str] = setting(default_factory=list, reach=DESCRIBES, resume=FREE)
    """Directories of adapters that are merged into the base in this order when it is loaded. A new adapter is then trained on
    top."""


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def may_be_hub_id(value: str) -> bool:
    """org/name, or a bare name; not what can only be a path. A parent directory that exists makes it a path."""
    return bool(HUB_ID.fullmatch(value)) and not ("/" in value and Path(value).parent.is_dir())
