"""Settings of the tuning methods other than full tuning and LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from strategies.settings import DESCRIBES, number, setting
from trainer.tuning.base import AdapterConfig, FullConfig, LoraConfig, TuningConfig, TuningName


@dataclass(kw_only=True, slots=True)
class FreezeConfig(TuningConfig):
    """A part of the base trains, the rest is frozen; the export is a whole model. What is chosen adds up."""

    name: TuningName = TuningName.freeze
    layers: str | None = setting(None, reach=DESCRIBES)
    """Blocks that are trained: `last-2` for the last two, or a range such as `4-7`, counted from 0."""
    modules: str | None = setting(None, reach=DESCRIBES)
    """Regular expression for whole module names. Matching modules are trained, with everything below them."""
    embeddings: bool = setting(False, reach=DESCRIBES)
    """Also train the token embeddings and the output head."""
    bias_only: bool = setting(False, reach=DESCRIBES)
    """Train only the biases of the chosen part, or of the whole model (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199)."""
    norm_only: bool = setting(False, reach=DESCRIBES)
    """Train only the normalisation layers of the chosen part, or of the whole model. With `bias_only`, both are trained."""


@dataclass(kw_only=True, slots=True)
class AdaLoraConfig(AdapterConfig):
    """Low-rank adapters whose ranks move to the layers that need them (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512)."""

    name: TuningName = TuningName.adalora
    init_rank: int = number(12, least=2, advice="12 as a rule")
    """Rank of every adapted matrix at the start."""
    target_rank: int = number(8, least=1, advice="two thirds of tuning.init_rank as a rule")
    """Mean rank at the end, less than `init_rank`; about two thirds of it in the paper."""
    alpha: float = number(32.0, above=0, advice="twice tuning.rank as a rule")
    """Scale of the update: `alpha / init_rank`."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Dropout probability on the adapter's input, 0 to 1. With 0, all strategies have the same loss curve."""
    initial_share: float = number(0.1, least=0, below=1, advice="0.1 as a rule")
    """Share of the run's steps before pruning of ranks begins."""
    final_share: float = number(0.3, least=0, below=1, advice="0.3 as a rule")
    """Share of the run's steps after pruning has ended. In between, the mean rank falls along a cubic curve."""
    delta_t: int = number(10, least=1, advice="1 to 100 as a rule")
    """Steps between two allocations of ranks while ranks are pruned."""
    beta1: float = number(0.85, above=0, below=1, advice="0.85 in the paper")
    """Decay rate of the moving average of an entry's importance, which is `|value * gradient|`."""
    beta2: float = number(0.85, above=0, below=1, advice="0.85 in the paper")
    """Decay rate of the moving average of that importance's variation (its uncertainty)."""
    orth_reg_weight: float = number(0.5, least=0, advice="0.1 to 0.5 as a rule, 0 leaves it out")
    """Weight of the penalty that keeps an adapter's factors orthogonal. 0: no penalty."""


@dataclass(kw_only=True, slots=True)
class Ia3Config(AdapterConfig):
    """Learned factors on keys, values and the feed-forward input (IA3, Liu et al. 2022, arXiv:2205.05638)."""

    name: TuningName = TuningName.ia3
    targets: Any = "auto"
    """Names of modules (a list, or one regular expression) that get scaling factors. `auto`: peft's defaults for the
    architecture."""
    feedforward: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Targets whose input is scaled instead of their output. With `auto`, peft's defaults too."""


@dataclass(kw_only=True, slots=True)
class VeraConfig(AdapterConfig):
    """Vectors that scale one random projection shared by all layers (VeRA, Kopiczko et al. 2023, arXiv:2310.11454)."""

    name: TuningName = TuningName.vera
    rank: int = number(256, least=1, advice="8 to 64 as a rule")
    """Rank of the shared projection. Each matrix trains `rank + out` parameters."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Dropout probability on the adapter's input, 0 to 1. With 0, all strategies have the same loss curve."""
    d_initial: float = number(0.1, above=0, advice="0.1 as a rule; at 0 nothing would be learned")
    """Initial value of the inner scaling vector."""
    projection_seed: int = number(0, least=0, advice="the default is 0")
    """Seed of the shared projection. It is not the seed of the run, because loaders generate the projection again from it."""
    save_projection: bool = setting(True, reach=DESCRIBES)
    """Save the shared projection in the export. `false` saves space, but relies on loaders to generate the same numbers."""


@dataclass(kw_only=True, slots=True)
class LohaConfig(AdapterConfig):
    """Update as a Hadamard product of two low-rank ones (LoHa, Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

    name: TuningName = TuningName.loha
    rank: int = number(8, least=1, advice="8 to 64 as a rule")
    """Rank of each factor. The product has at most its square as rank, with `2 * rank * (in + out)` parameters per matrix."""
    alpha: float = number(8.0, above=0, advice="twice tuning.rank as a rule")
    """Scale of the update: `alpha / rank`."""


@dataclass(kw_only=True, slots=True)
class LokrConfig(AdapterConfig):
    """Update as a Kronecker product (LoKr, Yeh et al. 2023, arXiv:2309.14859)."""

    name: TuningName = TuningName.lokr
    rank: int = number(8, least=1, advice="8 to 64 as a rule")
    """Rank of the larger factor. Factors that are small enough are trained in full."""
    alpha: float = number(8.0, above=0, advice="twice tuning.rank as a rule")
    """Scale of the update: `alpha / rank`."""
    decompose_both: bool = setting(False, reach=DESCRIBES)
    """Also split the smaller factor into low-rank factors."""
    decompose_factor: int = number(0, least=0, advice="0 takes the most even split, 8 or 16 are usual")
    """Size of the smaller factor. 0: the most even split."""


@dataclass(kw_only=True, slots=True)
class OftConfig(AdapterConfig):
    """Rotation of the input in blocks (OFT, Qiu et al. 2023, arXiv:2306.07280)."""

    name: TuningName = TuningName.oft
    block_size: int = number(32, least=2, advice="4 (boft) or 32 (oft) as a rule")
    """Size of a rotated block. If it does not divide a layer's input, peft uses the nearest size that does."""
    block_share: bool = setting(False, reach=DESCRIBES)
    """Use one rotation for all blocks of a layer."""
    neumann_terms: int = number(5, least=0, advice="5 as a rule, 0 solves exactly")
    """Number of terms of the series that approximates the rotation. 0: exact, and slower."""


@dataclass(kw_only=True, slots=True)
class BoftConfig(AdapterConfig):
    """Rotation as a product of butterfly factors (BOFT, Liu et al. 2023, arXiv:2311.06243)."""

    name: TuningName = TuningName.boft
    block_size: int = number(4, least=2, advice="4 (boft) or 32 (oft) as a rule")
    """Size of a rotated block. It must divide the input of every target."""
    num_factors: int = number(1, least=1, advice="1 or 2 as a rule")
    """Number of butterfly factors. 1: OFT with a dense permutation."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Probability that a block is not rotated, 0 to 1. With 0, all strategies have the same loss curve."""


@dataclass(kw_only=True, slots=True)
class LnConfig(AdapterConfig):
    """Only normalisation layers train (Zhao et al. 2023, arXiv:2312.11420); saved like an adapter."""

    name: TuningName = TuningName.ln
    targets: Any = "auto"
    """Names of normalisation layers (a list, or one regular expression). `auto`: peft's defaults for the architecture."""


@dataclass(kw_only=True, slots=True)
class PeftConfig(AdapterConfig):
    """Another method of peft by its name, with peft's own options."""

    name: TuningName = TuningName.peft
    type: str | None = setting(None, reach=DESCRIBES)
    """Name of the method in peft, such as `hra`. docs/methods.md lists the methods that were tested."""
    options: dict[str, Any] = setting(default_factory=dict, reach=DESCRIBES)
    """Options of peft's configuration of that method, as pairs. `targets` and `modules_to_save` have their own settings."""

    @property
    def method(self) -> str:
        """peft's name of the method, as the user typed it."""
        return str(self.name) if self.type is None else self.type.lower()


@dataclass(kw_only=True, slots=True)
class VirtualConfig(TuningConfig):
    """Settings shared by the methods that put trained virtual tokens before every document."""

    num_virtual_tokens: int = number(20, least=1, advice="8 to 100 as a rule")
    """Number of virtual tokens before every document. They take up context length and compute in every forward pass."""


class PrefixInit(StrEnum):
    """At which values prefix tuning starts."""

    zero = "zero"
    random = "random"


@dataclass(kw_only=True, slots=True)
class PrefixConfig(VirtualConfig):
    """Trained keys and values before those of every layer (prefix tuning, Li and Liang 2021, arXiv:2101.00190)."""

    name: TuningName = TuningName.prefix
    projection: bool = setting(False, reach=DESCRIBES)
    """Compute the prefix by a small network, which is dropped after training. Training is steadier at high learning rates, and
    needs more memory."""
    encoder_hidden_size: int = number(0, least=0, advice="0 takes the model's own width")
    """Width of that network. 0: the width of the prefix in one layer."""
    init: PrefixInit = setting(PrefixInit.zero, reach=DESCRIBES)
    """`zero` starts with values of zero and small keys, which barely change the base model; `random` starts with random ones,
    which disturb it."""


class PromptInit(StrEnum):
    """At which values the tokens of prompt tuning start."""

    random = "random"
    text = "text"
    sampled = "sampled"


@dataclass(kw_only=True, slots=True)
class PromptConfig(VirtualConfig):
    """Trained embeddings before those of every document (prompt tuning, Lester et al. 2021, arXiv:2104.08691)."""

    name: TuningName = TuningName.prompt
    init: PromptInit = setting(PromptInit.random, reach=DESCRIBES)
    """Where the virtual tokens start: at `random` numbers, at the embeddings of a `text`, or of tokens `sampled` from the
    vocabulary."""
    init_text: str | None = setting(None, reach=DESCRIBES)
    """Text for `tuning.init=text`, such as the instruction of the task. It is repeated or cut to the number of virtual
    tokens."""


class EncoderKind(StrEnum):
    """The network that makes the tokens of P-tuning."""

    mlp = "mlp"
    lstm = "lstm"


@dataclass(kw_only=True, slots=True)
class PTuningConfig(VirtualConfig):
    """Embeddings made by a small network that is dropped after training (P-tuning, Liu et al. 2021, arXiv:2103.10385)."""

    name: TuningName = TuningName.p_tuning
    encoder: EncoderKind = setting(EncoderKind.mlp, reach=DESCRIBES)
    """Network that computes the virtual tokens: `mlp` with three layers, or a bidirectional `lstm` followed by two linear
    layers."""
    encoder_hidden_size: int = number(0, least=0, advice="0 takes the model's own width")
    """Width of the network. 0: the width of the embeddings."""
    encoder_layers: int = number(2, least=1, advice="2 as a rule")
    """Number of layers of the LSTM. The MLP always has three."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Dropout probability between the layers of the LSTM, 0 to 1. With 0, all strategies have the same loss curve."""


@dataclass(kw_only=True, slots=True)
class AdaptionPromptConfig(TuningConfig):
    """Gated attention to trained tokens beside the model's own (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199)."""

    name: TuningName = TuningName.adaption_prompt
    adapter_len: int = number(10, least=1, advice="10 in the paper")
    """Number of trained tokens in each adapted layer."""
    adapter_layers: int = number(0, least=0, advice="0 takes every layer")
    """Number of adapted layers, counted from the output. 0: all. The paper leaves out the lowest two."""


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
    placement: Placement = setting(Placement.houlsby, reach=DESCRIBES)
    """Where the adapters are: `houlsby`, after attention and after feed-forward; `pfeiffer`, only after feed-forward
    (arXiv:2005.00247)."""
    size: int = number(64, least=1, advice="8 to 256 as a rule")
    """Width of the bottleneck. An adapter trains `size * (2 * hidden + 1) + hidden` parameters."""
    activation: Activation = setting(Activation.gelu, reach=DESCRIBES)
    """Activation function: `gelu`, `relu`, `silu` or `tanh`."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Dropout probability inside the bottleneck, 0 to 1. With 0, all strategies have the same loss curve."""
    attention: str | None = setting(None, reach=DESCRIBES)
    """Name, within a block, of the module after which the first adapter is placed. Default: found by its usual names."""
    feedforward: str | None = setting(None, reach=DESCRIBES)
    """Name, within a block, of the module after which the second adapter is placed. Default: found by its usual names."""


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


def peft_type_of(config: AdapterConfig) -> str:
    """peft's name of an adapter method, in lower case."""
    peft_type = str(config.name)
    if isinstance(config, PeftConfig) and config.type:
        peft_type = config.type
    # peft has another name for it.
    if peft_type == "ln":
        return "ln_tuning"
    return peft_type
