"""The interface of a tuning method, and the settings of each."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from strategies.settings import DESCRIBES, FREE, number, setting

if TYPE_CHECKING:
    from torch import Tensor, nn


class TuningName(StrEnum):
    """The names users type as `tuning=<name>`."""

    full = "full"
    freeze = "freeze"
    lora = "lora"
    adalora = "adalora"
    ia3 = "ia3"
    vera = "vera"
    loha = "loha"
    lokr = "lokr"
    oft = "oft"
    boft = "boft"
    ln = "ln"
    prefix = "prefix"
    prompt = "prompt"
    p_tuning = "p_tuning"
    adaption_prompt = "adaption_prompt"
    bottleneck = "bottleneck"
    peft = "peft"


@dataclass(kw_only=True, slots=True)
class TuningConfig:
    """Settings shared by all tuning methods."""

    name: TuningName = setting(TuningName.full, reach=DESCRIBES)
    """Which method runs; set by the group choice `tuning=<name>`, not by hand."""

    @property
    def method(self) -> str:
        """The name of the method: the choice of `tuning=`, or peft's own name for a method of `tuning=peft`."""
        return str(self.name)


@dataclass(kw_only=True, slots=True)
class FullConfig(TuningConfig):
    """Every parameter trains."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig(TuningConfig):
    """Settings shared by the methods that put adapters beside frozen weights."""

    targets: Any = setting("all-linear", reach=DESCRIBES)
    """Names of modules (a list, or one regular expression) that get adapters. `all-linear`: every linear layer except the
    head."""
    modules_to_save: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Modules that are trained in full and saved with the adapters, such as a classification head."""
    from_: str | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Directory of an adapter to continue from. Settings that you do not set are taken from it. Typed as `tuning.from=<dir>`;
    in files the key is `from_`."""


@dataclass(kw_only=True, slots=True)
class LoraConfig(AdapterConfig):
    """Low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    name: TuningName = TuningName.lora
    rank: int = number(16, least=1, advice="8 to 64 as a rule")
    """Rank of the update. The adapter has `rank * (in + out)` parameters per matrix."""
    alpha: float = number(32.0, above=0, advice="twice tuning.rank as a rule")
    """Scale of the update: `alpha / rank` (`alpha / sqrt(rank)` with rslora)."""
    dropout: float = number(0.0, least=0, below=1, advice="0 keeps every strategy on the same curve")
    """Dropout probability on the adapter's input, 0 to 1. With 0, all strategies have the same loss curve."""
    rslora: bool = setting(False, reach=DESCRIBES)
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = setting(False, reach=DESCRIBES)
    """Weight-decomposed adaptation (Liu et al. 2024, arXiv:2402.09353)."""
    init: str = setting("default", reach=DESCRIBES)
    """`default` and `gaussian` start with a zero update; `pissa`, `pissa_niter_4` and `olora` train a part that is split off
    each weight."""
    lr_ratio: float = number(1.0, above=0, advice="1 is plain LoRA, 16 as a rule for LoRA+")
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): learning rate of the B matrices as a multiple of `optim.lr`. 16 is usual."""
    rank_pattern: dict[str, int] = setting(default_factory=dict, reach=DESCRIBES)
    """Different ranks for some modules, as pairs of name (or regular expression) and rank."""
    alpha_pattern: dict[str, float] = setting(default_factory=dict, reach=DESCRIBES)
    """Different alphas for some modules, as pairs of name (or regular expression) and alpha."""
    experts: bool = setting(False, reach=DESCRIBES)
    """Also adapt the experts of a mixture, each with its own adapter. `tuning.targets=[]` leaves the other layers out."""
    router: bool = setting(False, reach=DESCRIBES)
    """Also adapt the routers, which choose experts."""


class BaseWeightsReader(Protocol):
    """Reads the base model's parameters by their own names."""

    def full_tensor(self, name: str) -> Tensor:
        """The full parameter, on the CPU."""

    def rows(self, name: str, indices: list[int]) -> Tensor:
        """Rows of a matrix, float32 `[len(indices), columns]`, on the CPU."""


class Tuning(Protocol):
    """Decides what trains. `apply` works on a model whose parameters are on the meta device."""

    adapter: bool
    """Whether the result is an adapter beside an unchanged base."""
    keeps_base: bool
    """Whether `reference` can switch back to the base model at any step."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze what does not train, and add adapters. Raises ConfigError, with what exists, if a target matches nothing."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold adapters of a loaded model into its weights; returns the plain model."""

    def reference(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the tuned, perhaps sharded `model` computes what the base model does. Only if `keeps_base`."""

    def base_name(self, name: str) -> str:
        """The name a parameter of the tuned model has in the base model's checkpoint."""

    def is_added_parameter(self, name: str) -> bool:
        """Whether the method added this parameter, so that the base checkpoint does not have it."""

    def rewrites(self, name: str) -> bool:
        """Whether this frozen base parameter starts at another value than the checkpoint's."""

    def lr_factor(self, name: str) -> float:
        """The learning rate of a parameter as a multiple of the run's; 1 for most."""

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseWeightsReader, seed: int) -> Tensor:
        """The full initial tensor of a parameter that the method owns or rewrites, float32; a rank keeps its shard of it.

        Depends on (seed, name) and on base weights alone: equal under every strategy and world size.
        """
