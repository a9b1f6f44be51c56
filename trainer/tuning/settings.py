"""The settings of the tuning methods beside full tuning and LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.tuning.base import AdapterConfig, TuningConfig, TuningName


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
