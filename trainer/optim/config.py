"""Settings of the optimizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from strategies.settings import DESCRIBES, number, setting


class OptimName(StrEnum):
    """The names users type as `optim=<name>`."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    adafactor = "adafactor"
    lion = "lion"
    muon = "muon"
    schedule_free = "schedule_free"
    sgd = "sgd"


class MuonScale(StrEnum):
    """How Muon scales an orthogonalised update by the shape of its matrix."""

    match_rms_adamw = "match_rms_adamw"
    original = "original"


@dataclass(kw_only=True, slots=True)
class GroupRule:
    """What is different for the parameters that a pattern matches."""

    match: str = setting("", reach=DESCRIBES)
    """Regular expression, found anywhere in a parameter's name; one that matches nothing is an error."""
    lr_factor: float = number(1.0, least=0, advice="1 keeps the common rate, 0 stands still")
    """Multiplies the learning rate of these parameters, on top of `optim.layer_decay`."""
    weight_decay: float | None = number(None, least=0, advice="null keeps the common rule")
    """Weight decay of these parameters, norms and biases included; null keeps the common rule."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Settings every optimizer understands."""

    name: OptimName = setting(OptimName.adamw, reach=DESCRIBES)
    """Which optimizer runs; set by the group choice `optim=<name>`."""
    lr: float | None = number(None, above=0, advice="about 2e-5 for full tuning, 2e-4 for LoRA")
    """Peak learning rate. null: the usual one for this optimizer, tuning method and objective (docs/peft.md)."""
    weight_decay: float = number(0.0, least=0, advice="0 to 0.1 as a rule")
    """Weight decay of matrices. It never applies to norms, biases and other vectors."""
    max_grad_norm: float = number(1.0, least=0, advice="0 switches clipping off")
    """Global L2 norm to which gradients are clipped. 0: no clipping."""
    max_skipped_steps: int = number(10, least=1, advice="10 as a rule")
    """The run ends after this many consecutive steps with gradients that are not finite."""
    layer_decay: float = number(1.0, above=0, most=1, advice="1 is off, 0.8 to 0.95 as a rule")
    """Layer-wise learning-rate decay: each layer's learning rate is that of the layer above times this factor (ELECTRA,
    arXiv:2003.10555). 1: off; 0.8 to 0.95 is usual."""
    ema_decay: float = number(0.0, least=0, below=1, advice="0 is off; 0.99 for hundreds of steps, 0.999 for thousands")
    """Decay of an exponential moving average of the weights, which is evaluated and exported instead of them. 0: off; 0.99 to
    0.9999 is usual."""
    groups: dict[str, GroupRule] = field(default_factory=dict)
    """Exceptions for some parameters, by names of your choice: `optim.groups.head.match=score
    optim.groups.head.lr_factor=10`."""

    @property
    def peak_lr(self) -> float:
        """`lr` as a number. Composition has settled it: see `trainer/optim/rates.py`."""
        assert self.lr is not None, "optim.lr: not settled"
        return self.lr


@dataclass(kw_only=True, slots=True)
class AdamwConfig(OptimConfig):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    betas: list[float] = setting(default_factory=lambda: [0.9, 0.999], reach=DESCRIBES)
    """Decay rates of the first and second moment, each in [0, 1)."""
    eps: float = number(1e-8, above=0, advice="1e-8 as a rule")
    """Added to the root of the second moment, for stability."""


@dataclass(kw_only=True, slots=True)
class Adamw8bitConfig(AdamwConfig):
    """AdamW with moments in 8 bits, block by block (Dettmers et al. 2021, arXiv:2110.02861); needs bitsandbytes."""

    name: OptimName = OptimName.adamw_8bit
    min_8bit_elements: int = number(4096, least=0, advice="4096 as a rule")
    """Parameters with fewer elements than this keep moments in 32 bits."""


@dataclass(kw_only=True, slots=True)
class AdafactorConfig(OptimConfig):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): second moments as a row and a column, steps relative to weights."""

    name: OptimName = OptimName.adafactor
    decay_exponent: float = number(0.8, least=0, most=1, advice="0.8 in the paper")
    """Decay of the second moments: the gradient of step t enters with weight `t ** -decay_exponent`, 0 to 1. So they average
    over more steps later in the run."""
    clip_threshold: float = number(1.0, least=1, advice="1 in the paper")
    """Largest root mean square of one parameter's update before it is multiplied by the learning rate, at least 1."""
    eps_scale: float = number(1e-3, above=0, advice="0.001 in the paper")
    """Smallest root mean square that a parameter's step is relative to."""


@dataclass(kw_only=True, slots=True)
class LionConfig(OptimConfig):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a momentum, half of AdamW's state."""

    name: OptimName = OptimName.lion
    betas: list[float] = setting(default_factory=lambda: [0.9, 0.99], reach=DESCRIBES)
    """Weight of the momentum in the update, and the decay rate of the momentum, each in [0, 1)."""


@dataclass(kw_only=True, slots=True)
class MuonConfig(OptimConfig):
    """Muon (Jordan et al. 2024): orthogonalised momentum for the matrices of the blocks, AdamW for everything else."""

    name: OptimName = OptimName.muon
    momentum: float = number(0.95, least=0, below=1, advice="0.9 (sgd) or 0.95 (muon) as a rule")
    """Decay rate of the momentum, in [0, 1)."""
    nesterov: bool = setting(True, reach=DESCRIBES)
    """Use Nesterov momentum."""
    iterations: int = number(5, least=1, most=20, advice="5 in the paper")
    """Number of Newton-Schulz iterations for one orthogonalisation."""
    bf16: bool = setting(False, reach=DESCRIBES)
    """Orthogonalise in bf16. It is faster on GPUs, and strategies then agree to about 1e-5 instead of 1e-6."""
    scale: MuonScale = setting(MuonScale.match_rms_adamw, reach=DESCRIBES)
    """`match_rms_adamw` is used with AdamW's learning rate and weight decay (arXiv:2502.16982); `original` needs learning rates
    near 0.02."""
    betas: list[float] = setting(default_factory=lambda: [0.9, 0.999], reach=DESCRIBES)
    """Decay rates of AdamW's moments, for embeddings, heads, norms and biases."""
    eps: float = number(1e-8, above=0, advice="1e-8 as a rule")
    """Added to the root of AdamW's second moment."""


@dataclass(kw_only=True, slots=True)
class ScheduleFreeConfig(AdamwConfig):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): an average of the iterates in place of a decaying rate."""

    name: OptimName = OptimName.schedule_free


@dataclass(kw_only=True, slots=True)
class SgdConfig(OptimConfig):
    """Stochastic gradient descent with momentum; weight decay is added to the gradient (L2)."""

    name: OptimName = OptimName.sgd
    momentum: float = number(0.9, least=0, below=1, advice="0.9 (sgd) or 0.95 (muon) as a rule")
    """Decay rate of the momentum, in [0, 1). 0: no momentum, so no optimizer state."""
    nesterov: bool = setting(False, reach=DESCRIBES)
    """Use Nesterov momentum. Needs a momentum above 0."""


OPTIMIZERS: tuple[type[OptimConfig], ...] = (
    AdamwConfig,
    Adamw8bitConfig,
    AdafactorConfig,
    LionConfig,
    MuonConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
"""The settings of every optimizer."""
