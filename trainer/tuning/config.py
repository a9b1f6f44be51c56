"""The settings of the tuning methods beside full tuning and LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from trainer.tuning.base import AdapterConfig, FullConfig, LoraConfig, TuningConfig, TuningName


@dataclass(kw_only=True, slots=True)
class FreezeConfig(TuningConfig):
    """A part of the base trains, the rest is frozen; the export is a whole model. What is chosen adds up."""

    name: TuningName = TuningName.freeze
    layers: str | None = None
    """Blocks that train: `last-2` for the last two, or a range such as `4-7` counted from 0."""
    modules: str | None = None
    """Regular expression on whole module names; what matches trains with everything below it."""
    embeddings: bool = False
    """Also train the token embeddings and the output head."""
    bias_only: bool = False
    """Of the chosen part (else of the whole model) only biases train (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199)."""
    norm_only: bool = False
    """Of the chosen part (else of the whole model) only normalisation layers train; with bias_only both do."""


@dataclass(kw_only=True, slots=True)
class AdaLoraConfig(AdapterConfig):
    """Low-rank adapters whose ranks move to the layers that need them (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512)."""

    name: TuningName = TuningName.adalora
    init_rank: int = 12
    """Rank of every matrix at the start."""
    target_rank: int = 8
    """Mean rank that is left in the end; less than `init_rank`, about two thirds of it in the paper."""
    alpha: float = 32.0
    """Scale of the update: `alpha / init_rank`."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input, 0 to 1; 0 keeps every strategy on the same curve."""
    initial_share: float = 0.1
    """Share of the run's steps before the first rank is taken."""
    final_share: float = 0.3
    """Share of the run's steps after the last rank is taken; in between the ranks fall by a cubic curve."""
    delta_t: int = 10
    """Steps between two allocations while the ranks fall."""
    beta1: float = 0.85
    """Decay of the mean of an entry's importance, which is `|value * gradient|`."""
    beta2: float = 0.85
    """Decay of the mean of that importance's own variation."""
    orth_reg_weight: float = 0.5
    """Weight of the penalty that keeps an adapter's factors orthogonal; 0 leaves it out."""


@dataclass(kw_only=True, slots=True)
class Ia3Config(AdapterConfig):
    """Learned factors on keys, values and the feed-forward input (IA3, Liu et al. 2022, arXiv:2205.05638)."""

    name: TuningName = TuningName.ia3
    targets: Any = "auto"
    """Module names (a list, or one regular expression) that get factors; `auto` takes those peft names for the architecture."""
    feedforward: list[str] = field(default_factory=list)
    """Those of the targets whose input is scaled instead of their output; with `auto` peft names them too."""


@dataclass(kw_only=True, slots=True)
class VeraConfig(AdapterConfig):
    """Vectors that scale one random projection shared by all layers (VeRA, Kopiczko et al. 2023, arXiv:2310.11454)."""

    name: TuningName = TuningName.vera
    rank: int = 256
    """Rank of the shared projection; each matrix trains `rank + out` numbers."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input, 0 to 1; 0 keeps every strategy on the same curve."""
    d_initial: float = 0.1
    """Start of the inner scaling vector."""
    projection_seed: int = 0
    """Seed of the shared projection; not that of the run, since loaders draw the projection anew from it."""
    save_projection: bool = True
    """Keep the shared projection in the export; `false` saves space and trusts that loaders draw the same numbers."""


@dataclass(kw_only=True, slots=True)
class LohaConfig(AdapterConfig):
    """Update as a Hadamard product of two low-rank ones (LoHa, Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

    name: TuningName = TuningName.loha
    rank: int = 8
    """Rank of each factor; the product reaches its square, with `2 * rank * (in + out)` parameters per matrix."""
    alpha: float = 8.0
    """Scale of the update: `alpha / rank`."""


@dataclass(kw_only=True, slots=True)
class LokrConfig(AdapterConfig):
    """Update as a Kronecker product (LoKr, Yeh et al. 2023, arXiv:2309.14859)."""

    name: TuningName = TuningName.lokr
    rank: int = 8
    """Rank of the larger factor; factors small enough are trained whole."""
    alpha: float = 8.0
    """Scale of the update: `alpha / rank`."""
    decompose_both: bool = False
    """Also split the smaller factor into low-rank ones."""
    decompose_factor: int = 0
    """Size of the smaller factor; 0 takes the most even split."""


@dataclass(kw_only=True, slots=True)
class OftConfig(AdapterConfig):
    """Rotation of the input in blocks (OFT, Qiu et al. 2023, arXiv:2306.07280)."""

    name: TuningName = TuningName.oft
    block_size: int = 32
    """Size of a rotated block; where it does not divide a layer's input, peft takes the nearest that does."""
    block_share: bool = False
    """One rotation for all blocks of a layer."""
    neumann_terms: int = 5
    """Terms of the series that approximates the rotation; 0 solves for it exactly, which is slower."""


@dataclass(kw_only=True, slots=True)
class BoftConfig(AdapterConfig):
    """Rotation as a product of butterfly factors (BOFT, Liu et al. 2023, arXiv:2311.06243)."""

    name: TuningName = TuningName.boft
    block_size: int = 4
    """Size of a rotated block; must divide the input of every target."""
    num_factors: int = 1
    """Number of butterfly factors; 1 is OFT with a dense permutation."""
    dropout: float = 0.0
    """Probability that a block is left unrotated, 0 to 1; 0 keeps every strategy on the same curve."""


@dataclass(kw_only=True, slots=True)
class LnConfig(AdapterConfig):
    """Only normalisation layers train (Zhao et al. 2023, arXiv:2312.11420); saved like an adapter."""

    name: TuningName = TuningName.ln
    targets: Any = "auto"
    """Names of normalisation layers (a list, or one regular expression); `auto` takes those peft names for the architecture."""


@dataclass(kw_only=True, slots=True)
class PeftConfig(AdapterConfig):
    """Another method of peft by its name, with peft's own options."""

    name: TuningName = TuningName.peft
    type: str | None = None
    """peft's name of the method, such as `hra`; docs/methods.md lists those that are proven here."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of peft's config class for that method, as pairs; targets and modules_to_save have keys of their own."""


@dataclass(kw_only=True, slots=True)
class VirtualConfig(TuningConfig):
    """Settings shared by the methods that put trained virtual tokens before every document."""

    num_virtual_tokens: int = 20
    """Virtual tokens before every document; they take their place in the context and its cost in every forward pass."""


@dataclass(kw_only=True, slots=True)
class PrefixConfig(VirtualConfig):
    """Trained keys and values before those of every layer (prefix tuning, Li and Liang 2021, arXiv:2101.00190)."""

    name: TuningName = TuningName.prefix
    projection: bool = False
    """Make the prefix by a small network that is dropped after training; steadier at high rates, more memory."""
    encoder_hidden_size: int = 0
    """Width of that network; 0 takes the width of the prefix in one layer."""


class PromptInit(StrEnum):
    """At which values the tokens of prompt tuning start."""

    random = "random"
    text = "text"
    sampled = "sampled"


@dataclass(kw_only=True, slots=True)
class PromptConfig(VirtualConfig):
    """Trained embeddings before those of every document (prompt tuning, Lester et al. 2021, arXiv:2104.08691)."""

    name: TuningName = TuningName.prompt
    init: PromptInit = PromptInit.random
    """Start at `random` numbers, at the embeddings of a `text`, or of tokens `sampled` from the vocabulary."""
    init_text: str | None = None
    """Text for `tuning.init=text`, such as the instruction of the task; repeated or cut to the number of tokens."""


class EncoderKind(StrEnum):
    """The network that makes the tokens of P-tuning."""

    mlp = "mlp"
    lstm = "lstm"


@dataclass(kw_only=True, slots=True)
class PTuningConfig(VirtualConfig):
    """Embeddings made by a small network that is dropped after training (P-tuning, Liu et al. 2021, arXiv:2103.10385)."""

    name: TuningName = TuningName.p_tuning
    encoder: EncoderKind = EncoderKind.mlp
    """`mlp` of three layers, or `lstm` in both directions with two linear layers behind it."""
    encoder_hidden_size: int = 0
    """Width of the network; 0 takes the width of the embeddings."""
    encoder_layers: int = 2
    """Layers of the LSTM; the MLP always has three."""
    dropout: float = 0.0
    """Dropout probability between layers of the LSTM, 0 to 1; 0 keeps every strategy on the same curve."""


@dataclass(kw_only=True, slots=True)
class AdaptionPromptConfig(TuningConfig):
    """Gated attention to trained tokens beside the model's own (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199)."""

    name: TuningName = TuningName.adaption_prompt
    adapter_len: int = 10
    """Trained tokens in each adapted layer."""
    adapter_layers: int = 0
    """Adapted layers, counted from the output; 0 takes all (the paper leaves out the lowest two)."""


class Placement(StrEnum):
    """Where bottleneck adapters stand in a block."""

    houlsby = "houlsby"
    pfeiffer = "pfeiffer"


class Activation(StrEnum):
    """Nonlinearities of bottleneck adapters."""

    gelu = "gelu"
    relu = "relu"
    silu = "silu"
    tanh = "tanh"


@dataclass(kw_only=True, slots=True)
class BottleneckConfig(TuningConfig):
    """Small networks behind attention and feed-forward parts (adapters, Houlsby et al. 2019, arXiv:1902.00751)."""

    name: TuningName = TuningName.bottleneck
    placement: Placement = Placement.houlsby
    """`houlsby`: behind attention and feed-forward; `pfeiffer`: behind feed-forward only (arXiv:2005.00247)."""
    size: int = 64
    """Width of the bottleneck; an adapter trains `size * (2 * hidden + 1) + hidden` numbers."""
    activation: Activation = Activation.gelu
    """Nonlinearity: `gelu`, `relu`, `silu` or `tanh`."""
    dropout: float = 0.0
    """Dropout probability inside the bottleneck, 0 to 1; 0 keeps every strategy on the same curve."""
    attention: str | None = None
    """Name, within a block, of the module behind whose output the first adapter stands; default: found by its usual names."""
    feedforward: str | None = None
    """The same for the second adapter."""


TUNINGS: tuple[type[TuningConfig], ...] = (
    FullConfig,
    FreezeConfig,
    LoraConfig,
    AdaLoraConfig,
    Ia3Config,
    VeraConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
    BoftConfig,
    LnConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    AdaptionPromptConfig,
    BottleneckConfig,
    PeftConfig,
)
"""The settings behind the choices of `tuning=`."""
